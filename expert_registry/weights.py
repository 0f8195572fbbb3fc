"""Weights of a ranking's experts: how much of a bias each gets for a strength of 1.

Axes: L MoE layers, E routed experts per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from expert_registry.errors import ProfileError

if TYPE_CHECKING:
    from expert_registry.ranking import Ranking

Score = Literal["own", "risk_difference", "log_ratio", "sign"]
SCORES: tuple[Score, ...] = get_args(Score)
MAX_WEIGHT = 16
"""Largest absolute weight in a ranking file, and bias of an expert."""


@dataclass(frozen=True, slots=True)
class OwnWeights:
    """A ranking's own weights in short."""

    made: str
    """How, in the words of its card."""
    non_zero: int
    largest: float
    """The largest absolute one."""

    def __str__(self) -> str:
        return f"{self.non_zero} non-zero, the largest {self.largest:.4g} ({self.made})"


def own_weights(ranking: Ranking) -> OwnWeights | None:
    """What a ranking's own weights are; None if it has none."""
    weights = ranking.weights
    if weights is None:
        return None
    return OwnWeights(ranking.card.weights, int(np.count_nonzero(weights)), float(np.abs(weights).max()))


def weigh(ranking: Ranking, by: Score | None = None) -> NDArray[np.float64]:
    """Weights of all experts, float64 `[L, E]`; positive ones belong to the positive side.

    Args:
        ranking: whose experts they are.
        by: what they are made of. `own` are those in its file, as they stand there. The others are divided by the
            largest absolute value: risk differences; logarithms of the ratio of the two sides' rates, with half a
            selection added to each; or signs of risk differences. None: `own` if it has them, else risk differences.

    Raises:
        ProfileError: it has none of its own, or nothing differs between its sides.
    """
    if by is None:
        by = "risk_difference" if ranking.weights is None else "own"
    if by == "own":
        if ranking.weights is None:
            others = ", ".join(SCORES[1:])
            raise ProfileError(
                f"by=own: the ranking {ranking.card.behaviour!r} has no weights of its own; there are {others}"
            )
        return ranking.weights.astype(np.float64)
    counts = ranking.counts
    scores = counts.rounded_difference()
    if by == "log_ratio":
        n1, n2 = (float(n) for n in counts.tokens)
        rates = (counts.activations_1 + 0.5) / (n1 + 1), (counts.activations_2 + 0.5) / (n2 + 1)
        scores = np.log(rates[0]) - np.log(rates[1])
    elif by == "sign":
        scores = np.sign(scores)
    largest = np.abs(scores).max()
    if largest == 0:
        raise ProfileError(f"the two sides of the ranking {ranking.card.behaviour!r} select all experts equally often")
    return np.asarray(scores / largest)


def largest(
    ranking: Ranking, weights: NDArray[np.float64], top: int | None = None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and experts of the largest absolute weights, the largest first; equal ones in the ranking's own order.

    Args:
        ranking: whose experts they are.
        weights: `[L, E]`.
        top: how many. None: all that are not 0.

    Raises:
        ProfileError: there are not that many.
    """
    difference = np.abs(ranking.counts.rounded_difference())
    order = np.lexsort((-difference.ravel(), -np.abs(weights).ravel()))[: np.count_nonzero(weights)]
    if top is not None and top > len(order):
        raise ProfileError(f"top: {top} experts asked for, but the ranking has {len(order)} with a weight")
    rows, experts = np.unravel_index(order[:top], weights.shape)
    return rows, experts
