"""Which tokens count, with tokenizers of the kinds that models have, trained here on a few words.

The reference does not look at offsets: it spells each token out in bytes and lays them along the text.
"""

from __future__ import annotations

import itertools
import random
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import ByteLevel as TrimOffsets
from tokenizers.processors import Sequence, TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from vllm_steermoe_plugin.detection.pairs import ChatMessage, PairsError, Side
from vllm_steermoe_plugin.detection.token_spans import TokenSpan, encode_side

CORPUS = [
    "the cat sat on the mat, the cat said yes",
    "yes no yes it is   no\n\n no",
    "  say yes:\n  no",
    "שלום עולם, שלום",
    "こんにちは世界 日本語 日本",
    "café naïve cafe\u0301 über",
    "👍 ok 👩\u200d👩\u200d👧 ok 🎉",
] * 10
TEXTS = [
    "the cat sat on  the mat",
    " yes  no\n\n it   is:\n  no ",
    "שלום עולם, כן שלום",
    "日本語 世界 こんにちは語",
    "café cafe\u0301 nai\u0308ve übe\u0308r x",
    "ok 👩\u200d👩\u200d👧👍🎉 👩\u200d👧 ok",
    "a שלום日本 cafe\u0301👍 yes",
]
SPECIAL = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def _trained(made: Tokenizer, alphabet: list[str], *, fallback: bool = False) -> PreTrainedTokenizerFast:
    special = [*SPECIAL, *(BYTES if fallback else ())]
    # Of a vocabulary with byte fallback, Japanese letters and emoji are partly bytes.
    corpus = [text for text in CORPUS if not fallback or text.isascii() or "שלום" in text or "cafe" in text]
    trainer = BpeTrainer(vocab_size=470, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    made.train_from_iterator(corpus, trainer)
    start = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own = made.post_processor
    made.post_processor = start if own is None else Sequence([own, start])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    return fast


def byte_level(*, trim: bool, prefix: bool = False, nfc: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, OLMoE (which trim offsets), Qwen (which composes accents)."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = ByteLevel(add_prefix_space=prefix)
    if nfc:
        made.normalizer = normalizers.NFC()
        split = Regex(r"\p{N}|[^\s\p{L}\p{N}]+| ?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+")
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(split, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    made.decoder = decoders.ByteLevel()
    made.post_processor = TrimOffsets(trim_offsets=trim, add_prefix_space=prefix)
    return _trained(made, ByteLevel.alphabet())


def sentence_piece(scheme: str) -> PreTrainedTokenizerFast:
    """As SentencePiece's models are converted nowadays."""
    made = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = Metaspace(prepend_scheme=scheme)
    return _trained(made, [], fallback=True)


def prepended() -> PreTrainedTokenizerFast:
    """As Llama 2, Mixtral and Phi-3.5: words are not split, so that tokens reach over spaces."""
    made = Tokenizer(BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _trained(made, [], fallback=True)


MAKERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte level": lambda: byte_level(trim=False),
    "byte level, trimmed": lambda: byte_level(trim=True),
    "byte level, trimmed, prefix": lambda: byte_level(trim=True, prefix=True),
    "byte level, composed": lambda: byte_level(trim=False, nfc=True),
    "metaspace always": lambda: sentence_piece("always"),
    "metaspace first": lambda: sentence_piece("first"),
    "metaspace never": lambda: sentence_piece("never"),
    "prepended": prepended,
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {name: make() for name, make in MAKERS.items()}


# --- the reference ----------------------------------------------------------------------------------------------


def _byte_names() -> dict[str, int]:
    """GPT-2's names of the bytes: those that print are themselves, the others follow from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


BYTE_NAMES = _byte_names()


def spelled(token: str, name: str) -> bytes:
    if name.startswith("byte level"):
        return bytes(BYTE_NAMES[character] for character in token)
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def places_of_bytes(text: str, composed: bool) -> list[tuple[int, int]]:
    """For each byte of the text as the model reads it, the character of the text that it comes from."""
    places = []
    start = 0
    for cluster in re.findall(r"(?s).[\u0300-\u036f]*" if composed else r"(?s).", text):
        # A composed character comes from its letter; the accent is gone.
        for i, character in enumerate(unicodedata.normalize("NFC", cluster) if composed else cluster):
            places += [(start + i, start + i + 1)] * len(character.encode())
        start += len(cluster)
    return places


PREFIX = (-1, -1)
"""Place of a token that only spells a space that stands before the text for the model alone."""


def reached(text: str, tokens: list[str], name: str) -> list[tuple[int, int] | None]:
    """The characters that each token spells; None for special tokens."""
    read = unicodedata.normalize("NFC", text) if "composed" in name else text
    pieces = [b"" if token in SPECIAL else spelled(token, name) for token in tokens]
    whole = b"".join(pieces)
    prefix = len(whole) - len(read.encode())
    assert prefix in (0, 1) and whole == b" " * prefix + read.encode(), (whole, read)
    places = [PREFIX] * prefix + places_of_bytes(text, "composed" in name)
    found: list[tuple[int, int] | None] = []
    at = 0
    for piece in pieces:
        mine = [place for place in places[at : at + len(piece)] if place != PREFIX]
        found.append((mine[0][0], mine[-1][1]) if mine else PREFIX if piece else None)
        at += len(piece)
    return found


def check_span(found: TokenSpan, text: str, span: tuple[int, int], places: list[tuple[int, int] | None]) -> list[int]:
    """Positions of tokens that have characters in the span and do not count: none but for spaces at their ends."""
    start, stop = span
    counted = {place: places[place] for place in range(found.start, found.stop)}
    # A prefix is part of the first word, if tokenizers say so.
    spelling = [at for at in counted.values() if at != PREFIX]
    assert spelling and all(at is not None and at[0] < stop and at[1] > start for at in spelling), (span, counted)
    edges = [at for at in (counted[found.start], counted[found.stop - 1]) if at is not None and at != PREFIX]
    assert found.merged == (edges[0][0] < start) + (edges[-1][1] > stop), (span, edges)
    return [
        place
        for place, at in enumerate(places)
        if at is not None and at[0] < stop and at[1] > start and place not in counted
    ]


def all_spans(text: str) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(len(text) + 1), 2))


# --- plain text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_token_counts_if_one_of_its_characters_does(name: str, tokenizers: dict[str, Any]) -> None:
    """For every span of every text."""
    tokenizer = tokenizers[name]
    merged = left_out = 0
    for text in TEXTS:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        places = reached(text, tokens, name)
        for start, stop in all_spans(text):
            if not any(at is not None and at[0] < stop and at[1] > start for at in places):
                assert "composed" in name and all(unicodedata.combining(c) for c in text[start:stop])
                with pytest.raises(PairsError, match="holds no token"):
                    encode_side(Side(None, text, None, (start, stop)), tokenizer, "here")
                continue
            found = encode_side(Side(None, text, None, (start, stop)), tokenizer, "here")
            assert tokenizer.convert_ids_to_tokens(found.token_ids) == tokens
            for place in check_span(found, text, (start, stop), places):
                low, high = places[place] or PREFIX
                assert text[max(low, start) : min(high, stop)].strip(" ") == "", (text, start, stop, tokens[place])
                left_out += 1
            merged += found.merged
    assert merged > 0
    # Offsets that leave out the spaces of tokens: then spaces at the edge of a span do not make those count.
    assert (left_out > 0) == ("trimmed" in name)


@pytest.mark.parametrize("name", [name for name in MAKERS if "byte" in name])
def test_trimmed_offsets_report_what_reaches_over_an_edge_and_find_spaces(
    name: str, tokenizers: dict[str, Any]
) -> None:
    text = "the cat sat on  the mat"

    def tokens(target: str) -> tuple[list[str], int]:
        found = encode_side(Side(None, text, target), tokenizers[name], "here")
        return tokenizers[name].convert_ids_to_tokens(found.token_ids[found.start : found.stop]), found.merged

    assert tokens("cat") == (["Ġcat"], 1)
    assert tokens(" cat") == (["Ġcat"], 0)
    assert tokens("  ") == ((["Ġ"], 0) if "trimmed" in name else (["Ġ", "Ġthe"], 1))
    assert tokens(" ") == (["Ġmat"], 1)
    with pytest.raises(PairsError, match="not in the rendered text"):
        tokens("   ")


def test_offsets_are_trimmed_where_the_name_says_so(tokenizers: dict[str, Any]) -> None:
    """What the tests above rest on."""
    for name, tokenizer in tokenizers.items():
        offsets = tokenizer("the cat", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert ((3, 7) not in offsets and (4, 7) in offsets) == ("trimmed" in name), (name, offsets)


# --- chats ------------------------------------------------------------------------------------------------------

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set first = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set first = 'You are kind. Say yes.' %}{% endif %}"
    "<|im_start|>system\n{{ first | trim }}<|im_end|>\n"
    "{% for m in rest %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
)
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content and loop.index0 < ns.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "system": SYSTEM, "thinking": THINKING, "instruct": INSTRUCT}
CONTENTS = [
    "yes",
    "the cat sat",
    "שלום עולם",
    "日本語 yes",
    "cafe\u0301 café",
    "👩\u200d👩\u200d👧 ok",
    "assistant",
    "Say yes.",
]


def chat(*messages: tuple[str, str], **more: Any) -> Side:
    return Side(tuple(ChatMessage(role=role, content=content) for role, content in messages), None, **more)


def covered(found: TokenSpan, tokenizer: Any, side: Side) -> list[str]:
    """The text of each counted range, by the encoding's own offsets."""
    text = tokenizer.apply_chat_template([m.model_dump() for m in side.messages or ()], tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert tuple(encoded["input_ids"]) == found.token_ids
    places = encoded["offset_mapping"]
    return [text[places[start][0] : places[stop - 1][1]] for start, stop in found.ranges]


@pytest.mark.parametrize("name", MAKERS)
def test_the_answers_are_found_in_every_template(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    chance = random.Random(name)
    for template, _ in itertools.product(TEMPLATES, range(12)):
        tokenizer.chat_template = TEMPLATES[template]
        one, first, two, last = (chance.choice(CONTENTS) for _ in range(4))
        turns = [("user", one), ("assistant", first), ("user", two), ("assistant", last)]
        if template != "instruct":
            turns.insert(0, ("system", chance.choice(CONTENTS)))
        for count, wanted in (("assistant", [first, last]), ("user", [one, two]), (None, [last])):
            side = chat(*turns, count=count)
            found = encode_side(side, tokenizer, "here")
            parts = covered(found, tokenizer, side)
            assert len(parts) == len(wanted), (parts, wanted)
            for part, content in zip(parts, wanted, strict=True):
                # What is more must belong to tokens that are reported.
                assert content in part and len(part) <= len(content) + 4, (part, content)
                assert part == content or found.merged, (part, content)


def test_thoughts_that_the_template_leaves_out_do_not_count(tokenizers: dict[str, Any]) -> None:
    thought, answer, last = "<think>\nthe cat שלום\n</think>\n\n", "it is no", "<think>\nyes\n</think>\n\n日本語 👍"
    turns = [("user", "yes?"), ("assistant", thought + answer), ("user", "no?"), ("assistant", last)]
    side, reasons = chat(*turns, count="assistant"), chat(*turns, target="yes\n</think>")
    for tokenizer in tokenizers.values():
        tokenizer.chat_template = THINKING
        found = encode_side(side, tokenizer, "here")
        assert [part.strip() for part in covered(found, tokenizer, side)] == [answer, last]
        with pytest.raises(PairsError, match="is not in the rendered text"):
            encode_side(chat(*turns, target="the cat שלום"), tokenizer, "here")
        found = encode_side(reasons, tokenizer, "here")
        assert "yes\n</think>" in covered(found, tokenizer, reasons)[0]


def test_a_system_prompt_of_the_templates_own_is_not_the_answer(tokenizers: dict[str, Any]) -> None:
    side = chat(("user", "ok?"), ("assistant", "Say yes."))
    for tokenizer in tokenizers.values():
        tokenizer.chat_template = SYSTEM
        text = tokenizer.apply_chat_template([m.model_dump() for m in side.messages or ()], tokenize=False)
        assert text.count("Say yes.") == 2
        found = encode_side(side, tokenizer, "here")
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert encoded[found.start][0] >= text.rindex("Say yes.") - 1
