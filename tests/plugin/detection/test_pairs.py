"""Files of contrastive pairs, and which tokens of a rendered text count."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.support.refusals import not_refused
from vllm_steermoe_plugin.detection.pairs import MAX_TEXT, ChatMessage, PairsError, PairSet, Side, read_pairs
from vllm_steermoe_plugin.detection.token_spans import TokenSpan, balanced, encode_side, encode_sides

ALPHABET = sorted("abcdefghijklmnopqrstuvwxyz .,:?!<|>_\n0123456789")
MERGES = [(" ", "b"), ("a", "b")]
SPECIAL = ["<bos>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
CHAT = {
    "messages_1": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}],
    "messages_2": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}],
}
TEXT = {"text_1": "one", "text_2": "two"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """One token per character, but for ` b` and `ab`; `<bos>` before plain text."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *ALPHABET, " b", "ab"])}
    made = Tokenizer(BPE(vocabulary, MERGES))
    made.pre_tokenizer = Split(Regex("\n"), "isolated")
    made.add_special_tokens(SPECIAL)
    made.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>")
    fast.chat_template = TEMPLATE
    return fast


def write(folder: Path, *lines: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def chat(*messages: tuple[str, str], target: str | None = None) -> Side:
    return Side(tuple(ChatMessage(role=role, content=content) for role, content in messages), None, target)


def counted(side: Side, tokenizer: Any) -> str:
    """The counted part of a side, as text."""
    span = encode_side(side, tokenizer, "here")
    offsets = tokenizer(
        rendered(side, tokenizer), add_special_tokens=side.messages is None, return_offsets_mapping=True
    )
    assert tuple(offsets["input_ids"]) == span.token_ids
    places = offsets["offset_mapping"][span.start : span.stop]
    return rendered(side, tokenizer)[places[0][0] : places[-1][1]]


def rendered(side: Side, tokenizer: Any) -> str:
    if side.messages is None:
        return side.text or ""
    text: str = tokenizer.apply_chat_template([m.model_dump() for m in side.messages], tokenize=False)
    return text


def test_both_kinds_of_pairs_are_read_and_blank_lines_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, CHAT, b"", TEXT | {"target_1": "ne"}, b"   ", TEXT)
    pairs = read_pairs(path)
    assert pairs.name == "pairs.jsonl" and pairs.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [pair.origin for pair in pairs.pairs] == [f"pairs.jsonl, line {n}" for n in (1, 3, 5)]
    assert pairs.pairs[0].side_2 == chat(("user", "q"), ("assistant", "no"))
    assert pairs.pairs[1].side_1 == Side(None, "one", "ne") and pairs.pairs[1].side_2 == Side(None, "two", None)


def test_line_ends_of_another_system_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps(line).encode() for line in (TEXT, CHAT)) + b"\r\n")
    assert [pair.origin[-1] for pair in read_pairs(path).pairs] == ["1", "2"]


def test_a_byte_order_mark_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(TEXT).encode() + b"\r\n\r\n{")
    with pytest.raises(PairsError, match="line 3"):
        read_pairs(path)
    pairs = read_pairs(path, skip_bad=True)
    assert pairs.pairs[0].side_1.text == "one" and pairs.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_rows_keep_the_places_they_come_from() -> None:
    rows: list[tuple[str, dict[str, object]]] = [
        ("rows, line 7", dict(TEXT)),
        ("rows, line 3", {"text_1": "x"}),
        ("rows, line 5", {"text_1": "a", "text_2": "\ud83d"}),
        ("rows, line 9", {"text_1": "a", "text_2": object()}),
        ("rows, line 2", {"text_1": "a", "text_2": float("nan")}),
    ]
    for row in rows[1:]:
        with pytest.raises(PairsError, match=row[0]):
            PairSet.from_rows("rows", [rows[0], row])
    pairs = PairSet.from_rows("rows", rows, skip_bad=True)
    assert [pair.origin for pair in pairs.pairs] == ["rows, line 7"]
    assert [text.split(":")[0] for text in pairs.skipped] == [place for place, _ in rows[1:]]


