"""Slow references, written without the code under test."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

Rules = dict[tuple[int, int], int]
"""(layer, expert) -> +1 or -1."""


def rewrite_row(logits: list[float], rules: dict[int, int], dtype: torch.dtype) -> list[float]:
    """One token's rewrite, in Python floats (float64), rounded through `dtype` one value at a time."""
    if not rules:
        return logits
    top = max(logits)
    total = top + math.log(sum(math.exp(z - top) for z in logits))
    scores = [z - total for z in logits]

    def rounded(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64).to(dtype)

    def step(value: torch.Tensor, towards: float) -> torch.Tensor:
        return torch.nextafter(value, torch.tensor(towards, dtype=dtype))

    high, low = max(scores), min(scores)
    above = max(rounded(high + 0.01), step(rounded(high), math.inf))
    below = min(rounded(low - 0.01), step(rounded(low), -math.inf))
    values = {1: above, -1: below}
    return [float(values[rules[e]]) if e in rules else float(rounded(scores[e])) for e in range(len(logits))]


class ReferenceModel:
    """transformers' own model with the router rewritten token by token in a loop."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        # Phi-3.5-MoE's published architecture name is unknown to transformers; its model type is not.
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.eval()
        self.routers: dict[int, Any] = {}
        for layer, block in enumerate(self.model.model.layers):
            for module in block.modules():
                if type(module).__name__.endswith("TopKRouter"):
                    self.routers[layer] = module

    def run(self, token_ids: list[int], rules: Rules) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
        """Log-probabilities `[T, V]` and, per layer, the sorted experts of each token."""
        chosen: dict[int, list[list[int]]] = {}
        with torch.no_grad(), self._steered(rules, chosen):
            logits = self.model(torch.tensor([token_ids])).logits[0]
        return torch.log_softmax(logits.float(), dim=-1), chosen

    def route(self, layer: int, hidden: torch.Tensor, rules: Rules) -> list[list[int]]:
        """The sorted experts of each token, given what a layer's router is fed, `[T, H]`."""
        chosen: dict[int, list[list[int]]] = {}
        with torch.no_grad(), self._steered(rules, chosen):
            self.routers[layer](hidden)
        return chosen[layer]

    def exact_logits(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """A router's logits `[T, E]` in float64, before any rule."""
        parameters = {name.rpartition(".")[2]: value.double() for name, value in self.routers[layer].named_parameters()}
        with torch.no_grad():
            return torch.nn.functional.linear(hidden.double(), parameters["weight"], parameters.get("bias"))

    @contextmanager
    def _steered(self, rules: Rules, chosen: dict[int, list[list[int]]]) -> Iterator[None]:
        linear = torch.nn.functional.linear
        handles = []
        for layer, router in self.routers.items():
            mine = {expert: rule for (at, expert), rule in rules.items() if at == layer}

            def slow_linear(x: Any, w: Any, b: Any = None, mine: dict[int, int] = mine) -> torch.Tensor:
                logits = linear(x, w, b)
                rows = [rewrite_row(row, mine, logits.dtype) for row in logits.flatten(0, -2).tolist()]
                return torch.tensor(rows, dtype=logits.dtype).view_as(logits)

            def before(module: Any, args: Any, slow_linear: Any = slow_linear) -> None:
                torch.nn.functional.linear = slow_linear

            def after(module: Any, args: Any, output: Any, layer: int = layer) -> None:
                torch.nn.functional.linear = linear
                indices = next(t for t in output if t.dtype in (torch.int64, torch.int32))
                chosen[layer] = [sorted(row) for row in indices.flatten(0, -2).tolist()]

            handles += [router.register_forward_pre_hook(before), router.register_forward_hook(after)]
        try:
            yield
        finally:
            torch.nn.functional.linear = linear
            for handle in handles:
                handle.remove()
