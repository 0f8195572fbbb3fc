"""The clustering summary of a ranking: what standard errors by cluster need, beside the counts.

Axes: L MoE layers, E routed experts per layer. An example is a cluster of contrastive pairs, both sides together:
all pairs that share a document or the like, or one pair that shares nothing. A1_i, A2_i are its selections of an
expert and N1_i, N2_i its counted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from expert_registry.counts import Counts, RoutingCounts
from expert_registry.errors import RankingFormatError
from expert_registry.shape import MoEShape

SUMMARY_AXES = {
    "examples": 1,
    "token_products": 1,
    "squares_1": 2,
    "squares_2": 2,
    "with_tokens_1": 2,
    "with_tokens_2": 2,
    "products": 2,
    "with_other_1": 2,
    "with_other_2": 2,
    "half_1": 2,
    "half_2": 2,
    "half_tokens": 1,
    "exceeded": 2,
    "permutations": 1,
}
"""Number of axes of each tensor of the summary in a file; there are all of them or none."""
OPTIONAL_AXES = {"exceeded_by_any": 2}
"""Of those that a summary may have too."""
_LENGTHS = {"examples": 1, "token_products": 3, "half_tokens": 2, "permutations": 1}
_SLACK = 1e-9
"""Relative; products of sums are compared in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class ClusterSummary:
    """Sums over examples; all int64.

    Attributes:
        examples: `[1]`, number of examples n: of clusters, not of pairs.
        token_products: `[3]`, sums of N1_i^2, N2_i^2 and N1_i N2_i.
        squares_1, squares_2: `[L, E]`, sums of A1_i^2 and A2_i^2.
        with_tokens_1, with_tokens_2: `[L, E]`, sums of A1_i N1_i and A2_i N2_i.
        products: `[L, E]`, sum of A1_i A2_i.
        with_other_1, with_other_2: `[L, E]`, sums of A1_i N2_i and A2_i N1_i.
        half_1, half_2: `[L, E]`, A1 and A2 of a random half of the examples.
        half_tokens: `[2]`, N1 and N2 of that half.
        exceeded: `[L, E]`, in how many of the permutations (sides swapped at random within each example) the
            absolute risk difference was at least the one that was observed.
        permutations: `[1]`, how many were drawn; 0 if none.
        exceeded_by_any: `[L, E]`, in how many of them the largest difference of this expert and of those that differ
            less was at least this expert's observed one, each divided by its root mean square over the permutations
            and the observed labelling; what `statistics.family_wise_p_values` needs. None if none were drawn, and in
            files made without.
    """

    examples: Counts
    token_products: Counts
    squares_1: Counts
    squares_2: Counts
    with_tokens_1: Counts
    with_tokens_2: Counts
    products: Counts
    with_other_1: Counts
    with_other_2: Counts
    half_1: Counts
    half_2: Counts
    half_tokens: Counts
    exceeded: Counts
    permutations: Counts
    exceeded_by_any: Counts | None = None

    def tensors(self) -> dict[str, Counts]:
        """By name, as they stand in a file."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: np.ascontiguousarray(tensor, dtype=np.int64) for name, tensor in found.items() if tensor is not None
        }

    def check(self, counts: RoutingCounts, shape: MoEShape) -> None:
        """Raise RankingFormatError unless this can be the summary of examples that add up to `counts`."""
        expected = (len(shape.layers), shape.num_experts)
        for name, tensor in self.tensors().items():
            wanted = (_LENGTHS[name],) if name in _LENGTHS else expected
            if tensor.shape != wanted or tensor.min() < 0:
                raise RankingFormatError(f"{name} must have shape {list(wanted)} and no negative number")
        n = int(self.examples[0])
        if not 1 <= n <= int(counts.tokens.min()):
            raise RankingFormatError(f"{n} examples cannot hold {counts.tokens.tolist()} counted tokens")
        t11, t22, t12 = self.token_products.tolist()
        n1, n2 = counts.tokens.tolist()
        _require(t11 >= n1 and t22 >= n2, "token_products are smaller than the tokens")
        _require(t11 * n >= n1 * n1 and t22 * n >= n2 * n2 and t12 * t12 <= t11 * t22, "token_products contradict")
        sides = (
            (counts.activations_1, self.squares_1, self.with_tokens_1, self.with_other_1, t11),
            (counts.activations_2, self.squares_2, self.with_tokens_2, self.with_other_2, t22),
        )
        for side, (total, squares, own, other, own_tokens) in enumerate(sides, start=1):
            _require(_all(squares >= total), f"squares_{side} are smaller than the counts")
            _require(_covers(squares.astype(float) * n, total.astype(float) ** 2), f"squares_{side} are too small")
            _require(_all(squares <= own) and _all(own <= own_tokens), f"with_tokens_{side} are out of range")
            _require(_all(other <= t12), f"with_other_{side} exceed the tokens")
            # Each token selects K experts, so a layer's selections of an example are K times its tokens.
            _require(_all(own.sum(axis=1) == shape.top_k * own_tokens), f"with_tokens_{side} do not add up")
            _require(_all(other.sum(axis=1) == shape.top_k * t12), f"with_other_{side} do not add up")
        _require(_all(self.products <= self.with_other_1), "products exceed with_other_1")
        _require(_all(self.products <= self.with_other_2), "products exceed with_other_2")
        bound = self.squares_1.astype(float) * self.squares_2.astype(float)
        _require(_covers(bound, self.products.astype(float) ** 2), "products exceed what the squares allow")
        for side, (half, total) in enumerate(
            ((self.half_1, counts.activations_1), (self.half_2, counts.activations_2)), start=1
        ):
            _require(_all(half <= total), f"half_{side} exceeds the whole")
            sums = half.sum(axis=1)
            _require(_all(sums == shape.top_k * self.half_tokens[side - 1]), f"half_{side} does not add up")
        _require(_all(self.exceeded <= self.permutations[0]), "exceeded is larger than permutations")
        if self.exceeded_by_any is not None:
            between = (self.exceeded <= self.exceeded_by_any) & (self.exceeded_by_any <= self.permutations[0])
            _require(_all(between), "exceeded_by_any is not between exceeded and permutations")


def _all(found: NDArray[np.bool_]) -> bool:
    return bool(np.all(found))


def _covers(large: NDArray[np.float64], small: NDArray[np.float64]) -> bool:
    return bool(np.all(large * (1 + _SLACK) >= small))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RankingFormatError(f"the clustering summary is impossible: {what}")
