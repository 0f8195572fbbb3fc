"""Time per launch inside a CUDA graph of many launches, beside the two floors. Needs a GPU."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu import floors
from benchmarks.gpu.graphs import capture
from benchmarks.gpu.machine import clock_rate
from benchmarks.gpu.models import CORRECTED, MODELS, Model
from benchmarks.gpu.records import Record
from benchmarks.gpu.rows import STEPS, ColdTime, Row, SelectionRow
from vllm_steermoe_plugin.device.ops import count_, reselect_, rewrite_
from vllm_steermoe_plugin.device.rewrite import forcing
from vllm_steermoe_plugin.steering.rule_values import BIASES, FORCES

DTYPES = (torch.bfloat16, torch.float32)
LAUNCHES = 192
REPLAYS = 30
_WARM_UPS = 3
_WARM_UP_SECONDS = 0.02
"""Before each row, since the clock rate sinks while the host prepares it."""
_PROFILES = 8
_FAR_MORE_THAN_CACHE = 256 << 20
"""Bytes over which a large step's logits rotate (or `LAUNCHES` buffers, if they are small), so that they come from
memory; a small step's are in the cache, as they are when a router has just written them."""
_LARGE = 4096
COLD_STEPS = (1, 64)
SELECTION_STEPS = (1, 64, 512, 8192)
SELECTIONS = ((*CORRECTED, MODELS[-1]), torch.float32)
"""Whose correction is timed, and its logits' dtype: that of gates with a bias."""
_MORE_THAN_CACHE = 128 << 20
"""Bytes that a copy before each launch reads and writes."""
_BIG_COPY = 1 << 30
_WAKING = 300
"""Big copies before anything is timed (about 0.2 s): a GPU that was idle runs at a fraction of its clock rate."""


class Timing(NamedTuple):
    """Microseconds of one launch: the median over replays, and the range of their middle half."""

    median: float
    spread: float


def time_once(run: Callable[[], None]) -> float:
    """Microseconds on the device from before to after `run`."""
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1000 * float(start.elapsed_time(end))


