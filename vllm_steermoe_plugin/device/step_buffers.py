"""The device buffers that a step's graph reads, and how they are brought up to date: one copy per step.

The staging block is `[ ... record record | active | marks ]`. A record is a rule table that is new on this worker, with
its slot; `active` is what the step's rules do in each layer; marks are what each token is. Records fill the front part
from its end, marks the rear part from its start, so that whatever a step has to say is one run of bytes. `active` and
marks are read by the kernels where they arrive; records are then put into their slots by one more operation on the
device, in steps that have any.

Axes: T tokens of a step, S slots, L MoE layers of this worker, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_steermoe_plugin.device.staging_ring import Carrier, StagingRing

ROWS_PER_COPY = 64
"""Rule tables that fit in one copy. A step with more new profiles makes more copies."""

_ALIGNMENT = 256
_SLOT_BYTES = 8

Table = tuple[int, NDArray[np.float16]]
"""A slot and its rules `[L, E]`."""


class StepBuffers:
    """Rules by slot, and slots and groups by token, on the device.

    Attributes:
        rules: float16 `[S, L, E]`.
        active: uint8 `[L]`, bits as in `RuleTable.does`: of the rules of all tokens of the step together.
        token_slots: int32 `[max T]`.
        token_groups: int32 `[max T]`; never written if nothing can be counted.
    """

    def __init__(
        self,
        slots: int,
        layers: int,
        experts: int,
        max_tokens: int,
        *,
        counting: bool,
        device: torch.device,
        carrier: Carrier | None = None,
    ) -> None:
        self.rules = torch.zeros((slots, layers, experts), dtype=torch.float16, device=device)
        self._rule_bytes = layers * experts * self.rules.element_size()
        self._record_bytes = _SLOT_BYTES + -(-self._rule_bytes // _SLOT_BYTES) * _SLOT_BYTES
        self._records = min(ROWS_PER_COPY, slots)
        self._active_at = -(-self._records * self._record_bytes // _ALIGNMENT) * _ALIGNMENT
        self._marks_at = self._active_at + -(-layers // _ALIGNMENT) * _ALIGNMENT
        # Serving does not count, and then a mark is a slot alone.
        self._width = 2 if counting else 1
        self._mark_bytes = 4 * self._width
        self.staging = StagingRing(self._marks_at + max_tokens * self._mark_bytes, device, carrier=carrier)
        marks = self.staging.device_block[self._marks_at :].view(torch.int32).view(max_tokens, self._width)
        self._device_marks = marks
        self.active = self.staging.device_block[self._active_at : self._active_at + layers]
        self.token_slots = marks[:, 0]
        self.token_groups = marks[:, 1] if counting else torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self._sent = np.zeros((max_tokens, self._width), dtype=np.int32)
        self._sent_active = np.zeros(layers, dtype=np.uint8)
        self._used = 0

    @property
    def num_bytes(self) -> tuple[int, int]:
        """Bytes on the device, and of pinned memory on the host."""
        staged = self.staging.device_block.numel()
        separate = 0 if self._width == 2 else self.token_groups.numel() * 4
        return self.rules.nbytes + staged + separate, staged * self.staging.depth

    def write(
        self,
        slots: NDArray[np.int32],
        groups: NDArray[np.int32],
        tables: Sequence[Table],
        active: NDArray[np.uint8],
    ) -> None:
        """Bring the device up to date for a step of `len(slots)` tokens; nothing is copied if it already is.

        `active` is `[L]`, as the attribute. Tokens of the step before that are beyond this one are cleared.

        Raises:
            ValueError: a step of more tokens than there is room for.
        """
        if len(slots) > len(self._sent):
            raise ValueError(f"a step of {len(slots)} tokens; there is room for {len(self._sent)}")
        count = max(len(slots), self._used)
        marks = np.zeros((count, self._width), dtype=np.int32)
        marks[: len(slots), 0] = slots
        if self._width == 2:
            marks[: len(slots), 1] = groups
        # Until all of it has been sent, for `clear` to reach what the step before has marked.
        self._used = count
        for first in range(0, len(tables) - self._records, self._records):
            self._send(tables[first : first + self._records], active, marks[:0])
        rest = tables[(len(tables) - 1) // self._records * self._records :] if tables else ()
        if rest or not (np.array_equal(marks, self._sent[:count]) and np.array_equal(active, self._sent_active)):
            # No mark is negative: should the copy fail, the next step does not take these for sent.
            self._sent[:count] = -1
            self._send(rest, active, marks)
            self._sent[:count], self._sent_active[:] = marks, active
        self._used = len(slots)

    def clear(self) -> None:
        """Mark no token; nothing is done if none is marked."""
        if self._used:
            self._device_marks[: self._used].zero_()
            self.active.zero_()
            self._sent[: self._used], self._sent_active[:] = 0, 0
            self._used = 0

    def _send(self, tables: Sequence[Table], active: NDArray[np.uint8], marks: NDArray[np.int32]) -> None:
        block = self.staging.take()
        start = self._active_at - len(tables) * self._record_bytes
        stop = self._marks_at + len(marks) * self._mark_bytes
        block[self._marks_at : stop].view(np.int32)[:] = marks.reshape(-1)
        block[self._active_at : self._active_at + len(active)] = active
        records = block[start : self._active_at].reshape(len(tables), self._record_bytes)
        for record, (slot, rules) in zip(records, tables, strict=True):
            record[:_SLOT_BYTES].view(np.int64)[0] = slot
            record[_SLOT_BYTES : _SLOT_BYTES + self._rule_bytes].view(np.float16)[:] = rules.reshape(-1)
        self.staging.send(start, stop)
        if tables:
            arrived = self.staging.device_block[start : self._active_at].view(len(tables), self._record_bytes)
            rows = arrived[:, _SLOT_BYTES : _SLOT_BYTES + self._rule_bytes].view(torch.float16)
            into = arrived[:, :_SLOT_BYTES].view(torch.int64)[:, 0]
            self.rules.view(len(self.rules), -1).index_copy_(0, into, rows)
