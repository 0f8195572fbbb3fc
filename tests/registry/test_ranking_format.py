"""Ranking files: round trip, atomic writing, and files that are damaged or hostile."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from expert_registry import Ranking, RoutingCounts
from expert_registry.clusters import OPTIONAL_AXES, SUMMARY_AXES
from expert_registry.errors import FileError, RankingFormatError
from expert_registry.format import (
    CARD_KEY,
    MAX_BYTES,
    MAX_CARD_BYTES,
    content_hash,
    dump_ranking,
    parse_ranking,
    read_card,
    read_ranking,
    write_ranking,
)
from tests.support.made_rankings import make_ranking
from tests.support.refusals import not_refused

TENSORS = ("activations_1", "activations_2", "tokens", "layers")


def same(a: Ranking, b: Ranking) -> bool:
    return a.card == b.card and all(np.array_equal(getattr(a.counts, n), getattr(b.counts, n)) for n in TENSORS)


def tensors_of(ranking: Ranking) -> dict[str, np.ndarray]:
    return {name: np.array(getattr(ranking.counts, name)) for name in TENSORS}


def raw_file(header: object, body: bytes = b"") -> bytes:
    """Bytes of a safetensors file with any header; no header of its own if it is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def card_of(ranking: Ranking, **changes: Any) -> str:
    return json.dumps(ranking.card.model_dump(mode="json") | changes)


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_bytes_make_the_round_trip(seed: int, experts: int, top_k: int, layers: int) -> None:
    ranking = make_ranking(seed, experts=experts, top_k=min(top_k, experts), layers=tuple(range(1, 2 * layers, 2)))
    data = dump_ranking(ranking)
    again = parse_ranking(data, "it")
    assert same(again, ranking) and again.shape == ranking.shape
    assert dump_ranking(again) == data
    assert dump_ranking(make_ranking(seed + 1)) != data
    assert again.experts() == ranking.experts()


def test_equal_rankings_give_equal_bytes() -> None:
    one = make_ranking(tools={"vllm": "0.32.0", "torch": "2.9"})
    two = make_ranking(tools={"torch": "2.9", "vllm": "0.32.0"})
    assert same(one, two)
    assert content_hash(dump_ranking(one)) == content_hash(dump_ranking(two))


def test_a_card_is_read_without_the_tensors(tmp_path: Path) -> None:
    ranking = make_ranking(note="é" * 100)
    path = tmp_path / "v1.safetensors"
    data = dump_ranking(ranking)
    path.write_bytes(data[: 8 + struct.unpack("<Q", data[:8])[0]])
    assert read_card(path) == ranking.card


