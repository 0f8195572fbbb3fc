"""Time per launch inside a CUDA graph of many launches, beside the two floors. Needs a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.gpu import floors
from benchmarks.gpu.graphs import capture
from benchmarks.gpu.models import MODELS, Model
from benchmarks.gpu.rows import STEPS, Row
from vllm_steermoe_plugin.ops import count_, rewrite_

DTYPES = (torch.bfloat16, torch.float32)
LAUNCHES = 192
REPLAYS = 30
_PROFILES = 8
_FAR_MORE_THAN_CACHE = 256 << 20
"""Bytes over which a large step's logits rotate (or `LAUNCHES` buffers, if they are small), so that they come from
memory; a small step's are in the cache, as they are when a router has just written them."""
_LARGE = 4096
_BIG_COPY = 1 << 30


def median_time(run: Callable[[], None]) -> float:
    """Microseconds on the device from before to after `run`: the median of many, after a few that do not count."""
    times = []
    for _ in range(REPLAYS + 3):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1000 * float(start.elapsed_time(end)))
    return statistics.median(times[3:])


def per_launch(launch: Callable[[int], None]) -> float:
    """Microseconds of one of `LAUNCHES` launches in a graph: the median over replays. `launch` gets their number."""

    def run() -> None:
        for index in range(LAUNCHES):
            launch(index)

    return median_time(capture(run).replay) / LAUNCHES


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per microsecond, read plus written, of a large copy by a kernel."""
    source = torch.randint(0, 255, (_BIG_COPY,), dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    return 2 * _BIG_COPY / median_time(lambda: floors.copy(source, target))


def measure(device: torch.device) -> list[Row]:
    """All six models, T and dtypes."""
    bandwidth = measure_bandwidth(device)
    nothing = torch.zeros(1, device=device)
    empty = per_launch(lambda _: floors.empty(nothing))
    rows = []
    for model in MODELS:
        for tokens in STEPS:
            for dtype in DTYPES:
                rows.append(_measure_one(device, model, tokens, dtype, bandwidth, empty))
                torch.cuda.empty_cache()
    return rows


def _measure_one(
    device: torch.device, model: Model, tokens: int, dtype: torch.dtype, bandwidth: float, empty: float
) -> Row:
    generator = torch.Generator(device).manual_seed(5)
    layers, experts = model.layers, model.experts
    size = tokens * experts * dtype.itemsize
    sets = -(-_FAR_MORE_THAN_CACHE // size) if tokens >= _LARGE else layers
    logits = [
        torch.randn((tokens, experts), generator=generator, device=device).to(dtype) for _ in range(min(sets, LAUNCHES))
    ]
    rules = torch.randint(-1, 2, (_PROFILES + 1, layers, experts), generator=generator, device=device).to(torch.int8)
    rules[0] = 0
    elsewhere = torch.zeros_like(rules)
    steered = torch.randint(1, _PROFILES + 1, (tokens,), generator=generator, device=device, dtype=torch.int32)
    nobody = torch.zeros_like(steered)
    active = torch.ones(layers, dtype=torch.bool, device=device)

    def rewrite(rules: torch.Tensor, slots: torch.Tensor) -> float:
        return per_launch(lambda i: rewrite_(logits[i % len(logits)], rules, slots, active, i % layers))

    ids = torch.rand((tokens, experts), generator=generator, device=device).argsort(-1)[:, : model.top_k].int()
    counters = torch.zeros((layers, _PROFILES + 1, experts), dtype=torch.int64, device=device)

    def count(groups: torch.Tensor) -> float:
        return per_launch(lambda i: count_(ids, counters, groups, i % layers))

    targets = [torch.empty_like(logits[0]) for _ in range(len(logits))]
    return Row(
        model=model.name,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        num_bytes=2 * size + 4 * tokens,
        empty=empty,
        at_bandwidth=(2 * size + 4 * tokens) / bandwidth,
        copy=per_launch(lambda i: floors.copy(logits[i % len(logits)], targets[i % len(targets)])),
        idle=rewrite(rules, nobody),
        elsewhere=rewrite(elsewhere, steered),
        steered=rewrite(rules, steered),
        count_idle=count(nobody),
        count=count(steered),
    )
