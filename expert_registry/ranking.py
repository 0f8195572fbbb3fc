"""From routing counts to a ranking: the raw counts are the truth, the order is derived.

Axes: L MoE layers, E routed experts per layer, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from expert_registry.card import RankingCard
from expert_registry.counts import RoutingCounts
from expert_registry.shape import MoEShape

if TYPE_CHECKING:
    from expert_registry.clusters import ClusterSummary


class RankedExpert(NamedTuple):
    """One entry of a ranking."""

    layer: int
    """Checkpoint layer index."""
    expert: int
    risk_difference: float


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Routing counts with their provenance; experts ordered by risk difference on demand."""

    counts: RoutingCounts
    card: RankingCard
    clusters: ClusterSummary | None = None
    """What standard errors by cluster need; None in rankings that were made without."""
    weights: NDArray[np.float32] | None = None
    """Weights of its own for biases, `[L, E]`; None: they are made of the counts (`weights.weigh`)."""

    @property
    def shape(self) -> MoEShape:
        """Shape of the model that was counted."""
        layers = tuple(int(x) for x in self.counts.layers)
        return MoEShape(self.card.model.architecture, layers, self.card.num_experts, self.card.top_k)

    def experts(self) -> list[RankedExpert]:
        """All L * E experts, largest absolute risk difference first; ties by layer, then expert."""
        return rank_experts(self.counts)


def rank_experts(counts: RoutingCounts) -> list[RankedExpert]:
    """Rank all experts of the model (not layer by layer) by absolute risk difference.

    Positive entries belong to the positive side. Ties go to the lower layer, then the lower expert,
    so that the same counts always give the same order.
    """
    difference = counts.risk_difference()
    order = np.argsort(-np.abs(counts.rounded_difference()), axis=None, kind="stable")
    num_experts = difference.shape[1]
    return [
        RankedExpert(int(counts.layers[i // num_experts]), int(i % num_experts), float(difference.flat[i]))
        for i in order.tolist()
    ]