def test_a_ranking_is_written_whole_and_readable_by_all_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "v1.safetensors"
    write_ranking(make_ranking(), path)
    assert same(read_ranking(path), make_ranking())
    assert [p.name for p in path.parent.iterdir()] == ["v1.safetensors"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_written_ranking_is_immutable_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "v1.safetensors"
    write_ranking(make_ranking(1), path)
    with pytest.raises(RankingFormatError, match=r"v1\.safetensors exists.*new version"):
        write_ranking(make_ranking(2), path)
    assert same(read_ranking(path), make_ranking(1))
    write_ranking(make_ranking(2), path, overwrite=True)
    assert same(read_ranking(path), make_ranking(2))
    assert [p.name for p in tmp_path.iterdir()] == ["v1.safetensors"]


def test_a_writer_that_dies_leaves_neither_file_nor_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    for overwrite in (False, True):
        with pytest.raises(FileError, match="no space"):
            write_ranking(make_ranking(), tmp_path / "v1.safetensors", overwrite=overwrite)
        assert list(tmp_path.iterdir()) == []


def test_impossible_counts_are_not_written(tmp_path: Path) -> None:
    ranking = make_ranking()
    ranking.counts.activations_1[0, 0] += 1
    with pytest.raises(RankingFormatError, match="layer 0"):
        write_ranking(ranking, tmp_path / "v1.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_counts_that_are_no_integers_are_not_written_as_a_file_that_cannot_be_read() -> None:
    tensors = tensors_of(make_ranking(experts=2, top_k=1, layers=(0,)))
    halves = tensors["activations_1"].astype(np.float64) + np.array([[0.5, -0.5]])
    broken = RoutingCounts(halves, tensors["activations_2"], tensors["tokens"], tensors["layers"])  # type: ignore[arg-type]
    with pytest.raises(RankingFormatError):
        dump_ranking(Ranking(broken, make_ranking(experts=2, top_k=1, layers=(0,)).card))


WHOLE = dump_ranking(make_ranking())
BODY = 8 + struct.unpack("<Q", WHOLE[:8])[0]
DAMAGE = {
    "cut": lambda data, at, more: data[:at],
    "one byte": lambda data, at, more: data[:at] + bytes([data[at] ^ more[0]]) + data[at + 1 :],
    "other bytes": lambda data, at, more: data[:at] + more + data[at + len(more) :],
    "more bytes": lambda data, at, more: data[:at] + more + data[at:],
    "fewer bytes": lambda data, at, more: data[:at] + data[at + len(more) :],
}


@given(
    how=st.sampled_from(sorted(DAMAGE)),
    at=st.integers(0, BODY - 1) | st.integers(0, len(WHOLE) - 1),
    more=st.binary(min_size=1, max_size=4),
)
@example(how="cut", at=0, more=b"")
@example(how="cut", at=7, more=b"")
@example(how="cut", at=BODY, more=b"")
@example(how="cut", at=len(WHOLE) - 1, more=b"")
@example(how="more bytes", at=len(WHOLE), more=b"\0")
@settings(max_examples=1000, deadline=None)
def test_a_damaged_file_is_refused_by_name_or_is_a_valid_ranking_of_the_same_counts(
    how: str, at: int, more: bytes
) -> None:
    data = DAMAGE[how](WHOLE, at, more)
    try:
        ranking = parse_ranking(data, "it")
    except RankingFormatError as error:
        assert "it" in str(error)
        return
    # The words of a card and the numbers of its layers have no check; the counts are those that were written.
    assert how != "cut" and (at < BODY or len(data) == len(WHOLE))
    ranking.counts.check(ranking.shape)
    for name in ("activations_1", "activations_2", "tokens"):
        assert np.array_equal(getattr(ranking.counts, name), getattr(make_ranking().counts, name))
    assert same(parse_ranking(dump_ranking(ranking), "again"), ranking)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_ranking_are_refused(data: bytes) -> None:
    for candidate in (data, struct.pack("<Q", len(data)) + data):
        with pytest.raises(RankingFormatError):
            parse_ranking(candidate, "random")


def test_a_hostile_header_length_is_refused_without_reading_so_far(tmp_path: Path) -> None:
    path = tmp_path / "v1.safetensors"
    for length in (MAX_CARD_BYTES + 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + WHOLE[8:])
        for read in (read_card, read_ranking):
            with pytest.raises(RankingFormatError, match="header"):
                read(path)


NO_CARD: tuple[object, ...] = (
    *(b"", b"{", b"\xff\xfe", b"[]", b"null", b'"__metadata__"', b"[" * 60_000, b'{"x":' * 10_000, {}),
    b'{"__metadata__": ' + b"9" * 5000 + b"}",
    *({"__metadata__": value} for value in (None, [], "steermoe", {"other": "{}"})),
    *({"__metadata__": {CARD_KEY: card}} for card in (None, 3, {"a": 1}, "", "null", "\ud800", "[" * 50_000)),
)


def test_a_header_without_a_card_is_refused(tmp_path: Path) -> None:
    def read(header: object) -> None:
        (tmp_path / "v1.safetensors").write_bytes(raw_file(header))
        with pytest.raises(RankingFormatError, match="v1"):
            read_card(tmp_path / "v1.safetensors")
        read_ranking(tmp_path / "v1.safetensors")

    assert not_refused(read, ((header, RankingFormatError, "v1") for header in NO_CARD)) == []


WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    *(({"format_version": value}, "format.version") for value in (2, 3, "1")),
    *(({"num_experts": value}, "num_experts") for value in (0, 5000, True, 6.0)),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 7}, "top-k 7"),
    *(({"behaviour": value}, "behaviour") for value in ("Digits", "../digits", "digits\n")),
    ({"version": 0}, "version"),
    *(({"sides": value}, "sides") for value in (["one"], "one")),
    ({"model": {"id": "../x", "architecture": "A"}}, r"model\.id"),
    ({"model": {"id": "x", "architecture": "A", "more": 1}}, r"model\.more"),
    ({"data": {"name": "x", "sha256": "zz"}}, r"data\.sha256"),
    ({"recommended": {"activate": -1, "deactivate": 0}}, r"recommended\.activate"),
    ({"recommended": None}, "recommended"),
    ({"tools": {str(i): "" for i in range(33)}}, "tools"),
    ({"created": "yesterday"}, "created"),
    ({"safety": 1}, "safety"),
    ({"note": "x" * 4001}, "note"),
    ({"surprise": 1}, "surprise"),
    ({"sides": ["\x1b[2J\x1b]0;title\x07", "b"]}, r"sides\.0.*U\+001B"),
    ({"note": "two\nlines"}, r"note.*U\+000A"),
    ({"span": "\x00"}, r"span.*U\+0000"),
    ({"license": "\x9b31m"}, r"license.*U\+009B"),
    ({"data": {"name": "\u202efdp.exe"}}, r"data\.name.*U\+202E"),
    ({"model": {"id": "x", "architecture": "A", "revision": "\u2066"}}, r"model\.revision.*U\+2066"),
    ({"tools": {"a\x7f": ""}}, r"tools.*U\+007F"),
    ({"tools": {"a": "\r"}}, r"tools.*U\+000D"),
    ({"note": "\ufffe"}, r"note.*U\+FFFE"),
]


