"""The rankings that the paper's authors released: our order from their counts is theirs.

Their licence allows noncommercial research only, so the tables are not in this repository. The tests look for
them in `shared/upstream-rankings` beside it, and are skipped, and counted, where they are not.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expert_registry import RoutingCounts, rank_experts
from expert_registry.statistics import cautions, log_odds

FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "upstream-rankings"
TABLES = sorted(path.name for path in FOLDER.glob("*.pkl")) if FOLDER.is_dir() else []


class Frame:
    """Stands in for pandas' classes: keeps what it is given."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Tables(pickle.Unpickler):
    """Only numpy's arrays and inert stand-ins for pandas."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("numpy", "dtype"), ("numpy", "ndarray"), ("builtins", "slice")}:
            return {"dtype": np.dtype, "ndarray": np.ndarray, "slice": slice}[name]
        if (module, name) == ("numpy._core.numeric", "_frombuffer"):
            return np._core.numeric._frombuffer
        if (module, name) == ("numpy._core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct
        if module.startswith("pandas."):
            return Frame
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")


def columns_of(name: str) -> dict[str, Any]:
    """The numeric columns of a table, in its order of rows; its sha256 is checked before it is read."""
    data = (FOLDER / name).read_bytes()
    assert f"{hashlib.sha256(data).hexdigest()}  {name}" in (FOLDER / "SHA256SUMS").read_text().splitlines()
    frame = Tables(io.BytesIO(data)).load()
    manager = frame.state["_mgr"]
    blocks, axes = manager.arguments[0], manager.arguments[1]
    names = axes[0].arguments[1]["data"].tolist()
    found = {}
    for block in blocks:
        values, places = block.arguments[0], block.arguments[1]
        numbers = range(len(names))[places] if isinstance(places, slice) else list(places)
        found |= {names[number]: values[i] for i, number in enumerate(numbers)}
    return found


def counts_of(columns: dict[str, Any]) -> RoutingCounts:
    layers, experts = columns["layer"].astype(int), columns["expert"].astype(int)
    size = (layers.max() + 1, experts.max() + 1)
    assert len(layers) == size[0] * size[1]
    sides = []
    for name in ("a1", "a2"):
        side = np.full(size, -1, dtype=np.int64)
        side[layers, experts] = columns[name]
        sides.append(side)
    tokens = [int(columns[f"a{i}"][0] + columns[f"d{i}"][0]) for i in (1, 2)]
    return RoutingCounts(sides[0], sides[1], np.asarray(tokens), np.arange(size[0]))


@pytest.mark.skipif(not TABLES, reason="the released tables are not beside this repository")
def test_all_twelve_are_here() -> None:
    assert len(TABLES) == 12


@pytest.mark.parametrize("name", TABLES or [pytest.param("", marks=pytest.mark.skip("no released tables"))])
def test_our_order_from_their_counts_is_theirs(name: str) -> None:
    columns = columns_of(name)
    counts = counts_of(columns)
    ranked = rank_experts(counts)
    mine = np.asarray([abs(expert.risk_difference) for expert in ranked])
    theirs = np.abs(columns["risk_diff"].astype(float))
    assert (np.diff(theirs) <= 1e-12).all(), "their rows are in the order of their ranking"
    np.testing.assert_allclose(mine, theirs, atol=1e-12)
    # Row by row the same expert, up to the order among equal risk differences.
    rank_of = {(expert.layer, expert.expert): abs(expert.risk_difference) for expert in ranked}
    pairs = zip(columns["layer"].astype(int).tolist(), columns["expert"].astype(int).tolist(), strict=True)
    np.testing.assert_allclose([rank_of[pair] for pair in pairs], mine, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in TABLES if "safety" in name])
def test_their_unequal_sides_would_be_cautioned_about(name: str) -> None:
    counts = counts_of(columns_of(name))
    assert "differ in length" in cautions(counts, None)[0]
    assert np.isfinite(log_odds(counts)).all()
