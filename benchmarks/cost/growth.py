"""How what steering adds to a step grows: with tokens, experts, layers and profiles. Only our own code runs here."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.cost.work import profiles
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.device.ops import rewrite_
from vllm_steermoe_plugin.device.steering_state import BatchRow, SteeringState
from vllm_steermoe_plugin.steering.wire import STEER_KEY

TOP_K = 8
_REPEATS = 30


def measure_growth(figure: Path, *, quick: bool) -> dict[str, Any]:
    """Microseconds by what grows; drawn to `figure`."""
    repeats = 3 if quick else _REPEATS
    tokens = [1, 8, 64, 512, 4096]
    found = {
        "rewrite of one layer by tokens, 64 experts": {
            "steered": {n: _rewrite(n, 64, 1, repeats) for n in tokens},
            "idle": {n: _rewrite(n, 64, 0, repeats) for n in tokens},
        },
        "rewrite of one layer by experts, 64 tokens": {
            "steered": {n: _rewrite(64, n, 1, repeats) for n in (16, 64, 128, 256, 512)},
        },
        "bookkeeping of one step by layers, 64 requests": {
            "one profile": {n: _step(64, n, 1, repeats) for n in (4, 16, 48, 94)},
            "a profile each": {n: _step(64, n, 64, repeats) for n in (4, 16, 48, 94)},
            "idle": {n: _step(64, n, 0, repeats) for n in (4, 16, 48, 94)},
        },
        "bookkeeping of one step by requests, 16 layers": {
            "one profile": {n: _step(n, 16, 1, repeats) for n in (1, 8, 64, 256)},
            "a profile each": {n: _step(n, 16, n, repeats) for n in (1, 8, 64, 256)},
            "idle": {n: _step(n, 16, 0, repeats) for n in (1, 8, 64, 256)},
        },
    }
    _draw(found, figure)
    return found


def _state(requests: int, layers: int, experts: int, number: int, tokens: int) -> SteeringState:
    """A state with `requests` admitted, steered by `number` profiles in turn (0: none is steered)."""
    shape = MoEShape("OlmoeForCausalLM", tuple(range(layers)), experts, TOP_K)
    state = SteeringState(
        shape,
        shape.layers,
        max_requests=requests,
        max_tokens=max(tokens, requests),
        count_groups=0,
        device=torch.device("cpu"),
    )
    sets = profiles(random.Random(0), number, layers=layers, experts=experts, top_k=TOP_K)
    for i in range(requests):
        state.admit(str(i), {STEER_KEY: sets[i % number]} if number else None, 1)
    return state


def _rewrite(tokens: int, experts: int, number: int, repeats: int) -> float:
    state = _state(1, 1, experts, number, tokens)
    state.begin_step([BatchRow("0", 0, tokens)])
    logits = torch.randn(tokens, experts, dtype=torch.bfloat16)
    return _microseconds(lambda: rewrite_(logits, state.rules, state.token_slots, state.active, 0), repeats)


def _step(requests: int, layers: int, number: int, repeats: int) -> float:
    state = _state(requests, layers, 64, number, requests)
    batch = [BatchRow(str(i), 0, 1) for i in range(requests)]
    return _microseconds(lambda: state.begin_step(batch), repeats)


def _microseconds(work: Callable[[], object], repeats: int) -> float:
    for _ in range(5):
        work()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(10):
            work()
        taken.append((time.perf_counter() - start) / 10)
    return median(taken) * 1e6


def _draw(found: dict[str, dict[str, dict[int, float]]], path: Path) -> None:
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        for name, points in curves.items():
            axis.plot(list(points), list(points.values()), marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_ylabel("microseconds")
        axis.set_xlabel(title.split(" by ")[1].split(",")[0])
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