def test_the_first_few_are_named_as_such_and_the_rule_is_said(tmp_path: Path) -> None:
    pairs = read_pairs(write(tmp_path, TEXT, TEXT, TEXT), count="all")
    assert pairs.first(None) == pairs.first(3) == pairs.first(4) == pairs
    assert pairs.first(2).name == "pairs.jsonl, first 2 of 3" and len(pairs.first(2).pairs) == 2
    assert pairs.rule.endswith("else the whole text") and "last assistant" not in pairs.rule
    assert "last assistant message" in read_pairs(write(tmp_path, TEXT)).rule
    assert read_pairs(write(tmp_path, CHAT), count="user").rule.endswith("else all messages of role 'user'")


def test_pairs_of_one_cluster_come_together_where_the_first_of_them_stood(tmp_path: Path) -> None:
    given = ["a", None, 7, "b", "a", None, "7", "a"]
    lines = [TEXT | ({"cluster": name} if place else {"cluster": "a"}) for place, name in enumerate(given)]
    pairs = read_pairs(write(tmp_path, *lines))
    assert [pair.cluster for pair in pairs.pairs] == ["a", None, "7", "b", "a", None, "7", "a"]
    assert pairs.clusters() == (0, 1, 2, 3, 0, 5, 2, 0)
    grouped = pairs.grouped()
    assert [int(pair.origin[-1]) for pair in grouped.pairs] == [1, 5, 8, 2, 3, 7, 4, 6]
    assert grouped.clusters() == (0, 0, 0, 3, 4, 4, 6, 7) and grouped.grouped() == grouped
    # The first few are those of the file, whatever comes together.
    assert [int(pair.origin[-1]) for pair in pairs.first(5).grouped().pairs] == [1, 5, 2, 3, 4]
    assert (grouped.name, grouped.sha256, grouped.rule) == (pairs.name, pairs.sha256, pairs.rule)


def test_without_clusters_the_order_is_the_files_and_each_pair_its_own(tmp_path: Path) -> None:
    pairs = read_pairs(write(tmp_path, TEXT, CHAT, TEXT | {"cluster": None}, TEXT))
    assert pairs.grouped() == pairs and pairs.clusters() == (0, 1, 2, 3)


def test_pairs_made_in_python_hash_as_the_file_that_they_would_be(tmp_path: Path) -> None:
    made = PairSet.from_messages("pairs.jsonl", [(CHAT["messages_1"], CHAT["messages_2"])] * 2)
    line = json.dumps(CHAT, ensure_ascii=False).encode()
    assert made == read_pairs(write(tmp_path, line, line))


NEITHER = "messages_1 and messages_2, or text_1 and text_2"
BAD_LINES: list[tuple[object, str]] = [
    ({}, NEITHER),
    ({"text_1": "one"}, NEITHER),
    ({"text_1": "one", "messages_2": CHAT["messages_2"]}, NEITHER),
    (CHAT | TEXT, NEITHER),
    (TEXT | {"text_2": None}, NEITHER),
    (TEXT | {"target": "x"}, "target"),
    (TEXT | {"target_1": ""}, "target_1"),
    (TEXT | {"text_2": 3}, "text_2"),
    (CHAT | {"messages_1": "hello"}, "messages_1"),
    (CHAT | {"messages_1": [{"role": "user"}]}, r"messages_1\.0\.content"),
    (CHAT | {"messages_1": [{"role": "user", "content": None}]}, r"messages_1\.0\.content"),
    (CHAT | {"messages_1": [{"role": "", "content": "x"}]}, r"messages_1\.0\.role"),
    (CHAT | {"messages_1": [{"role": "user", "content": "x", "name": "y"}]}, r"messages_1\.0\.name"),
    *(([TEXT], ""), (b"{", ""), (b"not JSON", ""), (b"null", ""), (b"[" * 100_000, "")),
    *((b'{"text_1": "' + text + b'", "text_2": "x"}', "") for text in (b"\xff", b"\\ud83d")),
    (b'{"text_1": "a", "text_2": "b", "text_1": "c"}', "text_1 stands twice"),
    (b'{"text_1": NaN, "text_2": "b"}', "text_1"),
    *((TEXT | {"cluster": value}, "cluster") for value in ("", True, 1.5, [1])),
    (b'{"text_1": "a", "text_2": "b", "cluster": ' + b"9" * 5000 + b"}", ""),
    (b'{"text_1": "' + b"x" * (MAX_TEXT + 1) + b'", "text_2": "x"}', str(MAX_TEXT)),
    (TEXT | {"target_1": "o", "count_1": "all"}, "target_1 and count_1"),
    (TEXT | {"count_1": [0, 1, 2]}, r"\[start, stop\] of a text"),
    (CHAT | {"count_2": [0, 1]}, r"count_2 is .*\[message, start, stop\] of a chat"),
    *((TEXT | {"count_1": value}, "count_1") for value in ([0, -1], True)),
]


