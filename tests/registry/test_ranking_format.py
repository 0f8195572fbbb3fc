"""Ranking files: round trip, atomic writing, and files that are damaged or hostile."""

from __future__ import annotations

import json
import os
import random
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from expert_registry import Ranking, RoutingCounts, SteerMoEError
from expert_registry.clusters import SUMMARY_AXES
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


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_writer_that_dies_leaves_neither_file_nor_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
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


def test_every_prefix_of_a_file_is_refused() -> None:
    data = dump_ranking(make_ranking())
    lengths = {*range(0, 24), *range(24, len(data), 7), *range(len(data) - 9, len(data))}
    for length in lengths:
        with pytest.raises(RankingFormatError, match="cut"):
            parse_ranking(data[:length], "cut")
    with pytest.raises(RankingFormatError, match="long"):
        parse_ranking(data + b"\0", "long")


def test_a_flipped_bit_in_the_header_gives_a_valid_ranking_or_an_error_of_ours() -> None:
    data = dump_ranking(make_ranking())
    end = 8 + struct.unpack("<Q", data[:8])[0]
    refused = 0
    for position in range(end):
        for bit in (0, 2, 4, 5, 7):
            broken = bytearray(data)
            broken[position] ^= 1 << bit
            try:
                ranking = parse_ranking(bytes(broken), "flipped")
            except RankingFormatError:
                refused += 1
            else:
                ranking.counts.check(ranking.shape)
    assert refused > end


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_ranking_are_refused(data: bytes) -> None:
    for candidate in (data, struct.pack("<Q", len(data)) + data):
        with pytest.raises(RankingFormatError):
            parse_ranking(candidate, "random")


@pytest.mark.parametrize("length", [MAX_CARD_BYTES + 1, 1 << 31, 1 << 40, (1 << 63) - 1, (1 << 64) - 1])
def test_a_hostile_header_length_is_refused_without_reading_so_far(length: int, tmp_path: Path) -> None:
    data = struct.pack("<Q", length) + dump_ranking(make_ranking())[8:]
    path = tmp_path / "v1.safetensors"
    path.write_bytes(data)
    for read in (read_card, read_ranking):
        with pytest.raises(RankingFormatError, match="header"):
            read(path)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b'"__metadata__"',
        b"[" * 60_000,
        b'{"x":' * 10_000,
        b'{"__metadata__": ' + b"9" * 5000 + b"}",
        {},
        {"__metadata__": None},
        {"__metadata__": []},
        {"__metadata__": "steermoe"},
        {"__metadata__": {"other": "{}"}},
        {"__metadata__": {CARD_KEY: None}},
        {"__metadata__": {CARD_KEY: 3}},
        {"__metadata__": {CARD_KEY: {"a": 1}}},
        {"__metadata__": {CARD_KEY: ""}},
        {"__metadata__": {CARD_KEY: "null"}},
        {"__metadata__": {CARD_KEY: "\ud800"}},
        {"__metadata__": {CARD_KEY: "[" * 50_000}},
    ],
    ids=range(21),
)
def test_a_header_without_a_card_is_refused(header: object, tmp_path: Path) -> None:
    path = tmp_path / "v1.safetensors"
    path.write_bytes(raw_file(header))
    for read in (read_card, read_ranking):
        with pytest.raises(RankingFormatError, match="v1"):
            read(path)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"format_version": 2}, "format_version"),
        ({"format_version": "1"}, "format_version"),
        ({"num_experts": 0}, "num_experts"),
        ({"num_experts": 5000}, "num_experts"),
        ({"num_experts": True}, "num_experts"),
        ({"num_experts": 6.0}, "num_experts"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 7}, "top-k 7"),
        ({"behaviour": "Digits"}, "behaviour"),
        ({"behaviour": "../digits"}, "behaviour"),
        ({"behaviour": "digits\n"}, "behaviour"),
        ({"version": 0}, "version"),
        ({"sides": ["one"]}, "sides"),
        ({"sides": "one"}, "sides"),
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
    ],
)
def test_a_wrong_field_of_the_card_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    ranking = make_ranking()
    data = save(tensors_of(ranking), metadata={CARD_KEY: card_of(ranking, **changes)})
    with pytest.raises(RankingFormatError, match=names):
        parse_ranking(data, "card")


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
    names = [*TENSORS, *SUMMARY_AXES]
    entry = {"dtype": "I64", "shape": [1024, 4096], "data_offsets": [MAX_BYTES, MAX_BYTES]}
    assert len(json.dumps(dict.fromkeys(names, entry) | {"__metadata__": {CARD_KEY: ""}})) < 4096 - 8


