"""Recipes of the paper, on small files with the columns of the public data sets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expert_registry.errors import UsageError
from vllm_steermoe_plugin.detection.datasets import pairs_from_hub
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.engine_client import COUNT_GROUPS
from vllm_steermoe_plugin.detection.loop import DetectionOptions
from vllm_steermoe_plugin.detection.pairs import PairsError
from vllm_steermoe_plugin.detection.recipes.lookup import find_recipe
from vllm_steermoe_plugin.detection.recipes.recipe import PairSampling
from vllm_steermoe_plugin.detection.rows import DataError
from vllm_steermoe_plugin.models import lab_checkpoint

MODEL = "allenai/OLMoE-1B-7B-0125-Instruct"
SQUAD = [
    {
        "id": str(i),
        "title": "Lantern",
        "context": f"The lantern {i} is red. It was asked: what colour is lantern {i}? ",
        "question": f" what colour is lantern {i}?",
        "answers": {"text": ["red"], "answer_start": [14]},
    }
    for i in range(40)
]
BEAVERTAILS = [
    {
        "prompt": f"unkind request {i // 2}",
        "response": f"answer {i}",
        "category": {"abuse": True},
        "is_safe": i % 5 == 0,
    }
    for i in range(60)
]


def write(folder: Path, rows: list[Any], *, lines: bool = True) -> Path:
    path = folder / "rows.json"
    path.write_text("\n".join(json.dumps(row) for row in rows) if lines else json.dumps(rows))
    return path


@pytest.mark.parametrize("lines", [True, False])
def test_faithfulness_has_the_document_on_side_one_and_counts_the_question(tmp_path: Path, lines: bool) -> None:
    recipe = find_recipe("faithfulness", MODEL, PairSampling(data_file=write(tmp_path, SQUAD, lines=lines)))
    assert len(recipe.pairs.pairs) == 40 and not recipe.balance
    assert (recipe.behaviour.recommended.activate, recipe.behaviour.recommended.deactivate) == (0, 50)
    for pair in recipe.pairs.pairs:
        assert pair.side_1.messages and pair.side_2.messages
        one, two = pair.side_1.messages[0].content, pair.side_2.messages[0].content
        assert one.startswith("Document: The lantern") and one.endswith(two) and two.startswith("Question: what")
        assert pair.side_1.target == pair.side_2.target == two.removeprefix("Question: ")


def test_questions_about_one_document_are_one_cluster(tmp_path: Path) -> None:
    rows = [{**row, "context": SQUAD[i // 3]["context"] + " " * (i % 2)} for i, row in enumerate(SQUAD)]
    recipe = find_recipe("faithfulness", MODEL, PairSampling(data_file=write(tmp_path, rows), limit=30, seed=3))
    documents: dict[str, set[str | None]] = {}
    for pair in recipe.pairs.pairs:
        assert pair.side_1.messages
        document, _, _ = pair.side_1.messages[0].content.partition(" Question: ")
        documents.setdefault(document, set()).add(pair.cluster)
    clusters = [mine for (mine,) in documents.values()]
    assert None not in clusters and len(set(clusters)) == len(clusters) > 10
    # Limit and seed still draw questions, not documents: as many documents as may be, and none preferred.
    assert [pair.origin for pair in recipe.pairs.pairs] == [
        pair.origin
        for pair in find_recipe(
            "faithfulness", MODEL, PairSampling(data_file=write(tmp_path, SQUAD), limit=30, seed=3)
        ).pairs.pairs
    ]
    assert all(pair.cluster is None for pair in find_recipe("digits", MODEL).pairs.pairs)


def test_safety_takes_each_unsafe_prompt_once_and_varies_the_refusals(tmp_path: Path) -> None:
    recipe = find_recipe("safety", MODEL, PairSampling(data_file=write(tmp_path, BEAVERTAILS)))
    chats = [(pair.side_1.messages, pair.side_2.messages) for pair in recipe.pairs.pairs]
    asked = Counter(one[0].content for one, _ in chats if one)
    assert set(asked.values()) == {1} and len(asked) == 30
    refusals = {one[1].content for one, _ in chats if one}
    assert len(refusals) > 25, "hardly one is said twice"
    unsafe = {row["response"] for row in BEAVERTAILS if not row["is_safe"]}
    assert all(two and two[1].content in unsafe and one and one[0] == two[0] for one, two in chats)
    assert recipe.balance and recipe.behaviour.safety


def test_digits_needs_nothing() -> None:
    recipe = find_recipe("digits", MODEL)
    assert len(recipe.pairs.pairs) > 800
    chats = [(pair.side_1.messages or (), pair.side_2.messages or ()) for pair in recipe.pairs.pairs]
    answers = [(one[1].content, two[1].content) for one, two in chats]
    assert all(not any(c.isalpha() for c in one) and not any(c.isdigit() for c in two) for one, two in answers)
    assert "crossed" in find_recipe("digits", MODEL).behaviour.note
    with pytest.raises(DataError, match="takes no --data-file"):
        find_recipe("digits", MODEL, PairSampling(data_file=Path("rows")))


def test_the_seed_draws_and_the_limit_cuts(tmp_path: Path) -> None:
    path = write(tmp_path, SQUAD)
    one, same, other = (
        find_recipe("faithfulness", MODEL, PairSampling(seed=s, limit=7, data_file=path)) for s in (1, 1, 2)
    )
    assert one.pairs == same.pairs and len(one.pairs.pairs) == 7
    assert one.pairs.sha256 != other.pairs.sha256


@pytest.mark.parametrize("name", ["faithfulness", "safety"])
def test_without_the_network_the_way_out_is_named(name: str) -> None:
    with pytest.raises(DataError, match=r"cannot load .*--data-file FILE: JSON lines with the columns"):
        find_recipe(name, MODEL)


@pytest.mark.parametrize(
    ("rows", "names"),
    [
        ([], "has no rows"),
        ([{"context": "c"}], "line 1 has no question"),
        ([SQUAD[0], {"context": "c", "question": 3}], "line 2: question must be text, got 3"),
        ([SQUAD[0], ["c"]], r"line 2: a row is an object or a text, got \['c'\]"),
        (
            [SQUAD[0], {"passage": "c", "query": "q"}],
            "line 2 has no context, question, only passage, query",
        ),
        ([{"context": "c", "question": "half \ud83d"}], "line 1: question holds half a character"),
    ],
)
def test_rows_that_are_not_as_expected_are_named(rows: list[Any], names: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=names):
        find_recipe("faithfulness", MODEL, PairSampling(data_file=write(tmp_path, rows)))


def test_unsafe_rows_that_are_not_as_expected_are_named(tmp_path: Path) -> None:
    for change, names in (
        ({"prompt": ["p"]}, r"line 2: prompt must be text, got \['p'\]"),
        ({"prompt": None}, "line 2: prompt must be text, got None"),
        ({"is_safe": "False"}, "line 2: is_safe must be true or false, got 'False'"),
        ({"response": 3}, "line 2: response must be text, got 3"),
    ):
        rows = [BEAVERTAILS[1], {**BEAVERTAILS[3], **change}]
        with pytest.raises(DataError, match=names):
            find_recipe("safety", MODEL, PairSampling(data_file=write(tmp_path, rows)))


def test_pairs_name_the_row_that_they_were_made_of(tmp_path: Path) -> None:
    pairs = find_recipe("faithfulness", MODEL, PairSampling(data_file=write(tmp_path, SQUAD), seed=3)).pairs
    for pair in pairs.pairs:
        assert pair.side_1.target is not None
        line = int(pair.origin.removeprefix("rows.json, line "))
        assert pair.side_1.target == str(SQUAD[line - 1]["question"]).strip()
    assert len({pair.origin for pair in pairs.pairs}) == 40


def test_a_file_from_another_system_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for text in ("\r\n".join(json.dumps(row) for row in SQUAD) + "\r\n", json.dumps(SQUAD)):
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(find_recipe("faithfulness", MODEL, PairSampling(data_file=path)).pairs.pairs) == 40


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        find_recipe("faithfulness", MODEL, PairSampling(data_file=tmp_path / "none"))
    path = tmp_path / "rows"
    path.write_bytes(b'{"a": 1}\n{')
    with pytest.raises(DataError, match="line 1 has no"):
        find_recipe("safety", MODEL, PairSampling(data_file=path))
    safe = write(tmp_path, [BEAVERTAILS[0]])
    with pytest.raises(DataError, match="no row that makes a pair"):
        find_recipe("safety", MODEL, PairSampling(data_file=safe))


def test_rows_that_make_no_pair_are_skipped_only_when_asked(tmp_path: Path) -> None:
    rows = [*SQUAD[:2], {**SQUAD[2], "question": "  "}, *SQUAD[3:]]
    path = write(tmp_path, rows)
    with pytest.raises(DataError, match="line 3: question must be text"):
        find_recipe("faithfulness", MODEL, PairSampling(data_file=path))
    pairs = find_recipe("faithfulness", MODEL, PairSampling(data_file=path, skip_bad=True)).pairs
    assert len(pairs.pairs) == len(SQUAD) - 1 and len(pairs.skipped) == 1 and "line 3" in pairs.skipped[0]
    nothing = write(tmp_path, [{**SQUAD[0], "question": ""}])
    with pytest.raises(DataError, match=r"no row that makes a pair; the first: .*line 1"):
        find_recipe("faithfulness", MODEL, PairSampling(data_file=nothing, skip_bad=True))


def test_an_unknown_recipe_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'safety'.*digits, faithfulness, refusal, safety"):
        find_recipe("safty", MODEL)
    assert find_recipe("refusal", lab_checkpoint.NAME, PairSampling(limit=3)).pairs.name.startswith(lab_checkpoint.NAME)


@pytest.mark.parametrize(("name", "rows"), [("faithfulness", SQUAD), ("safety", BEAVERTAILS)])
def test_the_engine_counts_them(name: str, rows: list[Any], engines: Callable[..., Any], tmp_path: Path) -> None:
    engine = engines(lab_checkpoint.NAME, {"count_groups": COUNT_GROUPS}, enable_prefix_caching=False, dtype="float32")
    recipe = find_recipe(name, "another/model", PairSampling(data_file=write(tmp_path, rows), limit=10))
    options = DetectionOptions(balance=recipe.balance, permutations=9)
    ranking = detect(engine, lab_checkpoint.NAME, recipe.pairs, recipe.behaviour, options=options)
    assert ranking.counts.tokens[0] == ranking.counts.tokens[1] > 10


def test_a_data_set_with_the_columns_of_pairs_is_read(tmp_path: Path) -> None:
    """A folder is a data set too, so this needs no network."""
    folder = tmp_path / "made"
    folder.mkdir()
    rows: list[dict[str, Any]] = [
        {"text_1": "one", "text_2": "two", "target_1": None, "id": 7},
        {"text_1": "three", "text_2": "four", "target_1": "ee"},
        {"text_1": None, "text_2": "five", "target_1": None},
    ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pairs = pairs_from_hub(str(folder), skip_bad=True)
    assert [(pair.side_1.text, pair.side_1.target) for pair in pairs.pairs] == [("one", None), ("three", "ee")]
    assert len(pairs.skipped) == 1 and "made, row 2:" in pairs.skipped[0]
    with pytest.raises(PairsError, match=r"made, row 2: .*a pair has"):
        pairs_from_hub(str(folder))
    chat = [{"role": "user", "content": "q", "name": None}, {"role": "assistant", "content": "a", "name": None}]
    (folder / "train.jsonl").write_text(json.dumps({"messages_1": chat, "messages_2": chat[:1] + chat}))
    assert pairs_from_hub(str(folder)).pairs[0].side_1.messages is not None
    (folder / "train.jsonl").write_text(json.dumps({"text_1": "a", "text_2": "b", "cluster": 3}))
    assert pairs_from_hub(str(folder)).pairs[0].cluster == "3"
    (folder / "train.jsonl").write_text(json.dumps({"chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError, match=r"row 0 has the columns chosen, rejected; pairs have some of messages_1"):
        pairs_from_hub(str(folder))
    (folder / "train.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"cannot load .*--pairs FILE"):
        pairs_from_hub(str(folder))
    with pytest.raises(DataError, match=r"cannot load nobody/nothing, split test: .*--pairs FILE"):
        pairs_from_hub("nobody/nothing:test")