def test_a_bad_line_is_refused_by_file_line_and_field(tmp_path: Path) -> None:
    rows = [(line, PairsError, rf"(?s)^pairs\.jsonl, line 2: .*{words}") for line, words in BAD_LINES]
    assert not_refused(lambda line: read_pairs(write(tmp_path, TEXT, line, TEXT)), rows) == []


def test_a_file_without_pairs_and_no_file_are_refused_by_name(tmp_path: Path) -> None:
    for path in (write(tmp_path), write(tmp_path, b"", b"  ")):
        with pytest.raises(PairsError, match=r"pairs\.jsonl holds no pairs"):
            read_pairs(path)
    for path in (tmp_path / "missing.jsonl", tmp_path):
        with pytest.raises(PairsError, match="cannot read"):
            read_pairs(path)
    with pytest.raises(PairsError, match="empty holds no pairs"):
        PairSet.from_messages("empty", [])


def test_of_plain_text_everything_counts_but_the_special_token(tokenizer: Any) -> None:
    span = encode_side(Side(None, "one two", None), tokenizer, "here")
    assert span.token_ids[0] == 0 and (span.start, span.stop) == (1, len(span.token_ids)) == (1, 8)


def test_of_a_chat_the_last_assistant_message_counts(tokenizer: Any) -> None:
    side = chat(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four five"))
    assert counted(side, tokenizer) == "four five"
    span = encode_side(side, tokenizer, "here")
    assert 0 not in span.token_ids


def test_a_target_counts_where_it_stands_last(tokenizer: Any) -> None:
    assert encode_side(Side(None, "yes no yes no", "yes"), tokenizer, "here").start == 1 + len("yes no ")
    side = chat(("user", "say yes"), ("assistant", "yes, yes."), target="yes")
    text = rendered(side, tokenizer)
    span = encode_side(side, tokenizer, "here")
    before = tokenizer(text[: text.rindex("yes")], add_special_tokens=False)["input_ids"]
    assert (span.start, span.stop) == (len(before), len(before) + 3)


def test_a_token_that_merges_across_the_boundary_counts(tokenizer: Any) -> None:
    for text, target, covers in [
        ("x bx", "b", " b"),
        ("x bx", "x b", "x b"),
        ("xabx", "xa", "xab"),
        ("xabx", "bx", "abx"),
        ("xabx", "b", "ab"),
        ("xabx", "x", "x"),
    ]:
        assert counted(Side(None, text, target), tokenizer) == covers


def test_an_answer_that_repeats_its_question_is_found_in_the_answer(tokenizer: Any) -> None:
    side = chat(("user", "yes"), ("assistant", "yes"))
    span = encode_side(side, tokenizer, "here")
    assert tokenizer.convert_ids_to_tokens(span.token_ids[span.start - 1 : span.start]) == ["<|assistant|>"]


def test_an_answer_that_a_later_question_repeats_is_found_in_the_answer(tokenizer: Any) -> None:
    side = chat(("user", "one"), ("assistant", "yes"), ("user", "why yes?"))
    span = encode_side(side, tokenizer, "here")
    assert tokenizer.convert_ids_to_tokens(span.token_ids[span.start - 1 : span.start]) == ["<|assistant|>"]


def test_an_answer_that_the_template_repeats_is_found_in_the_answer(tokenizer: Any) -> None:
    for answer in ["end", "|", "d", "\n"]:
        span = encode_side(chat(("user", "one"), ("assistant", answer)), tokenizer, "here")
        tokens = tokenizer.convert_ids_to_tokens(span.token_ids[span.start - 1 : span.stop])
        assert tokens == ["<|assistant|>", *answer]


def test_many_sides_at_once_are_as_one_at_a_time(tokenizer: Any) -> None:
    sides = [
        chat(("user", "one"), ("assistant", "two")),
        Side(None, "yes no yes", "no"),
        Side(None, "one", "two"),
        Side(None, "", None),
        chat(("user", "yes"), ("assistant", "no no")),
    ]
    together = encode_sides([(side, f"line {n}") for n, side in enumerate(sides)], tokenizer)
    for n, side in enumerate(sides):
        if isinstance(together[n], TokenSpan):
            assert encode_side(side, tokenizer, f"line {n}") == together[n]
        else:
            with pytest.raises(PairsError, match=re.escape(str(together[n]))):
                encode_side(side, tokenizer, f"line {n}")
    assert [isinstance(each, TokenSpan) for each in together] == [True, True, False, False, True]
    assert encode_sides([], tokenizer) == []


def test_an_answer_that_the_template_changes_is_refused_rather_than_guessed(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = chat(("user", "one"), ("assistant", " two "))
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("m['content']", "m['content'] | upper"))
    with pytest.raises(PairsError, match="does not write the message ' two ' as it stands"):
        encode_side(side, tokenizer, "here")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("m['content']", "m['content'] | trim"))
    trimmed = encode_side(side, tokenizer, "here")
    plain = encode_side(chat(("user", "one"), ("assistant", "two")), tokenizer, "here")
    assert trimmed == plain