def test_a_field_that_is_missing_is_refused_by_name() -> None:
    ranking = make_ranking()
    fields = ranking.card.model_dump(mode="json")
    del fields["top_k"]
    with pytest.raises(RankingFormatError, match="top_k"):
        parse_ranking(save(tensors_of(ranking), metadata={CARD_KEY: json.dumps(fields)}), "card")


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


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_add("activations_1", 1, 0, 1), r"activations_1, layer 1: 81 selections.*80"),
        (_add("activations_2", 2, 5, 1), r"activations_2, layer 3: 101 selections.*100"),
        (_negative, "activations_1 must lie between"),
        (_too_often, "activations_2 must lie between"),
        (_put("tokens", [0, 50]), "side 1 has 0"),
        (_put("tokens", [40, -50]), "side 2 has -50"),
        (_put("tokens", [40, 50, 60]), "tokens"),
        (_put("tokens", [[40, 50]]), "tokens"),
        (_put("tokens", [40.0, float("nan")], np.float64), "tokens"),
        (_put("layers", [0, 1]), "layers"),
        (_put("layers", [0, 3, 1]), "ascending"),
        (_put("layers", [0, 1, 1]), "ascending"),
        (_put("layers", [-1, 1, 3]), "ascending"),
        (_put("layers", []), "layers"),
        (_put("activations_1", np.zeros((3, 5))), "activations_1"),
        (_put("activations_1", np.zeros((3, 0))), "activations_1"),
        (_put("activations_1", np.zeros((0, 6))), "activations_1"),
        (_put("activations_1", np.zeros((3, 6, 1))), "activations_1"),
        (_put("activations_1", np.full((3, 6), np.nan), np.float64), "activations_1"),
        (_as("activations_1", np.float64), "F64"),
        (_as("activations_2", np.int32), "I32"),
        (_as("activations_2", np.uint64), "U64"),
        (_as("layers", np.bool_), "BOOL"),
        (lambda tensors: tensors.pop("layers"), "layers"),
        (_put("activations_3", [1]), "activations_3"),
        (_put("exceeded_by_any", np.zeros((3, 6))), "a ranking holds .*squares_1"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change: Callable[[dict[str, np.ndarray]], None], names: str) -> None:
    ranking = make_ranking()
    tensors = tensors_of(ranking)
    change(tensors)
    with pytest.raises(RankingFormatError, match=names):
        parse_ranking(save(tensors, metadata={CARD_KEY: card_of(ranking)}), "it")


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "F4", "C64", "X9"])
def test_a_number_type_that_numpy_lacks_is_refused(dtype: str) -> None:
    size = {"BF16": 4, "C64": 16, "F4": 1}.get(dtype, 2)
    header = {
        "__metadata__": {CARD_KEY: card_of(make_ranking())},
        "tokens": {"dtype": dtype, "shape": [2], "data_offsets": [0, size]},
    }
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


def test_offsets_beyond_the_file_are_refused() -> None:
    header = {
        "__metadata__": {CARD_KEY: card_of(make_ranking())},
        "tokens": {"dtype": "I64", "shape": [1 << 60], "data_offsets": [0, 1 << 63]},
    }
    with pytest.raises(RankingFormatError, match="it"):
        parse_ranking(raw_file(header, b"\0" * 16), "it")


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


def test_random_damage_raises_nothing_but_our_error() -> None:
    data = dump_ranking(make_ranking())
    chance = random.Random(0)
    for _ in range(500):
        broken = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        try:
            parse_ranking(bytes(broken), "damaged")
        except SteerMoEError as error:
            assert type(error) is RankingFormatError