def times_of(launches: Mapping[str, Callable[[int], None]], replays: int = REPLAYS) -> dict[str, Timing]:
    """Of each, one of `LAUNCHES` launches in a graph; a launch gets its number. The graphs take turns.

    So a clock rate that changes meanwhile is the same for all of them.
    """

    def captured(launch: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            for index in range(LAUNCHES):
                launch(index)

        graph = capture(run)
        # The method holds its graph.
        replay: Callable[[], None] = graph.replay
        return replay

    graphs = {name: captured(launch) for name, launch in launches.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    started, turns = time.monotonic(), 0
    while turns < _WARM_UPS or time.monotonic() - started < _WARM_UP_SECONDS:
        for replay in graphs.values():
            time_once(replay)
        turns += 1
    for _ in range(replays):
        for name, replay in graphs.items():
            times[name].append(time_once(replay) / LAUNCHES)
    found = {}
    for name, taken_times in times.items():
        low, middle, high = statistics.quantiles(taken_times, n=4)
        found[name] = Timing(middle, high - low)
    return found


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per microsecond, read plus written, of a large copy by a kernel; the GPU is awake afterwards."""
    source = torch.randint(0, 255, (_BIG_COPY,), dtype=torch.uint8, device=device).view(torch.float32)
    target = torch.empty_like(source)
    for _ in range(_WAKING):
        floors.copy(source, target)
    return 2 * _BIG_COPY / statistics.median(time_once(lambda: floors.copy(source, target)) for _ in range(REPLAYS))


def all_rows(device: torch.device) -> Iterator[tuple[str, Callable[[], Record]]]:
    """All six models, T and dtypes, by name; what goals are judged by comes first."""
    bandwidth = measure_bandwidth(device)
    for dtype in DTYPES:
        for tokens in sorted(STEPS, key=lambda step: step == 512):
            for model in MODELS:
                name = f"time, {model.name}, T={tokens}, {dtype}"
                yield name, partial(_measure_one, device, model, tokens, dtype, bandwidth)
    for tokens, model in itertools.product(COLD_STEPS, MODELS):
        yield f"time, {model.name}, T={tokens}, cold", partial(_measure_cold, device, model, tokens)


def selection_rows(device: torch.device) -> Iterator[tuple[str, Callable[[], Record]]]:
    """The correction for models whose selection is corrected, and for one whose gate is steered instead; by name."""
    measure_bandwidth(device)
    models, dtype = SELECTIONS
    for tokens, model in itertools.product(SELECTION_STEPS, models):
        yield f"correction, {model.name}, T={tokens}", partial(_measure_selection, device, model, tokens, dtype)


def make_logits(
    device: torch.device, tokens: int, experts: int, dtype: torch.dtype, layers: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """Random logits `[T, E]` of as many layers as it takes to be in the cache, or not to be, as in a model."""
    size = tokens * experts * dtype.itemsize
    sets = -(-_FAR_MORE_THAN_CACHE // size) if tokens >= _LARGE else layers
    return [
        torch.randn((tokens, experts), generator=generator, device=device).to(dtype) for _ in range(min(sets, LAUNCHES))
    ]


class _Inputs:
    """What the rewrite of a model's layers gets: random logits, and rules of some profiles."""

    def __init__(self, device: torch.device, model: Model, tokens: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator(device).manual_seed(5)
        layers, experts = model.layers, model.experts
        self.logits = make_logits(device, tokens, experts, dtype, layers, self.generator)
        shape = (_PROFILES + 1, layers, experts)
        self.rules = forcing(torch.randint(-1, 2, shape, generator=self.generator, device=device))
        self.rules[0] = 0
        self.steered = torch.randint(
            1, _PROFILES + 1, (tokens,), generator=self.generator, device=device, dtype=torch.int32
        )
        self.nobody = torch.zeros_like(self.steered)
        self.nothing = torch.zeros(1, device=device)
        self.layers = layers

    def rewrite(self, rules: torch.Tensor, slots: torch.Tensor, does: int = FORCES) -> Callable[[int], None]:
        """The launch of each layer in turn, in a step whose rules do the same in all."""
        logits = self.logits
        active = torch.full((self.layers,), does, dtype=torch.uint8, device=rules.device)
        return lambda i: rewrite_(logits[i % len(logits)], rules, slots, active, i % len(active))


def _measure_one(device: torch.device, model: Model, tokens: int, dtype: torch.dtype, bandwidth: float) -> Row:
    inputs = _Inputs(device, model, tokens, dtype)
    layers, experts = model.layers, model.experts
    logits, rules, steered, nobody = inputs.logits, inputs.rules, inputs.steered, inputs.nobody
    targets = [torch.empty_like(each) for each in logits]
    ids = torch.rand((tokens, experts), generator=inputs.generator, device=device).argsort(-1)[:, : model.top_k].int()
    counters = torch.zeros((layers, _PROFILES + 1, experts), dtype=torch.int64, device=device)
    times = times_of(
        {
            "empty": lambda _: floors.empty(inputs.nothing),
            "copy": lambda i: floors.copy(logits[i % len(logits)], targets[i % len(targets)]),
            "idle": inputs.rewrite(rules, nobody),
            "elsewhere": inputs.rewrite(torch.zeros_like(rules), steered),
            "steered": inputs.rewrite(rules, steered),
            "biased": inputs.rewrite(torch.where(rules == 0, 0.5, rules).half(), steered, FORCES | BIASES),
            "count_idle": lambda i: count_(ids, counters, nobody, i % layers),
            "count": lambda i: count_(ids, counters, steered, i % layers),
        }
    )
    num_bytes = 2 * tokens * experts * dtype.itemsize + 4 * tokens
    return Row(
        model=model.name,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        num_bytes=num_bytes,
        at_bandwidth=num_bytes / bandwidth,
        spread=max(timing.spread for timing in times.values()),
        clock=clock_rate(),
        **{name: timing.median for name, timing in times.items()},
    )


def _measure_selection(device: torch.device, model: Model, tokens: int, dtype: torch.dtype) -> SelectionRow:
    inputs = _Inputs(device, model, tokens, dtype)
    layers, experts, top_k, kind = model.layers, model.experts, model.top_k, model.router
    order = torch.rand((_PROFILES, layers, experts), generator=inputs.generator, device=device).argsort(-1)
    rules = torch.zeros_like(inputs.rules)
    rules[1:] = forcing((order < top_k // 2).int() - (order >= experts - top_k).int())
    bias = torch.randn(experts, generator=inputs.generator, device=device) if kind.bias else None
    ids = torch.rand((tokens, experts), generator=inputs.generator, device=device).argsort(-1)[:, :top_k].int()
    weights = torch.rand((tokens, top_k), generator=inputs.generator, device=device)
    active = torch.full((layers,), 3, dtype=torch.uint8, device=device)

    def reselect(rules: torch.Tensor, slots: torch.Tensor) -> Callable[[int], None]:
        logits = inputs.logits
        return lambda i: reselect_(
            weights, ids, logits[i % len(logits)], bias, rules, slots, active, i % layers, *kind.arguments
        )

    times = times_of(
        {
            "empty": lambda _: floors.empty(inputs.nothing),
            "idle": reselect(rules, inputs.nobody),
            "elsewhere": reselect(torch.zeros_like(rules), inputs.steered),
            "steered": reselect(rules, inputs.steered),
            # Last, since it changes the logits.
            "gate": inputs.rewrite(rules, inputs.steered),
        }
    )
    return SelectionRow(
        model=model.name,
        tokens=tokens,
        dtype=str(dtype).removeprefix("torch."),
        spread=max(timing.spread for timing in times.values()),
        clock=clock_rate(),
        **{name: timing.median for name, timing in times.items()},
    )


def _measure_cold(device: torch.device, model: Model, tokens: int) -> ColdTime:
    inputs = _Inputs(device, model, tokens, torch.bfloat16)
    source = torch.zeros(_MORE_THAN_CACHE // 8, device=device)
    target = torch.empty_like(source)

    def after_a_copy(launch: Callable[[int], None]) -> Callable[[int], None]:
        def run(index: int) -> None:
            floors.copy(source, target)
            launch(index)

        return run

    launches: dict[str, Callable[[int], None]] = {
        "empty": lambda _: floors.empty(inputs.nothing),
        "idle": inputs.rewrite(inputs.rules, inputs.nobody),
        "steered": inputs.rewrite(inputs.rules, inputs.steered),
    }
    times = times_of({name: after_a_copy(launch) for name, launch in launches.items()})
    empty = times["empty"].median
    return ColdTime(model.name, tokens, times["idle"].median - empty, times["steered"].median - empty)