def test_an_answer_is_found_whatever_the_template_trims_or_leaves_out(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = chat(("user", "one"), ("assistant", "\n yes zq yes "))
    for change, covers in (
        (".lstrip('\\n')", " yes zq yes "),
        (".rstrip()", "\n yes zq yes"),
        (".strip()", "yes zq yes"),
        (".split('zq')[-1]", " yes "),
    ):
        monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("m['content']", f"m['content']{change}"))
        assert counted(side, tokenizer) == covers
        # The second `yes`; of it, and of what comes after, all templates write the same.
        placed = Side(side.messages, None, None, (1, 9, 12))
        assert counted(placed, tokenizer) == "yes"
        span = encode_side(placed, tokenizer, "here")
        assert span == encode_side(Side(side.messages, None, "yes"), tokenizer, "here")


def test_a_target_that_the_template_repeats_is_found_in_the_message(tokenizer: Any) -> None:
    for target in ["end", "|", "d", "\n", "|>"]:
        answer = f"no {target} no"
        side = chat(("user", "one"), ("assistant", answer), target=target)
        span = encode_side(side, tokenizer, "here")
        tokens = tokenizer.convert_ids_to_tokens(span.token_ids)
        assert "".join(tokens[span.start - 3 : span.stop + 3]) == answer


def test_a_target_that_only_the_template_writes_is_found_there(tokenizer: Any) -> None:
    side = chat(("user", "one"), ("assistant", "two"), target="two<|end|>")
    tokens = tokenizer.convert_ids_to_tokens(encode_side(side, tokenizer, "here").token_ids)
    assert counted(side, tokenizer) == "two<|end|>" and tokens[-2] == "<|end|>"


def test_a_target_that_no_message_has_a_part_of_is_refused(tokenizer: Any) -> None:
    for target in ["user", "<|end|>"]:
        side = chat(("user", "one"), ("assistant", "two"), target=target)
        with pytest.raises(PairsError, match="in no message, only in what the chat template adds"):
            encode_side(side, tokenizer, "here")


def test_a_target_whose_place_is_unsure_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("m['content']", "m['content'] | trim"))
    # The answer's own `yes ` loses its space; the question's must not be taken for it.
    side = chat(("user", "yes no"), ("assistant", "yes "), target="yes ")
    with pytest.raises(PairsError, match=r"here: the target 'yes ' is ambiguous.*use a longer target"):
        encode_side(side, tokenizer, "here")


MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "q yes"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "why yes?"},
    {"role": "assistant", "content": "a yes b"},
]


def test_what_counts_may_be_a_role_or_characters(tmp_path: Path, tokenizer: Any) -> None:
    for count, covers in [
        ("assistant", ["yes", "a yes b"]),
        ("user", ["q yes", "why yes?"]),
        ("system", ["be kind"]),
        ([4, 2, 5], ["yes"]),
        ([1, 0, 1], ["q"]),
        (None, ["a yes b"]),
    ]:
        pairs = read_pairs(write(tmp_path, {"messages_1": MESSAGES, "messages_2": MESSAGES, "count_1": count}))
        side = pairs.pairs[0].side_1
        span = encode_side(side, tokenizer, "here")
        tokens = tokenizer.convert_ids_to_tokens(span.token_ids)
        assert ["".join(tokens[start:stop]) for start, stop in span.ranges] == covers
        assert span.tokens == sum(stop - start for start, stop in span.ranges) and span.merged == 0


