"""Routing counts: what a router chose, summed over counted tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from expert_registry.errors import RankingFormatError
from expert_registry.shape import MoEShape

Counts = NDArray[np.int64]

MAX_TOKENS = 1 << 40
"""Counted tokens per side; with at most 4096 experts, sums stay far from overflow."""


@dataclass(frozen=True, slots=True, eq=False)
class RoutingCounts:
    """How often each expert was among the top-k, over the counted tokens of the two sides.

    Attributes:
        activations_1, activations_2: int64 `[L, E]`, A1 and A2 (tokens that selected the expert).
        tokens: int64 `[2]`, N1 and N2 (counted tokens).
        layers: int64 `[L]`, checkpoint layer index of each row.
    """

    activations_1: Counts
    activations_2: Counts
    tokens: Counts
    layers: Counts

    def check(self, shape: MoEShape) -> None:
        """Raise RankingFormatError unless these counts can have come from a model of `shape`.

        Every counted token selects exactly K experts in each layer, so each row sums to K * N.
        """
        expected = (len(shape.layers), shape.num_experts)
        for side, counts in enumerate((self.activations_1, self.activations_2), start=1):
            if counts.shape != expected:
                raise RankingFormatError(
                    f"activations_{side} has shape {counts.shape}, but {shape} needs {expected} (layers, experts)"
                )
            if counts.dtype != np.int64:
                raise RankingFormatError(f"activations_{side} must be int64, got {counts.dtype}")
            tokens = int(self.tokens[side - 1])
            if not 1 <= tokens <= MAX_TOKENS:
                raise RankingFormatError(f"side {side} has {tokens} counted tokens; allowed: 1 to {MAX_TOKENS}")
            if counts.min() < 0 or counts.max() > tokens:
                raise RankingFormatError(f"activations_{side} must lie between 0 and its {tokens} counted tokens")
            sums = counts.sum(axis=1)
            wrong = np.flatnonzero(sums != shape.top_k * tokens)
            if wrong.size:
                row = int(wrong[0])
                raise RankingFormatError(
                    f"activations_{side}, layer {int(self.layers[row])}: {int(sums[row])} selections, "
                    f"but {tokens} tokens with top-{shape.top_k} make {shape.top_k * tokens}"
                )
        if tuple(int(x) for x in self.layers) != shape.layers:
            raise RankingFormatError(f"the file's layers {self.layers.tolist()} are not those of {shape}")

    def risk_difference(self) -> NDArray[np.float64]:
        """`A1/N1 - A2/N2`, float64 `[L, E]` in [-1, 1] (arXiv 2509.09660, section on expert detection)."""
        n1, n2 = (float(n) for n in self.tokens)
        return self.activations_1 / n1 - self.activations_2 / n2

    def rounded_difference(self) -> NDArray[np.float64]:
        """The risk difference by which experts are ordered: what differs by rounding alone is equal.

        Counts are integers, so this can only tie what differs by less than one token in 1e12; without it, equal
        fractions could be ordered by floating-point noise.
        """
        return np.round(self.risk_difference(), 12)
