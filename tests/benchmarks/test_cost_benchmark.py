"""The cost benchmark's own parts: ratios, work, and the growth of what steering adds."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cost.growth import measure_growth
from benchmarks.cost.ratios import ratio
from benchmarks.cost.seams import ROUTERS, measure


def test_a_ratio_is_of_throughput_and_by_rounds() -> None:
    found = ratio([1.0, 2.0, 4.0], [2.0, 4.0, 8.0])
    assert (found.median, found.low, found.high, found.least, found.most) == (0.5,) * 5
    spread = ratio([1.0, 1.0, 1.0, 1.0], [0.5, 1.0, 1.0, 2.0])
    assert spread.median == 1.0 and spread.least == 0.5 <= spread.low <= 1.0 <= spread.high <= spread.most == 2.0
    with pytest.raises(ValueError, match="pair up, got 1 and 2"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.nightly
def test_growth_is_measured_and_drawn(tmp_path: Path) -> None:
    found = measure_growth(tmp_path / "growth.png", quick=True)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert all(value > 0 for curves in found.values() for points in curves.values() for value in points.values())


def test_both_seams_are_measured() -> None:
    rows = measure(1, (1, 3))
    assert [(name, tokens) for name, tokens, _ in rows] == [(name, tokens) for name in ROUTERS for tokens in (1, 3)]
    for _, _, times in rows:
        assert list(times) == [
            f"{seam}, {who}" for who in ("all", "one", "none") for seam in ("gate", "biases", "selection")
        ]
        assert all(value > 0 for value in times.values())
