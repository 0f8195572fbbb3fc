"""95 % intervals for rates, for means over draws, and for paired changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
MOST_EXACT = 5_000
"""Examples up to which the bootstrap is BCa, whose cost grows with their square; of more, percentiles say the same."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval; `n` is what it was averaged over."""

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


def rate(outcomes: Sequence[float]) -> Interval:
    """Share of ones among binary outcomes, with Wilson's interval."""
    hits, n = int(sum(outcomes)), len(outcomes)
    if set(outcomes) - {0.0, 1.0} or n == 0:
        raise ValueError("a rate needs at least one outcome, each 0 or 1")
    bounds = stats.binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(hits / n, float(bounds.low), float(bounds.high), n)


def mean_over_draws(values: Sequence[float]) -> Interval:
    """Mean of one rate per independent draw of experts, with Student's interval over the draws, clipped to [0, 1].

    For studies of one's own, such as those in `examples`; reports use `mean_over_changes`.
    """
    found = mean_over_changes(values)
    return Interval(found.value, min(found.value, max(0.0, found.low)), max(found.value, min(1.0, found.high)), found.n)


def mean_over_changes(values: Sequence[float]) -> Interval:
    """As `mean_over_draws`, of values that may be negative: not clipped."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if len(array) < 2 or float(array.std()) == 0.0:
        return Interval(mean, mean, mean, len(array))
    low, high = stats.t.interval(CONFIDENCE, len(array) - 1, loc=mean, scale=stats.sem(array))
    return Interval(mean, float(low), float(high), len(array))


def paired_change(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Interval:
    """Mean of `after - before` over the same examples in the same order, bootstrapped by example (BCa).

    Where every example changed alike, the bootstrap knows no spread, and the interval is the mean.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"paired outcomes must be of the same examples, got {len(before)} and {len(after)}")
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    mean, n = float(change.mean()), len(change)
    if np.ptp(change) < 1e-12:
        return Interval(mean, mean, mean, n)
    found = stats.bootstrap(
        (change,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 4_000_000 // n),
        confidence_level=CONFIDENCE,
        method="BCa" if n <= MOST_EXACT else "percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), n)


def mean_of(outcomes: Sequence[float], seed: int = 0) -> Interval:
    """Mean over examples: Wilson's interval where all are 0 or 1, else bootstrapped."""
    if outcomes and not set(outcomes) - {0.0, 1.0}:
        return rate(outcomes)
    return paired_change([0.0] * len(outcomes), outcomes, seed)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> float | None:
    """Two-sided p of McNemar's exact test over paired binary outcomes; None if they are not binary."""
    if {*before, *after} - {0.0, 1.0}:
        return None
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number by Holm's method, in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def unseen(n: int) -> float:
    """The largest share that `n` examples without a single case leave possible, at 95 % confidence (about 3/n)."""
    return 1.0 - float((1.0 - CONFIDENCE) ** (1.0 / n))
