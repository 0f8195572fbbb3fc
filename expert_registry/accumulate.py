"""Add up the routing of pairs, a chunk at a time, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expert_registry.clusters import ClusterSummary
from expert_registry.counts import Counts, RoutingCounts
from expert_registry.errors import RankingFormatError

_EXACT_IN_FLOAT32 = 1 << 24
_ROWS_AT_ONCE = 64
_SUMS = (
    "squares_1",
    "squares_2",
    "with_tokens_1",
    "with_tokens_2",
    "products",
    "with_other_1",
    "with_other_2",
    "half_1",
    "half_2",
)
_NONE = -1
"""Number of the last cluster before there is one."""
_ROUNDING = 1e-12
"""Differences of fractions of tokens that are less apart are the same."""


class ExampleSums:
    """Running sums over examples: the counts, the clustering summary and the totals of the permutations.

    An example is a cluster: all pairs that share a document or the like, or one pair that shares nothing.
    Which examples are in the random half, and which sides each permutation swaps, depends on the seed and
    the cluster's number only: not on the chunks, and not on whether the run was interrupted.
    """

    def __init__(self, layers: int, experts: int, *, permutations: int = 0, seed: int = 0) -> None:
        """Start at zero for `[layers, experts]`."""
        self._shape = (layers, experts)
        self._seed = seed
        self._sums: dict[str, Counts] = {
            name: np.zeros(self._shape, dtype=np.int64) for name in ("activations_1", "activations_2", *_SUMS)
        }
        self._sums |= {
            "tokens": np.zeros(2, dtype=np.int64),
            "pairs": np.zeros(1, dtype=np.int64),
            "examples": np.zeros(1, dtype=np.int64),
            "token_products": np.zeros(3, dtype=np.int64),
            "half_tokens": np.zeros(2, dtype=np.int64),
            # Of side 1 under each permutation; side 2 has the rest.
            "swapped": np.zeros((permutations, layers * experts), dtype=np.int64),
            "swapped_tokens": np.zeros(permutations, dtype=np.int64),
            # The last cluster, to which pairs may still come: it is in the sums, and taken out when they do.
            "last": np.full(1, _NONE, dtype=np.int64),
            "last_selections": np.zeros((2, *self._shape), dtype=np.int64),
            "last_tokens": np.zeros(2, dtype=np.int64),
        }

    @property
    def pairs(self) -> int:
        """How many were added."""
        return int(self._sums["pairs"][0])

    @property
    def examples(self) -> int:
        """How many clusters the pairs are of."""
        return int(self._sums["examples"][0])

    def add(self, numbers: Sequence[int], selections: Counts, tokens: Counts) -> None:
        """Add n pairs.

        Args:
            numbers: of each pair's cluster, the same for pairs of one cluster (also those of the call before).
                Never descending, so that no cluster is taken for two.
            selections: int64 `[n, 2, L, E]`.
            tokens: int64 `[n, 2]`.

        Raises:
            ValueError: the numbers descend.
        """
        if not len(numbers):
            return
        sums = self._sums
        places = np.asarray(numbers, dtype=np.int64)
        if np.any(np.diff(places, prepend=sums["last"]) < 0):
            raise ValueError("numbers of clusters must not descend: pairs of one cluster are added one after another")
        sums["pairs"] += len(tokens)
        starts = np.flatnonzero(np.diff(places, prepend=_NONE))
        if len(starts) < len(tokens):
            selections, tokens = np.add.reduceat(selections, starts), np.add.reduceat(tokens, starts)
        one, two = selections[:, 0], selections[:, 1]
        sums["activations_1"] += one.sum(axis=0)
        sums["activations_2"] += two.sum(axis=0)
        sums["tokens"] += tokens.sum(axis=0)
        draws = self._draws(places[starts].tolist())
        half = draws[:, 0].astype(bool)
        sums["half_1"] += one[half].sum(axis=0)
        sums["half_2"] += two[half].sum(axis=0)
        sums["half_tokens"] += tokens[half].sum(axis=0)
        self._swap(draws[:, 1:], one, two, tokens)
        last, its_tokens = sums["last_selections"], sums["last_tokens"]
        if places[0] == sums["last"]:
            self._square(last[None], its_tokens[None], sign=-1)
            selections, tokens = selections.copy(), tokens.copy()
            selections[0] += last
            tokens[0] += its_tokens
        self._square(selections, tokens)
        last[...], its_tokens[...], sums["last"][0] = selections[-1], tokens[-1], places[-1]

    def _square(self, selections: Counts, tokens: Counts, sign: int = 1) -> None:
        """Add, or take out, what is not the same for a cluster as for its pairs one by one."""
        sums = self._sums
        one, two = selections[:, 0], selections[:, 1]
        n1, n2 = tokens[:, 0], tokens[:, 1]
        sums["examples"] += sign * len(tokens)
        sums["token_products"] += sign * np.asarray([n1 @ n1, n2 @ n2, n1 @ n2])
        for name, a, b in (("squares_1", one, one), ("squares_2", two, two), ("products", one, two)):
            sums[name] += sign * np.einsum("nle,nle->le", a, b)
        for name, a, weights in (
            ("with_tokens_1", one, n1),
            ("with_tokens_2", two, n2),
            ("with_other_1", one, n2),
            ("with_other_2", two, n1),
        ):
            sums[name] += sign * np.einsum("nle,n->le", a, weights)

    def _draws(self, numbers: Sequence[int]) -> NDArray[np.int8]:
        """0 or 1, `[n, 1 + permutations]`."""
        width = 1 + len(self._sums["swapped"])
        return np.stack(
            [np.random.default_rng((self._seed, index)).integers(0, 2, width, dtype=np.int8) for index in numbers]
        )

    def _swap(self, swaps: NDArray[np.int8], one: Counts, two: Counts, tokens: Counts) -> None:
        if not swaps.shape[1]:
            return
        # A product in floating point is exact while no sum leaves the integers that it can hold.
        exact = np.float32 if int(tokens.sum()) < _EXACT_IN_FLOAT32 else np.float64
        moved = (two - one).reshape(len(one), -1).astype(exact)
        self._sums["swapped"] += one.sum(axis=0).reshape(-1)
        changes: NDArray[np.floating[Any]] = np.matmul(swaps.T.astype(exact), moved)
        self._sums["swapped"] += changes.astype(np.int64)
        self._sums["swapped_tokens"] += tokens[:, 0].sum() + swaps.T.astype(np.int64) @ (tokens[:, 1] - tokens[:, 0])

    def counts(self, layers: tuple[int, ...]) -> RoutingCounts:
        """The counts so far; `layers` are the checkpoint's indices."""
        sums = self._sums
        return RoutingCounts(
            sums["activations_1"].copy(),
            sums["activations_2"].copy(),
            sums["tokens"].copy(),
            np.asarray(layers, dtype=np.int64),
        )

    def summary(self) -> ClusterSummary:
        """The clustering summary so far."""
        sums = self._sums
        kept = {name: sums[name].copy() for name in ("examples", "token_products", "half_tokens", *_SUMS)}
        drawn = np.asarray([len(sums["swapped"])], dtype=np.int64)
        exceeded, by_any = self._exceeded()
        return ClusterSummary(**kept, exceeded=exceeded, permutations=drawn, exceeded_by_any=by_any)

    def _exceeded(self) -> tuple[Counts, Counts | None]:
        """`exceeded` and `exceeded_by_any` of the summary."""
        sums = self._sums
        n1, n2 = (int(n) for n in sums["tokens"])
        observed = np.abs(sums["activations_1"] / n1 - sums["activations_2"] / n2).reshape(-1)
        exceeded = np.zeros(observed.size, dtype=np.int64)
        # The spread holds the observed labelling too, so that it is the same whichever of them was observed.
        squares = observed**2
        for drawn in self._permuted():
            exceeded += (drawn >= observed - _ROUNDING).sum(axis=0)
            squares += (drawn**2).sum(axis=0)
        number = len(sums["swapped"])
        if not number:
            return exceeded.reshape(self._shape), None
        spread = np.maximum(np.sqrt(squares / (1 + number)), _ROUNDING)
        order = np.argsort(-observed / spread, kind="stable")
        least = ((observed - _ROUNDING) / spread)[order]
        by_any = np.zeros_like(exceeded)
        for drawn in self._permuted():
            # Of each expert and those after it, the largest (step-down).
            largest = np.maximum.accumulate((drawn / spread)[:, order[::-1]], axis=1)[:, ::-1]
            by_any += (largest >= least).sum(axis=0)
        by_any[order] = np.maximum.accumulate(by_any)
        return exceeded.reshape(self._shape), by_any.reshape(self._shape)

    def _permuted(self) -> Iterator[NDArray[np.float64]]:
        """Absolute risk differences under the permutations, some at a time, `[some, L * E]`."""
        sums = self._sums
        whole = (sums["activations_1"] + sums["activations_2"]).reshape(-1)
        for start in range(0, len(sums["swapped"]), _ROWS_AT_ONCE):
            one = sums["swapped"][start : start + _ROWS_AT_ONCE]
            tokens = sums["swapped_tokens"][start : start + _ROWS_AT_ONCE, None]
            yield np.abs(one / tokens - (whole - one) / (int(sums["tokens"].sum()) - tokens))

    def tensors(self) -> dict[str, Counts]:
        """Everything, to go on from later."""
        return dict(self._sums)

    def restore(self, tensors: Mapping[str, Counts]) -> None:
        """Go on from what `tensors` gave.

        Raises:
            RankingFormatError: it is of other shapes.
        """
        for name, mine in self._sums.items():
            theirs = tensors.get(name)
            if theirs is None or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
                raise RankingFormatError(f"the sums do not fit: {name} should be {mine.dtype} {list(mine.shape)}")
            mine[...] = theirs
