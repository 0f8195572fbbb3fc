"""Tables of the authors' release: both schemas on made-up counts, and pickles that want to do something else."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_registry.counts import RoutingCounts
from expert_registry.errors import RankingFormatError, SteerMoEError
from expert_registry.published.pickle_tree import MAX_BYTES, Call, Name, PickleRefusedError, read_tree
from expert_registry.published.released_table import NAMES, _array, read_released_table
from tests.support.folders import RELEASED_DATA as DATA
from tests.support.folders import ROOT
from tests.support.made_rankings import make_ranking
from tests.support.refusals import not_refused
from tests.support.released import LONG, SHORT, columns_of, pickled

RANKING = make_ranking(7, layers=(0, 1, 2))
SCHEMAS = {"11": SHORT, "31": LONG}
KEPT = {name: (DATA / f"released-{name}-columns.pkl").read_bytes() for name in SCHEMAS}


def needs_pandas() -> None:
    pytest.importorskip("pandas", reason="pandas writes the made-up tables, and is the other reader")


def equal(one: RoutingCounts, other: RoutingCounts) -> bool:
    names = ("activations_1", "activations_2", "tokens", "layers")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


def test_the_counts_of_a_kept_table_are_read_as_pandas_reads_them() -> None:
    for name, schema in SCHEMAS.items():
        counts = read_released_table(KEPT[name], RANKING.shape)
        assert len(schema) == int(name) and equal(counts, RANKING.counts) and counts.activations_1.dtype == np.int64
    needs_pandas()
    import pandas

    for name, schema in SCHEMAS.items():
        frame = pandas.read_pickle(DATA / f"released-{name}-columns.pkl")
        assert set(frame.columns) == set(schema)
        for row in frame.to_dict("records"):
            assert RANKING.counts.activations_1[row["layer"], row["expert"]] == row["a1"]
            assert RANKING.counts.activations_2[row["layer"], row["expert"]] == row["a2"]
            assert RANKING.counts.tokens.tolist() == [row["a1"] + row["d1"], row["a2"] + row["d2"]]


@given(st.sampled_from(sorted(SCHEMAS)), st.integers(0, 1000), st.integers(1, 5), st.integers(2, 9))
@settings(max_examples=15, deadline=None)
def test_the_counts_of_any_table_are_read(schema: str, seed: int, layers: int, experts: int) -> None:
    needs_pandas()
    ranking = make_ranking(seed, layers=tuple(range(layers)), experts=experts, top_k=1 + seed % experts)
    assert equal(read_released_table(pickled(columns_of(ranking), SCHEMAS[schema]), ranking.shape), ranking.counts)


@pytest.mark.parametrize("order", ["C", "F"])
def test_numbers_stand_in_row_or_column_order(order: str) -> None:
    values = np.arange(6.0).reshape(2, 3)
    dtype = Call(Name("numpy", "dtype"), ("f8", False, True), (3, "<"))
    call = Call(Name("numpy._core.numeric", "_frombuffer"), (values.tobytes(order), dtype, (2, 3), order))  # type: ignore[arg-type]
    assert np.array_equal(_array(call, 2), values)


def _set(name: str, row: int, value: float) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[name] = columns[name].copy()
        columns[name][row] = value

    return change


def _everywhere(name: str, change_to: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.update({name: change_to(columns[name])})


def _cut(columns: dict[str, Any]) -> None:
    for name in columns:
        columns[name] = columns[name][:-1]


def _one_more(columns: dict[str, Any]) -> None:
    # Still a + d = N and whole, but the row of the layer no longer sums to K * N.
    columns["a1"] = columns["a1"] + np.eye(1, len(columns["a1"]), 9)[0]
    columns["d1"] = columns["d1"] - np.eye(1, len(columns["d1"]), 9)[0]


WRONG: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (_set("a1", 0, float("nan")), "'a1'.*no counts"),
    (_set("d2", 3, float("inf")), "'d2'.*no counts"),
    (_set("a2", 1, 0.5), "'a2'.*no counts"),
    (_set("a1", 0, 1e300), "'a1'.*no counts"),
    (_set("a1", 0, -1), "side 1 of the table has other numbers"),
    (_set("layer", 0, 3), "layer or expert that"),
    (_set("layer", 0, -1), "layer or expert that"),
    (_set("expert", 0, 6), "layer or expert that"),
    (_everywhere("expert", lambda values: values * 0), "two rows"),
    (_set("risk_diff", 2, float("nan")), "risk differences"),
    (_everywhere("risk_diff", lambda values: values + 1e-6), "risk differences"),
    (_everywhere("risk_diff", lambda values: -values), "risk differences"),
    (_one_more, "activations_1, layer"),
    (_cut, "17.*needs.*18"),
    (_everywhere("a1", lambda values: values.astype(np.float32)), "neither int64 nor float64"),
    (_everywhere("a1", lambda values: values.astype(complex)), "neither int64 nor float64"),
    (_everywhere("a1", lambda values: [str(v) for v in values]), "."),
    (_everywhere("a1", lambda values: np.array([[v] for v in values], dtype=object)[:, 0]), "multiarray.scalar"),
]


def test_a_table_with_impossible_counts_or_without_a_column_or_of_another_model_is_refused() -> None:
    for other in (make_ranking(layers=(0, 1)), make_ranking(layers=(0, 1, 2), top_k=3), make_ranking(layers=(0, 1, 3))):
        with pytest.raises(SteerMoEError):
            read_released_table(KEPT["11"], other.shape)
    needs_pandas()

    def read(change: Callable[[dict[str, Any]], None]) -> None:
        columns = columns_of(RANKING)
        change(columns)
        read_released_table(pickled(columns, SHORT), RANKING.shape)

    assert not_refused(read, ((change, SteerMoEError, words) for change, words in WRONG)) == []
    for missing in ("layer", "expert", "a1", "a2", "d1", "d2", "risk_diff"):
        schema = tuple(name for name in SHORT if name != missing)
        with pytest.raises(PickleRefusedError, match=f"no column '{missing}'"):
            read_released_table(pickled(columns_of(RANKING), schema), RANKING.shape)


# --- pickles that want to do something else ---------------------------------------------------------------------


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


FRAME = named("pandas.core.frame", "DataFrame")
MARKER = "steermoe-was-here"
GADGETS: dict[str, bytes] = {
    "os.system": pickle.dumps(Calls(os.system, f"touch {MARKER}")),
    "os.system, protocol 0": pickle.dumps(Calls(os.system, f"touch {MARKER}"), protocol=0),
    "eval": pickle.dumps(Calls(eval, f"open({MARKER!r}, 'w')")),
    "getattr": named("builtins", "getattr") + b".",
    "subprocess": pickle.dumps(Calls(subprocess.Popen, ["touch", MARKER])),
    "inside a list": pickle.dumps([1, [2, [3, Calls(os.system, f"touch {MARKER}")]]]),
    "nested call": pickle.dumps(Calls(print, Calls(os.system, f"touch {MARKER}"))),
    "object array": pickle.dumps(np.array([Calls(os.system, f"touch {MARKER}")], dtype=object)),
    "dotted name": named("pandas.core.frame", "DataFrame.eval") + b".",
    "name in an allowed module": named("pandas.core.frame", "DataFrame.to_pickle") + b".",
    "numpy loader": named("numpy", "load") + b".",
    "numpy core of old": named("numpy.core.multiarray", "scalar") + b".",
    "GLOBAL": b"cos\nsystem\n.",
    "INST": b"(S'x'\nios\nsystem\n.",
    "OBJ": b"(" + named("os", "system") + text("x") + b"o.",
    "NEWOBJ_EX": FRAME + b")}\x92.",
    "EXT1": b"\x82\x01.",
    "PERSID": b"Pos.system\n.",
    "BINPERSID": text("x") + b"Q.",
    "a call of a call": FRAME + b")R)R.",
    "a state for a list": b"]}b.",
    "a state for a name": FRAME + b"}b.",
    "two states": FRAME + b")\x81}b}b.",
    "NEXT_BUFFER": b"\x97.",
    "set": b"\x8f(K\x01\x90.",
    "a number too long": b"I" + b"9" * 5000 + b"\n.",
    "a long": b"\x8b\xff\xff\xff\x7f.",
    "huge bytes": b"\x8e" + struct.pack("<Q", 1 << 60) + b".",
    "huge bytearray": b"\x96" + struct.pack("<Q", 1 << 60) + b".",
    "huge text": b"\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "huge frame": b"\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "huge memo index": b"Nr\xff\xff\xff\x7f.",
    "memo index in words": b"Np999999999\n.",
    "memo that is not there": b"h\x05.",
    "memo just after the last": b"N\x94h\x01.",
    "memo far away": b"j\xff\xff\xff\x7f.",
    "empty stack": b"\x85.",
    "no mark": b"t.",
    "append to a number": b"K\x01(K\x02e.",
    "key without a value": b"}(K\x01u.",
    "key that is a tuple": b"}K\x01\x85K\x01s.",
    "two objects": b"NN.",
    "rest after the end": KEPT["11"] + b"N.",
    "no end": KEPT["11"][:-1],
    "nothing": b"",
    "only an end": b".",
    "too long": b"N" * (MAX_BYTES + 1),
    "too many operations": b"N0" * 10 + b"N" * 600_000 + b".",
    "not a table": b"K\x01.",
    "a name alone": FRAME + b".",
    "a frame without content": FRAME + b")\x81.",
    "a frame of nonsense": FRAME + b")\x81}" + text("_mgr") + b"Nsb.",
    "a manager of nonsense": FRAME
    + b")\x81}"
    + text("_mgr")
    + named("pandas.core.internals.managers", "BlockManager")
    + b"NN\x86Rsb.",
}


def test_a_doctored_pickle_is_refused_and_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [(name, PickleRefusedError, "") for name in GADGETS]
    assert not_refused(lambda name: read_released_table(GADGETS[name], RANKING.shape), rows) == []
    assert list(tmp_path.iterdir()) == []


def test_the_gadgets_would_work_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("os.system", "os.system, protocol 0", "eval", "inside a list"):
        pickle.loads(GADGETS[name])
        (tmp_path / MARKER).unlink()


def test_a_released_table_that_was_doctored_is_refused() -> None:
    for honest, doctored in (
        (text("slice"), text("print")),
        (text("pandas.core.frame"), text("pandas.io.pickle")),
        (text("_frombuffer"), text("fromfunction")),
        (text("_reconstruct"), text("set_typeDict")),
        (text("_unpickle_block"), text("_unpickle_other")),
        *((text("f8"), text(other)) for other in ("O8", "f4")),
        (text("<"), text(">")),
        (text("C"), text("K")),
    ):
        for data in KEPT.values():
            assert honest in data
            with pytest.raises(PickleRefusedError):
                read_released_table(data.replace(honest, doctored, 1), RANKING.shape)


@given(st.sampled_from(sorted(SCHEMAS)), st.floats(0, 1, exclude_max=True), st.integers(1, 255))
@settings(max_examples=600, deadline=None)
def test_a_table_with_a_damaged_byte_is_refused_or_says_the_same(schema: str, where: float, flip: int) -> None:
    broken = bytearray(KEPT[schema])
    broken[int(where * len(broken))] ^= flip
    try:
        counts = read_released_table(bytes(broken), RANKING.shape)
    except (PickleRefusedError, RankingFormatError):
        return
    assert equal(counts, RANKING.counts)


@given(st.binary(max_size=120))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_pickle_are_refused(data: bytes) -> None:
    for candidate in (data, b"\x80\x05" + data + b".", KEPT["11"][:300] + data):
        with pytest.raises(PickleRefusedError):
            read_released_table(candidate, RANKING.shape)


def doubling(levels: int) -> bytes:
    """Tuples, each of which holds the one before twice: 2 ** levels leaves, if anybody counts them."""
    twice = (b"j" + struct.pack("<I", level) + b"j" + struct.pack("<I", level) + b"\x86\x94" for level in range(levels))
    return b"(N\x94" + b"".join(twice) + b"t"


BOMBS = {
    "doubling tuples": doubling(20_000) + b".",
    "doubling tuples as arguments": FRAME + doubling(20_000) + b"R.",
    "deep tuples": b"N" + b"\x85" * 400_000 + b".",
    "deep lists": b"](" * 100_000 + b"e" * 100_000 + b".",
}
BOMB_READER = """
import resource, sys
from pathlib import Path
from expert_registry.published.pickle_tree import PickleRefusedError
from expert_registry.published.released_table import read_released_table
from expert_registry.shape import MoEShape
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
for path in sys.argv[1:]:
    try:
        read_released_table(Path(path).read_bytes(), MoEShape("x", (0,), 2, 1))
    except PickleRefusedError:
        print("refused", Path(path).name)
"""


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    # In a process of its own with little memory and time: a bomb that goes off must not take the tests with it.
    for name, data in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-c", BOMB_READER, *(str(tmp_path / name) for name in BOMBS)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, timeout=90, check=False, cwd=ROOT, env=environment, text=True)
    assert done.stdout.splitlines() == [f"refused {name}" for name in BOMBS], done.stderr[-500:]


def test_operations_are_few_and_keys_are_texts_so_that_no_hash_takes_for_ever() -> None:
    for data, words in (
        (GADGETS["too many operations"][20:], "too many operations"),
        (GADGETS["key that is a tuple"], "key of type tuple"),
        (doubling(100) + b"}h\x64K\x01s.", "key of type tuple"),
    ):
        with pytest.raises(PickleRefusedError, match=words):
            read_tree(data, NAMES)


def test_sharing_in_the_memo_is_kept_and_not_copied() -> None:
    tree = read_tree(b"(]\x94h\x00t.", NAMES)
    assert tree == ([], []) and tree[0] is tree[1]