def test_all_counts_the_template_too_and_a_default_fills_what_is_not_said(tmp_path: Path, tokenizer: Any) -> None:
    path = write(tmp_path, CHAT | {"count_1": "assistant"}, {"text_1": "one", "text_2": "two", "target_1": "n"})
    one, two = read_pairs(path, count="all").pairs
    assert encode_side(one.side_2, tokenizer, "h").tokens == len(encode_side(one.side_2, tokenizer, "h").token_ids)
    assert encode_side(one.side_1, tokenizer, "h").tokens == 3
    assert encode_side(two.side_1, tokenizer, "h").tokens == 1


def test_characters_of_a_text_count_and_merged_tokens_are_reported(tmp_path: Path, tokenizer: Any) -> None:
    side = read_pairs(write(tmp_path, {"text_1": "xabx", "text_2": "x", "count_1": [2, 4]})).pairs[0].side_1
    assert counted(side, tokenizer) == "abx"
    assert encode_side(side, tokenizer, "here").merged == 1


def test_a_span_that_is_not_there_is_refused_by_the_pair(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[tuple[Side, str]] = [
        (Side(None, "one", "two"), "'two' is not in the rendered text 'one'"),
        (Side(None, "", None), "''"),
        (chat(("user", "one")), "no assistant message"),
        (chat(("user", "one"), ("assistant", "")), "''"),
        (chat(("user", "one"), ("assistant", "two"), target="three"), "'three' is not in"),
        *(
            (read_pairs(write(tmp_path, line)).pairs[0].side_1, words)
            for line, words in (
                (TEXT | {"count_1": [2, 9]}, "characters 2 to 9 of 'one', which has 3"),
                (TEXT | {"count_1": [2, 2]}, "characters 2 to 2"),
                (TEXT | {"count_1": "assistant"}, "plain text"),
                (CHAT | {"count_1": "system"}, "no message of role 'system'"),
                (CHAT | {"count_1": [2, 0, 1]}, "characters of message 2 count, but there are 2"),
            )
        ),
    ]
    refused = [(side, PairsError, rf"(?s)^here, side 2: .*{words}") for side, words in rows]
    assert not_refused(lambda side: encode_side(side, tokenizer, "here, side 2"), refused) == []


def test_characters_of_a_message_that_the_template_trims(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "  one two "}]
    line = {"messages_1": messages, "messages_2": messages, "count_1": [0, 6, 9], "count_2": [0, 0, 2]}
    pair = read_pairs(write(tmp_path, line)).pairs[0]
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE.replace("m['content']", "m['content'] | trim"))
    span = encode_side(pair.side_1, tokenizer, "here")
    assert tokenizer.convert_ids_to_tokens(span.token_ids)[span.start : span.stop] == list("two")
    with pytest.raises(PairsError, match="leaves out the counted characters"):
        encode_side(pair.side_2, tokenizer, "here")


def test_a_model_without_a_template_and_a_template_without_the_role(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = chat(("user", "one"), ("assistant", "yes"))
    monkeypatch.setattr(tokenizer, "chat_template", None)
    tokenizer.add_tokens(["U", "A"])
    span = encode_side(side, tokenizer, "here")
    assert tokenizer.convert_ids_to_tokens(span.token_ids[:1]) == ["<bos>"]
    assert tokenizer.convert_ids_to_tokens(span.token_ids[span.start : span.stop]) == list("yes")
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system role here') }}")
    with pytest.raises(PairsError, match=r"here: .*refuses the roles \['user', 'assistant'\]: no system role"):
        encode_side(side, tokenizer, "here")


def test_bad_lines_are_skipped_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT, b"{", TEXT, {"text_1": "x"})
    with pytest.raises(PairsError, match="line 2"):
        read_pairs(path)
    pairs = read_pairs(path, skip_bad=True)
    assert len(pairs.pairs) == 2 and [text.split(":")[0] for text in pairs.skipped] == [
        "pairs.jsonl, line 2", "pairs.jsonl, line 4"
    ]  # fmt: skip
    with pytest.raises(PairsError, match=r"holds no pairs; the first bad one: pairs.jsonl, line 1"):
        read_pairs(write(tmp_path, b"{"), skip_bad=True)


def test_balanced_spans_keep_the_beginning_of_both() -> None:
    one, two = TokenSpan(tuple(range(20)), ((2, 4), (6, 9))), TokenSpan(tuple(range(9)), ((1, 4),))
    short, same = balanced(one, two)
    assert short.ranges == ((2, 4), (6, 7)) and same == two and short.token_ids == one.token_ids
    assert balanced(two, one)[1].tokens == 3
