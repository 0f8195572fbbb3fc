"""The counters of one worker: which experts the tokens that a request marks have selected.

The graph adds selections to a buffer on the device; which token is of which group is marked here, before each step.

Axes: L MoE layers of this worker, E experts, G groups.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray

from expert_registry.errors import EngineError
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans

REMEMBERED_IDS = 1 << 16
"""Requests of which it is remembered that they were counted, or how far. A preempted request is dropped like one that
has ended, and is the first to go on, long before as many others have come."""


class Counters:
    """Selections by group, layer and expert.

    Attributes:
        selections: int64 `[L, G + 1, E]` on the device; group 0 is not counted.
        tokens: int64 `[G + 1]`, how many were marked in each group.
    """

    def __init__(self, layers: int, groups: int, experts: int, top_k: int, device: torch.device) -> None:
        """Allocate them.

        Args:
            layers: L.
            groups: G; 0 for no counting.
            experts: E.
            top_k: experts that each token selects in each layer.
            device: of the model.
        """
        self.selections = torch.zeros((layers, groups + 1, experts), dtype=torch.int64, device=device)
        self._top_k = top_k
        self.tokens = np.zeros(groups + 1, dtype=np.int64)
        self._counted_until: OrderedDict[str, int] = OrderedDict()

    @property
    def groups(self) -> int:
        """G."""
        return self.selections.shape[1] - 1

    def mark(self, groups: NDArray[np.int32], request_id: str, first_position: int, counted: CountedSpans) -> None:
        """Write into `groups` the group of each token of a request's share of a step, where it is to be counted.

        A preempted request computes its tokens again; each position counts once.

        Args:
            groups: int32, zeros, one for each of its tokens.
            request_id: whose tokens they are.
            first_position: of the first of them.
            counted: what the request asks for.
        """
        begin = max(first_position, self._counted_until.get(request_id, 0))
        end = first_position + len(groups)
        before = 0
        for start, stop in counted.ranges:
            low, high = max(start, begin), min(stop, end)
            if low < high:
                first = counted.group + before + low - start
                into = np.arange(first, first + high - low) if counted.each else counted.group
                groups[low - first_position : high - first_position] = into
                self.tokens[into] += 1 if counted.each else high - low
            before += stop - start
        self._counted_until[request_id] = max(end, begin)
        self._counted_until.move_to_end(request_id)
        if len(self._counted_until) > REMEMBERED_IDS:
            self._counted_until.popitem(last=False)

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Selections int64 `[G, L, E]` and counted tokens int64 `[G]` since the last reset.

        Raises:
            EngineError: the selections do not sum to top-k per counted token, so something was
                counted that should not have been, or the reverse.
        """
        selections = self.selections.cpu().numpy().transpose(1, 0, 2)[1:].copy()
        tokens = self.tokens[1:].copy()
        expected = tokens[:, None] * self._top_k
        if not np.array_equal(selections.sum(axis=2), np.broadcast_to(expected, selections.shape[:2])):
            raise EngineError(
                f"routing counts are inconsistent: {tokens.tolist()} counted tokens per group with "
                f"top-{self._top_k}, but selections per layer are {selections.sum(axis=2).tolist()}"
            )
        return selections, tokens

    def reset(self) -> None:
        """Start counting anew."""
        self.selections.zero_()
        self.tokens[:] = 0
        self._counted_until.clear()
