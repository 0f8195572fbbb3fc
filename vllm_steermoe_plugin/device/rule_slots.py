"""Which slot of the device's rule buffer holds which profile.

Slot 0 has no rule. There is a slot for each request that can be in a batch, so slots cannot run out: a profile
keeps its slot while it is used and loses it only to a profile of a later step that needs one.

Axes: S slots, L MoE layers of this worker, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vllm_steermoe_plugin.device.step_buffers import Table
from vllm_steermoe_plugin.steering.rules import RuleTable


class Slots:
    """Slots by the digest of their rules, as last written to the device."""

    def __init__(self, max_requests: int, rows: Sequence[int]) -> None:
        """Start with all of them free.

        Args:
            max_requests: requests in one step at most; S is one more.
            rows: of the model's MoE layers, which L are on this worker.
        """
        self._rows = list(rows)
        self._slot_of: dict[str, int] = {}
        self._does = np.zeros((max_requests + 1, len(self._rows)), dtype=np.uint8)

    @property
    def slot_of(self) -> Mapping[str, int]:
        """Slot by digest, of what is on the device."""
        return self._slot_of

    def place(self, needed: Mapping[str, RuleTable]) -> tuple[dict[str, int], list[Table]]:
        """Slots by digest once a step with the rules `needed` is written, and those of them that have to be."""
        missing = [digest for digest in needed if digest not in self._slot_of]
        if not missing:
            return self._slot_of, []
        placed = dict(self._slot_of)
        new: list[Table] = []
        taken = set(placed.values())
        free = [slot for slot in range(len(self._does) - 1, 0, -1) if slot not in taken]
        idle = [digest for digest in placed if digest not in needed]
        for digest in missing:
            slot = free.pop() if free else placed.pop(idle.pop(0))
            new.append((slot, needed[digest].rules[self._rows]))
            self._does[slot] = needed[digest].does[self._rows]
            placed[digest] = slot
        return placed, new

    def written(self, placed: dict[str, int]) -> None:
        """Take note of what is on the device now; nothing of it is known while it is being written."""
        self._slot_of = placed

    def active_layers(self, slots: Iterable[int]) -> NDArray[np.uint8]:
        """What the rules of some slots do in a layer, together: uint8 `[L]`, bits as in `RuleTable.does`."""
        layers: NDArray[np.uint8] = np.bitwise_or.reduce(self._does[list(slots)], axis=0)
        return layers