def test_a_wrong_or_missing_field_of_the_card_is_refused_by_name() -> None:
    fields = make_ranking().card.model_dump(mode="json")

    def parse(changed: dict[str, Any]) -> None:
        parse_ranking(save(tensors_of(make_ranking()), metadata={CARD_KEY: json.dumps(changed)}), "card")

    rows = [*((fields | changes, RankingFormatError, words) for changes, words in WRONG_FIELDS)]
    fewer = {name: value for name, value in fields.items() if name != "top_k"}
    assert not_refused(parse, [*rows, (fewer, RankingFormatError, "top_k")]) == []


def test_words_of_any_language_stand_in_a_card() -> None:
    words = "עברית \u200fعربى\u200e, 日本語, e\u0301 é, 👩\u200d👧, a\u00ad\u200bb, \U0001f1ee\U0001f1f1"
    ranking = make_ranking(sides=(words, words), note=words)
    assert parse_ranking(dump_ranking(ranking), "it").card.note == words


@pytest.mark.parametrize("character", ["x", "é", '"', "\\", "🤖"])
def test_a_card_that_is_written_can_be_read_again(character: str, tmp_path: Path) -> None:
    """The lengths of its texts are bounded, but the file's header is too, and escaped a character takes up to 14."""
    written = []
    for length in range(0, 4001, 50):
        texts = (length * character,) * 2
        ranking = make_ranking(sides=texts, note=texts[0])
        try:
            data = dump_ranking(ranking)
        except RankingFormatError as error:
            assert "the card would take" in str(error) and "shorten its texts" in str(error)
            continue
        assert parse_ranking(data, "it").card.sides == texts
        written.append(length)
    assert written == list(range(0, written[-1] + 50, 50)) and written[-1] >= 1400
    long = make_ranking(sides=("🤖" * 2500,) * 2)
    with pytest.raises(RankingFormatError, match="the card would take"):
        write_ranking(long, tmp_path / "a" / "v1.safetensors")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_entries_of_the_tensors_fit_beside_the_longest_card() -> None:
    """With every tensor that a file can hold, and numbers as long as they get."""
    names = [*TENSORS, *SUMMARY_AXES, *OPTIONAL_AXES, "weights"]
    entry = {"dtype": "I64", "shape": [1024, 4096], "data_offsets": [MAX_BYTES, MAX_BYTES]}
    assert len(json.dumps(dict.fromkeys(names, entry) | {"__metadata__": {CARD_KEY: ""}})) < 4096 - 8


def _add(name: str, row: int, expert: int, by: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][row, expert] += by

    return change


def _put(name: str, value: object, dtype: type = np.int64) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = np.array(value, dtype=dtype)

    return change


