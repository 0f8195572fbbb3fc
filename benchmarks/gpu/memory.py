"""Bytes that the buffers of one worker take. Needs a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.models import MODELS
from vllm_steermoe_plugin.device.step_buffers import StepBuffers

REQUESTS, TOKENS = 256, 8192
"""Requests and tokens in a step at most."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes for one model: counted, allocated on the device, and pinned on the host."""

    model: str
    buffers: int
    allocated: int
    pinned: int


def measure(device: torch.device) -> Iterator[Footprint]:
    """All six models, for `REQUESTS` and `TOKENS`, when nothing can be counted."""
    for model in MODELS:
        # What others left for the garbage collector must not go while this is measured.
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        buffers = StepBuffers(REQUESTS + 1, model.layers, model.experts, TOKENS, counting=False, device=device)
        on_device, pinned = buffers.num_bytes
        yield Footprint(model.name, on_device, torch.cuda.memory_allocated(device) - before, pinned)
        del buffers
