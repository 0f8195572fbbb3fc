"""Student's t distribution: plain numpy, because the packages below lm-eval do without scipy.

With n examples, a risk difference over its standard error is spread wider than the normal distribution says:
at n = 6 an interval of 1.96 standard errors misses the truth in about one case of eight instead of one of twenty.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_NORMAL_FROM = 10_000
"""Degrees of freedom from which on the normal distribution is taken."""
_STEPS = 1_000
_TINY = 1e-300


def two_sided(t: Floats, freedom: int) -> Floats:
    """P(|T| >= |t|) with `freedom` >= 1 degrees of freedom, in the shape of `t`; NaN stays NaN."""
    size = np.abs(np.asarray(t, dtype=np.float64))
    if freedom >= _NORMAL_FROM:
        tails = [math.erfc(x / math.sqrt(2)) for x in size.reshape(-1).tolist()]
        return np.asarray(tails, dtype=np.float64).reshape(size.shape)
    with np.errstate(over="ignore", divide="ignore"):
        squared = size**2 / freedom
        x, y = 1 / (1 + squared), 1 / (1 + 1 / squared)
    a = freedom / 2
    # Each form of the continued fraction is quick on its own side.
    near = x < (a + 1) / (a + 2.5)
    found = np.full_like(x, np.nan)
    found[near] = _beta(a, 0.5, x[near], y[near])
    far = x >= (a + 1) / (a + 2.5)
    found[far] = 1 - _beta(0.5, a, y[far], x[far])
    return found


def quantile(level: float, freedom: int) -> float:
    """The t with P(|T| < t) = `level`, by bisection."""
    if freedom >= _NORMAL_FROM:
        return NormalDist().inv_cdf(0.5 + level / 2)
    low, high = 0.0, 1.0
    while two_sided(np.asarray(high), freedom) > 1 - level:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if two_sided(np.asarray(middle), freedom) > 1 - level:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _beta(a: float, b: float, x: Floats, y: Floats) -> Floats:
    """The regularised incomplete beta function at x = 1 - y, by its continued fraction (Lentz's method)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        log_front = a * np.log(x) + b * np.log(y)
    front = np.exp(log_front + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    upper, lower = np.ones_like(x), 1 / _away(1 - (a + b) / (a + 1) * x)
    fraction = lower.copy()
    for m in range(1, _STEPS):
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m)) * x
        odd = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1)) * x
        change = np.ones_like(x)
        for term in (even, odd):
            lower, upper = 1 / _away(1 + term * lower), _away(1 + term / upper)
            change = change * lower * upper
        fraction = fraction * change
        if np.all(np.abs(change - 1) < 1e-15):
            break
    return np.asarray(front * fraction)


def _away(value: Floats) -> Floats:
    """`value`, away from zero."""
    return np.where(np.abs(value) < _TINY, _TINY, value)
