"""What a step costs the host: preparing it, and launching what no CUDA graph holds. Needs a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.rows import HostTime
from vllm_steermoe_plugin.device.ops import rewrite_
from vllm_steermoe_plugin.device.step_buffers import StepBuffers, Table
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE, FORCES

SLOTS, LAYERS, EXPERTS, TOKENS = 257, 48, 128, 8192
LAUNCHED = f"{LAYERS} launches, not captured"
_REPEATS = 200


def measure(device: torch.device) -> Iterator[HostTime]:
    """Steps like the one before, with other slots, with a new profile too; and the launches of a step."""
    buffers = StepBuffers(SLOTS, LAYERS, EXPERTS, TOKENS, counting=False, device=device)
    chance = np.random.default_rng(0)
    table = chance.choice([DEACTIVATE, 0, ACTIVATE], (LAYERS, EXPERTS)).astype(np.float16)
    forces = np.full(LAYERS, FORCES, dtype=np.uint8)
    for tokens in (1, 64, TOKENS):
        slots = [chance.integers(1, SLOTS, tokens).astype(np.int32) for _ in range(2)]
        nothing = np.zeros(tokens, dtype=np.int32)

        def step(index: int, slots: Sequence[NDArray[np.int32]], tables: int, nothing: NDArray[np.int32]) -> None:
            new: list[Table] = [(1 + index % 9, table)] * tables
            buffers.write(slots[index % len(slots)], nothing, new, forces)

        for name, arguments in (
            ("nothing is new", (slots[:1], 0)),
            ("other slots", (slots, 0)),
            ("other slots and a new profile", (slots, 1)),
        ):
            yield HostTime(
                name, tokens, _median(partial(step, slots=arguments[0], tables=arguments[1], nothing=nothing))
            )
        buffers.write(slots[0], nothing, [], forces)
        yield HostTime(LAUNCHED, tokens, _median(partial(_launch, _logits(device, tokens), buffers)))


def _logits(device: torch.device, tokens: int) -> torch.Tensor:
    return torch.randn((tokens, EXPERTS), device=device).bfloat16()


def _launch(logits: torch.Tensor, buffers: StepBuffers, index: int) -> None:
    for row in range(LAYERS):
        rewrite_(logits, buffers.rules, buffers.token_slots, buffers.active, row)


def _median(step: Callable[[int], None]) -> float:
    times = []
    for index in range(_REPEATS):
        started = time.perf_counter()
        step(index)
        times.append(1e6 * (time.perf_counter() - started))
        # The device keeps up, as it does while it serves: a step takes it milliseconds.
        torch.cuda.synchronize()
    return statistics.median(times[_REPEATS // 4 :])
