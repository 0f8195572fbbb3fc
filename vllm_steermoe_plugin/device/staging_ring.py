"""Bytes on their way to the device: one asynchronous copy from pinned memory, and never into a copy's back.

Two things could go wrong when the host prepares step n + 1 while the device runs step n:

* *The host writes over bytes that a copy still reads.* A ring of host blocks prevents it: each remembers its last
  copy, and is not handed out before that copy is done.
* *A copy writes over device memory that step n still reads.* Order on the stream prevents it: copies go to the stream
  that is current when a step is prepared, and the model's forward pass (or the graph's replay) is put on the same
  stream after it, so a copy for step n + 1 starts after the kernels of step n. vLLM's runners prepare and run a step
  on one stream; micro-batching, which does not, is refused when the model is bound.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

RING_DEPTH = 4
"""Host blocks. vLLM has two steps under way under asynchronous scheduling, and one per stage under pipeline
parallelism; with more steps than blocks the host waits for the oldest copy."""


class Copy(Protocol):
    """A copy under way; `torch.cuda.Event` is one."""

    def query(self) -> bool:
        """Whether it is done."""
        ...

    def synchronize(self) -> None:
        """Wait until it is done."""
        ...


class Carrier(Protocol):
    """What takes bytes from the host to a device."""

    def allocate(self, size: int) -> torch.Tensor:
        """Host memory uint8 `[size]`, zeros."""
        ...

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Copy | None:
        """Start copying `source` (of what `allocate` gave) to `target`; None if it is already done."""
        ...


class PlainCarrier:
    """To the CPU, or to any device without streams: the copy is done when `send` returns."""

    def allocate(self, size: int) -> torch.Tensor:
        """Ordinary memory."""
        return torch.zeros(size, dtype=torch.uint8, device="cpu")

    def send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy, and wait."""
        target.copy_(source)


class PinnedCarrier:
    """To a CUDA device, on the current stream, without waiting."""

    def allocate(self, size: int) -> torch.Tensor:
        """Page-locked memory, which the device reads by itself."""
        # vLLM builds models under a default device, so the CPU is named.
        return torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def send(self, source: torch.Tensor, target: torch.Tensor) -> Copy:
        """Queue the copy; the event that is returned follows it on the stream."""
        target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


class StagingRing:
    """A block of device memory and a few host blocks of its size; see the module.

    Attributes:
        device_block: uint8 `[size]` on the device.
        depth: host blocks.
        copies: how many were started.
        waits: how often the host had to wait for one.
    """

    def __init__(
        self, size: int, device: torch.device, *, carrier: Carrier | None = None, depth: int = RING_DEPTH
    ) -> None:
        if carrier is None:
            carrier = PinnedCarrier() if device.type == "cuda" else PlainCarrier()
        self._carrier = carrier
        self.depth = depth
        self._blocks = [carrier.allocate(size) for _ in range(depth)]
        self._copy_of: list[Copy | None] = [None] * depth
        self._next = 0
        self.device_block = torch.zeros(size, dtype=torch.uint8, device=device)
        self.copies = 0
        self.waits = 0

    def take(self) -> NDArray[np.uint8]:
        """The host block for the next `send`, which no copy reads any more. Its bytes are those of an earlier copy."""
        copy = self._copy_of[self._next]
        if copy is not None and not copy.query():
            self.waits += 1
            copy.synchronize()
        return self._blocks[self._next].numpy()

    def send(self, start: int, stop: int) -> None:
        """Copy bytes `start` to `stop` of the block that was taken to the same place on the device."""
        self._copy_of[self._next] = self._carrier.send(
            self._blocks[self._next][start:stop], self.device_block[start:stop]
        )
        self._next = (self._next + 1) % self.depth
        self.copies += 1
