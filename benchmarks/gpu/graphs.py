"""Steering inside a CUDA graph that is captured once, with copies in flight, and under `torch.compile`. Needs a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.correctness import DTYPES
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.reference import expected_counts, fault, what_rules_do
from benchmarks.gpu.selection_reference import fault as selection_fault
from benchmarks.gpu.selection_reference import unsteered
from vllm_steermoe_plugin.device.ops import count_, reselect_, rewrite_
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.device.step_buffers import StepBuffers, Table
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE

LAYERS, EXPERTS, TOP_K, TOKENS, SLOTS, GROUPS = 6, 128, 8, 64, 9, 3
ROUTER = RouterKind("sigmoid", True, 4, 2, True, 2.5)
STEPS = 40
COMPILER = "inductor"
"""Of `torch.compile`, its default and vLLM's."""
_SLEEP = 400_000_000
"""Clock cycles that the device sleeps (about 0.2 s), so that the host runs ahead."""


@dataclass(frozen=True, slots=True)
class Step:
    """What a step writes: slots and groups by token, and rule tables that are new."""

    slots: NDArray[np.int32]
    groups: NDArray[np.int32]
    tables: list[Table]


class Captured:
    """The three operators in all layers, captured once over fixed buffers."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(1)
        shape = (LAYERS, TOKENS, EXPERTS)
        self.source = torch.randn(shape, generator=generator, device=device).mul_(5).to(dtype)
        self.work = torch.empty_like(self.source)
        self.ids = torch.rand(shape, generator=generator, device=device).argsort(-1)[..., :TOP_K].int()
        self.bias = torch.randn(EXPERTS, generator=generator, device=device)
        chosen = [unsteered(self.source[row], self.bias, ROUTER, TOP_K).ids.int() for row in range(LAYERS)]
        self.chosen = torch.rand((LAYERS, TOKENS, TOP_K), generator=generator, device=device), torch.stack(chosen)
        self.selected = tuple(torch.empty_like(of) for of in self.chosen)
        self.buffers = StepBuffers(SLOTS, LAYERS, EXPERTS, TOKENS, counting=True, device=device)
        self.counters = torch.zeros((LAYERS, GROUPS + 1, EXPERTS), dtype=torch.int64, device=device)
        self.graph = capture(self._run)
        self.counters.zero_()
        self.rules = np.zeros((SLOTS, LAYERS, EXPERTS), dtype=np.float16)

    def _run(self) -> None:
        self.work.copy_(self.source)
        for selected, chosen in zip(self.selected, self.chosen, strict=True):
            selected.copy_(chosen)
        kind = ROUTER
        for row in range(LAYERS):
            mine = (self.buffers.rules, self.buffers.token_slots, self.buffers.active, row)
            rewrite_(self.work[row], *mine)
            reselect_(*(of[row] for of in self.selected), self.source[row], self.bias, *mine, *kind.arguments)
            count_(self.ids[row], self.counters, self.buffers.token_groups, row)

    def step(self, step: Step) -> torch.Tensor:
        """Queue a step; the rules float16 `[L, T, E]` that its tokens must obey."""
        for slot, table in step.tables:
            self.rules[slot] = table
        used = torch.from_numpy(self.rules[np.unique(step.slots)])
        self.buffers.write(step.slots, step.groups, step.tables, what_rules_do(used).numpy())
        self.graph.replay()
        rules = self.rules[step.slots].transpose(1, 0, 2)
        return torch.from_numpy(np.pad(rules, ((0, 0), (0, TOKENS - len(step.slots)), (0, 0))))

    def fault(self, after: torch.Tensor, rules: torch.Tensor) -> str | None:
        """What is wrong with `after [L, T, E]`; None if nothing."""
        rules = rules.to(after.device)
        faults = (fault(self.source[row], after[row], rules[row]) for row in range(LAYERS))
        return next((found for found in faults if found is not None), None)

    def selection_fault(self, rules: torch.Tensor) -> str | None:
        """What is wrong with the selections of the last step; None if nothing."""
        rows = ([(of[0][row], of[1][row]) for of in (self.chosen, self.selected)] for row in range(LAYERS))
        faults = (
            selection_fault(before, after, self.source[row], self.bias, rules[row], ROUTER)
            for row, (before, after) in enumerate(rows)
        )
        return next((found for found in faults if found is not None), None)


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of `run`, which has run before, so that everything is compiled."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def random_steps(number: int, seed: int) -> list[Step]:
    """Steps with other slots, groups, lengths and rules each; every fourth is not steered at all."""
    chance = np.random.default_rng(seed)
    steps = []
    for index in range(number):
        tokens = int(chance.integers(1, TOKENS + 1))
        slots = chance.integers(0, SLOTS, tokens).astype(np.int32) * (index % 4 > 0)
        tables: list[Table] = []
        for slot in chance.choice(np.arange(1, SLOTS), int(chance.integers(0, 4)), replace=False):
            order = np.argsort(chance.random((LAYERS, EXPERTS)), axis=1)
            rules = np.where(order < EXPERTS - 60, 0, chance.normal(size=order.shape)).astype(np.float16)
            rules[order < TOP_K], rules[order >= EXPERTS - 40] = ACTIVATE, DEACTIVATE
            rules[chance.integers(LAYERS)] = 0
            tables.append((int(slot), rules))
        groups = chance.integers(0, GROUPS + 1, tokens).astype(np.int32)
        steps.append(Step(slots.astype(np.int32), groups, tables))
    return steps


def check_replay(device: torch.device, dtype: torch.dtype) -> Outcome:
    """One capture, many steps, each looked at before the next."""
    captured = Captured(device, dtype)
    wanted = torch.zeros_like(captured.counters, device="cpu")
    wrong = None
    for index, step in enumerate(random_steps(STEPS, seed=2)):
        rules = captured.step(step)
        wrong = wrong or captured.fault(captured.work, rules) or captured.selection_fault(rules)
        if wrong is None and not step.slots.any() and not torch.equal(captured.work, captured.source):
            wrong = f"step {index} is not steered, and its logits were changed"
        groups = torch.from_numpy(step.groups)
        for row in range(LAYERS):
            wanted[row] += expected_counts(captured.ids[row, : len(groups)], groups, GROUPS, EXPERTS)
    if wrong is None and not torch.equal(captured.counters.cpu(), wanted):
        wrong = "the counters differ"
    return Outcome(f"a graph captured once follows slots, rules and groups, {dtype}", wrong)


def check_in_flight(device: torch.device) -> Outcome:
    """Steps queued behind a device that is asleep: nothing of a later step may reach an earlier one."""
    captured = Captured(device, torch.bfloat16)
    after = torch.empty((STEPS, *captured.work.shape), dtype=captured.work.dtype, device=device)
    # The first replay loads the graph, for which the host may wait.
    captured.graph.replay()
    torch.cuda.synchronize()
    captured.counters.zero_()
    torch.cuda._sleep(_SLEEP)  # type: ignore[no-untyped-call]
    rules = []
    for index, step in enumerate(random_steps(STEPS, seed=3)):
        # One sleep covers one turn of the ring: after that the host waits, and is no longer ahead.
        torch.cuda._sleep(_SLEEP // STEPS)  # type: ignore[no-untyped-call]
        rules.append(captured.step(step))
        after[index].copy_(captured.work)
    waits = captured.buffers.staging.waits
    wrong = next((found for i in range(STEPS) if (found := captured.fault(after[i], rules[i]))), None)
    if wrong is None and waits == 0:
        wrong = "no copy was in flight when the next step was prepared, so nothing was shown"
    return Outcome(f"{STEPS} steps prepared while copies are in flight", wrong)


def check_compile(device: torch.device) -> Outcome:
    """`torch.compile` keeps the operator, in one graph, and what it does follows the buffers without recompiling."""
    import torch._dynamo.config
    from torch._dynamo.utils import counters

    captured = Captured(device, torch.bfloat16)
    buffers, active = captured.buffers, captured.buffers.active

    def layer(x: torch.Tensor) -> torch.Tensor:
        logits = x * 2
        rewrite_(logits, buffers.rules, buffers.token_slots, active, 1)
        return logits + 0

    counters.clear()
    x = captured.source[1] / 2
    wrong = None
    # An environment may have switched compiling off.
    with torch._dynamo.config.patch(disable=False):
        compiled = torch.compile(layer, fullgraph=True, backend=COMPILER)
        for step in random_steps(8, seed=4):
            captured.step(step)
            if not torch.equal(compiled(x), captured.work[1]):
                wrong = "the compiled layer does not do what the graph does"
    if wrong is None and counters["stats"]["unique_graphs"] != 1:
        wrong = f"compiled {counters['stats']['unique_graphs']} graphs"
    return Outcome("torch.compile keeps the operator", wrong)


def check_no_waiting(device: torch.device) -> Outcome:
    """Steps are prepared and replayed without anything that makes the host wait for the device."""
    captured = Captured(device, torch.bfloat16)
    steps = random_steps(STEPS, seed=5)
    captured.step(steps[0])
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    wrong = None
    try:
        for step in steps[1:]:
            captured.step(step)
            captured.buffers.clear()
    except RuntimeError as error:
        wrong = f"the host waited: {error}"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return Outcome("nothing in a step makes the host wait", wrong)


def all_checks(device: torch.device) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Every check of this module but that of `torch.compile`, by name."""
    for dtype in DTYPES:
        yield f"replay, {dtype}", partial(check_replay, device, dtype)
    yield "copies in flight", partial(check_in_flight, device)
    yield "waiting", partial(check_no_waiting, device)