def _as(name: str, dtype: type) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].astype(dtype)

    return change


def _negative(tensors: dict[str, np.ndarray]) -> None:
    tensors["activations_1"][0, :2] += np.array([-1000, 1000])


def _too_often(tensors: dict[str, np.ndarray]) -> None:
    # The row still sums to K * N, and nothing is negative.
    tensors["activations_2"][0] = [51, 49, 0, 0, 0, 0]


WRONG_TENSORS: list[tuple[Callable[[dict[str, np.ndarray]], object], str]] = [
    (_add("activations_1", 1, 0, 1), r"activations_1, layer 1: 81 selections.*80"),
    (_add("activations_2", 2, 5, 1), r"activations_2, layer 3: 101 selections.*100"),
    (_negative, "activations_1 must lie between"),
    (_too_often, "activations_2 must lie between"),
    (_put("tokens", [0, 50]), "side 1 has 0"),
    (_put("tokens", [40, -50]), "side 2 has -50"),
    *((_put("tokens", value), "tokens") for value in ([40, 50, 60], [[40, 50]])),
    (_put("tokens", [40.0, float("nan")], np.float64), "tokens"),
    *((_put("layers", value), "ascending") for value in ([0, 3, 1], [0, 1, 1], [-1, 1, 3])),
    *((_put("layers", value), "layers") for value in ([], [0, 1])),
    *((_put("activations_1", np.zeros(size)), "activations_1") for size in ((3, 5), (3, 0), (0, 6), (3, 6, 1))),
    (_put("activations_1", np.full((3, 6), np.nan), np.float64), "activations_1"),
    (_as("activations_1", np.float64), "F64"),
    (_as("activations_2", np.int32), "I32"),
    (_as("activations_2", np.uint64), "U64"),
    (_as("layers", np.bool_), "BOOL"),
    (lambda tensors: tensors.pop("layers"), "layers"),
    (_put("activations_3", [1]), "activations_3"),
    (_put("exceeded_by_any", np.zeros((3, 6))), "a ranking holds .*squares_1"),
]


def test_wrong_tensors_are_refused_by_name() -> None:
    def parse(change: Callable[[dict[str, np.ndarray]], object]) -> None:
        tensors = tensors_of(make_ranking())
        change(tensors)
        parse_ranking(save(tensors, metadata={CARD_KEY: card_of(make_ranking())}), "it")

    assert not_refused(parse, ((change, RankingFormatError, words) for change, words in WRONG_TENSORS)) == []


def test_a_number_type_that_numpy_lacks_and_offsets_beyond_the_file_are_refused() -> None:
    sizes = {"BF16": 4, "F8_E4M3": 2, "F8_E5M2": 2, "F4": 1, "C64": 16, "X9": 2}
    entries = [({"dtype": dtype, "shape": [2], "data_offsets": [0, size]}, size) for dtype, size in sizes.items()]
    for entry, size in (*entries, ({"dtype": "I64", "shape": [1 << 60], "data_offsets": [0, 1 << 63]}, 16)):
        header = {"__metadata__": {CARD_KEY: card_of(make_ranking())}, "tokens": entry}
        with pytest.raises(RankingFormatError, match="it"):
            parse_ranking(raw_file(header, b"\0" * size), "it")


def test_counts_whose_sum_overflows_are_refused() -> None:
    # 5 * 2**62 is 2**62 modulo 2**64: five experts of a top-1 model, each selected by every token.
    ranking = make_ranking(layers=(0,), experts=8, top_k=1)
    tensors = tensors_of(ranking)
    tensors["tokens"][:] = 1 << 62
    for side in ("activations_1", "activations_2"):
        tensors[side][0] = [1 << 62] * 5 + [0] * 3
    with pytest.raises(RankingFormatError):
        parse_ranking(save(tensors, metadata={CARD_KEY: card_of(ranking)}), "it")


def test_a_file_that_is_too_large_is_refused_and_one_that_is_not_there_too(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(dump_ranking(make_ranking()))
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(FileError, match=str(MAX_BYTES)):
        read_ranking(path)
    for read in (read_card, read_ranking):
        for missing in (tmp_path / "missing", tmp_path, path / "below"):
            with pytest.raises(FileError, match="cannot read"):
                read(missing)
