"""Ratios of interleaved rounds, with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Ratio:
    """Throughput relative to the reference, over rounds.

    Attributes:
        median: of the rounds' ratios.
        low: lower end of its 95 % bootstrap interval.
        high: upper end.
        least: of the rounds.
        most: of the rounds.
    """

    median: float
    low: float
    high: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(reference: Sequence[float], measured: Sequence[float]) -> Ratio:
    """Throughput of `measured` over that of `reference`: seconds of the same rounds, divided round by round."""
    if len(reference) != len(measured) or not reference:
        raise ValueError(f"rounds must pair up, got {len(reference)} and {len(measured)}")
    ratios = np.asarray(reference) / np.asarray(measured)
    drawn = np.random.default_rng(0).choice(ratios, size=(_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return Ratio(float(np.median(ratios)), float(low), float(high), float(ratios.min()), float(ratios.max()))
