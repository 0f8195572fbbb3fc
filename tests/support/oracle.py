"""Slow references, written without the code under test."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import pstdev
from typing import Any, TypeVar

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Rules = dict[tuple[int, int], float]
"""(layer, expert) -> +1 or -1, in or out; any other number is a bias."""
Key = TypeVar("Key")


def forced(rules: Mapping[Key, float]) -> dict[Key, int]:
    """The rules that force an expert in or out."""
    return {key: int(math.copysign(1, rule)) for key, rule in rules.items() if abs(rule) in (1, math.inf)}


def bias_row(logits: list[float], rules: Mapping[int, float]) -> list[float]:
    """One token's logits with their biases, in Python floats (float64)."""
    known = [z for z in logits if z > -math.inf]
    sigma = pstdev(known) if known else 0.0
    biases = {e: rule for e, rule in rules.items() if e not in forced(rules)}
    return [z + biases[e] * sigma if e in biases else z for e, z in enumerate(logits)]


def rewrite_row(
    logits: list[float], rules: Mapping[int, float], dtype: torch.dtype, *, log_softmax: bool = False
) -> list[float]:
    """One token's rewrite, in Python floats (float64), rounded through `dtype`; `log_softmax` is the paper's form."""
    if len(forced(rules)) < len(rules):
        logits = torch.tensor(bias_row(logits, rules), dtype=torch.float64).to(dtype).tolist()
    rules = forced(rules)
    if not rules:
        return logits
    top = max(logits)
    total = top + math.log(sum(math.exp(z - top) for z in logits)) if log_softmax else 0.0
    scores = [z - total for z in logits]

    values = torch.tensor([*scores, max(scores) + 0.01, min(scores) - 0.01], dtype=torch.float64).to(dtype)
    *rounded, above, below = values.tolist()
    upwards, downwards = (torch.nextafter(values, torch.tensor(end, dtype=dtype)) for end in (math.inf, -math.inf))
    above, below = max(above, *upwards[:-2].tolist()), min(below, *downwards[:-2].tolist())
    if not log_softmax:
        # Raw logits in `dtype` get a margin that they can hold, and are not rounded anew; nor are more exact ones.
        above, below = max(scores) + (above - max(rounded)), min(scores) + (below - min(rounded))
        rounded = scores
    rewritten = {1: above, -1: below}
    return [rewritten[rules[e]] if e in rules else rounded[e] for e in range(len(logits))]


def same_until(one: dict[int, list[list[int]]], other: dict[int, list[list[int]]]) -> int:
    """The first token for which some layer selects other experts; their number, if there is none."""
    return min(next((t for t, found in enumerate(one[at]) if found != other[at][t]), len(one[at])) for at in one)


@dataclass(frozen=True)
class Router:
    """How a router selects: `score` softmax, sigmoid or sqrtsoftplus, the best `kept` of `groups`, weights scaled."""

    top_k: int
    score: str = "sigmoid"
    bias: tuple[float, ...] | None = None
    groups: int = 1
    kept: int = 1
    renormalize: bool = True
    scale: float = 1.0

    def scores(self, logits: list[float]) -> list[float]:
        """u, in float64."""
        if self.score == "softmax":
            powers = [math.exp(z - max(logits)) for z in logits]
            return [power / sum(powers) for power in powers]
        if self.score == "sigmoid":
            return [1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z)) for z in logits]
        return [math.sqrt(max(z, 0.0) + math.log1p(math.exp(-abs(z)))) for z in logits]

    def corrected(self, logits: list[float]) -> list[float]:
        """c, in float64."""
        return [u + b for u, b in zip(self.scores(logits), self.bias or [0.0] * len(logits), strict=True)]

    def kept_experts(self, logits: list[float]) -> set[int]:
        """The experts of the groups from which it selects."""
        c = self.corrected(logits)
        size = len(c) // self.groups
        runs = [list(range(g * size, (g + 1) * size)) for g in range(self.groups)]
        best = [sum(sorted((c[e] for e in run), reverse=True)[: 1 if self.bias is None else 2]) for run in runs]
        order = sorted(range(self.groups), key=lambda g: (-best[g], g))
        return {e for g in order[: self.kept] for e in runs[g]}

    def select(self, logits: list[float]) -> list[int]:
        """S0, the unsteered choice."""
        c, kept = self.corrected(logits), self.kept_experts(logits)
        return sorted(kept, key=lambda e: (-c[e], e))[: self.top_k]

    def weigh(self, logits: list[float], experts: list[int]) -> list[float]:
        """Weights of some experts."""
        u = self.scores(logits)
        # vLLM's kernels add as much, so that nothing is divided by 0.
        total = sum(u[e] for e in experts) + 1e-20 if self.renormalize else 1.0
        return [self.scale * u[e] / total for e in experts]

    def steer(self, logits: list[float], rules: Mapping[int, float], *, own: bool = False) -> dict[int, float]:
        """Expert -> weight of a token with `rules`, in the order of precedence, one place after the other."""
        logits, rules = bias_row(logits, rules), forced(rules)
        chosen = self.select(logits)
        activated = [e for e, rule in rules.items() if rule > 0]
        deactivated = [e for e, rule in rules.items() if rule < 0]
        if not activated and not set(deactivated) & set(chosen):
            return dict(zip(chosen, self.weigh(logits, chosen), strict=True))
        c, kept = self.corrected(logits), self.kept_experts(logits)
        selected: list[int] = []
        for pool in (activated, chosen, kept, range(len(logits))):
            for e in sorted(pool, key=lambda e: (-c[e], e)):
                if len(selected) < self.top_k and e not in selected and e not in deactivated:
                    selected.append(e)
        steered = list(logits)
        for e in deactivated:
            steered[e] = min(logits) - 0.01
        for e in activated:
            steered[e] = logits[e] if own else max(logits[s] for s in chosen) + 0.01
        return dict(zip(selected, self.weigh(steered, selected), strict=True))


class Roundings(TorchDispatchMode):
    """Every result that a bfloat16 model would round, here float64, is off by the unit roundoff, up or down by chance.

    What transformers computes in float32 whatever the model's dtype stays exact, and so does what only moves values.
    """

    UNIT = 2.0**-8
    COPIES = frozenset({"aten::index", "aten::_unsafe_view", "aten::cat", "aten::embedding", "aten::clone"})

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.name().partition(".")[0] not in self.COPIES:
            for value in out if isinstance(out, tuple) else (out,):
                if isinstance(value, torch.Tensor) and value.dtype is torch.float64:
                    signs = torch.randint(0, 2, value.shape, generator=self.chance) * 2 - 1
                    value.mul_(1 + self.UNIT * signs.double())
        return out


class ReferenceModel:
    """transformers' own model with the router rewritten token by token in a loop.

    It computes in `dtype`; weights and rewritten logits are those of a model in `rounds_to`, `dtype` unless given.
    The rewrite has the paper's form unless `log_softmax` is false.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        rounds_to: torch.dtype | None = None,
        *,
        log_softmax: bool = True,
    ) -> None:
        self.rounds_to = rounds_to or dtype
        self.log_softmax = log_softmax
        # Phi-3.5-MoE's published architecture name is unknown to transformers; its model type is not.
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model: Any = load(folder, dtype=self.rounds_to, experts_implementation="eager").to(dtype).eval()
        # vLLM's router on a CPU takes the log-sum-exp in the logits' dtype, unless it renormalises.
        self._log_sum_rounds = not getattr(self.model.config, "norm_topk_prob", True)
        self._rounds: torch.Generator | None = None
        self.routers: dict[int, Any] = {}
        for layer, block in enumerate(self.model.model.layers):
            for module in block.modules():
                if type(module).__name__.endswith("TopKRouter"):
                    self.routers[layer] = module

    def run(self, token_ids: list[int], rules: Rules) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
        """Log-probabilities `[T, V]` and, per layer, the sorted experts of each token."""
        logprobs, chosen = self._run(torch.tensor([token_ids]), rules)
        return logprobs[0], chosen

    def run_rounded(
        self, token_ids: list[int], rules: Rules, copies: int
    ) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
        """The same under `Roundings`, each copy by its own chance: `[N, T, V]` and the experts of N * T tokens."""
        self._rounds = torch.Generator().manual_seed(1)
        try:
            with Roundings(seed=0):
                return self._run(torch.tensor([token_ids] * copies), rules)
        finally:
            self._rounds = None

    def _run(self, token_ids: torch.Tensor, rules: Rules) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
        chosen: dict[int, list[list[int]]] = {}
        with torch.no_grad(), self._steered(rules, chosen):
            logits = self.model(token_ids).logits
            return torch.log_softmax(logits.float(), dim=-1), chosen

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

            log_sums: dict[str, torch.Tensor] = {}

            def slow_linear(
                x: Any, w: Any, b: Any = None, mine: dict[int, float] = mine, sums: dict[str, torch.Tensor] = log_sums
            ) -> torch.Tensor:
                logits = linear(x, w, b)
                with _disable_current_modes():  # The rewrite has roundings of its own.
                    rows = [
                        rewrite_row(row, mine, self.rounds_to, log_softmax=self.log_softmax)
                        for row in logits.flatten(0, -2).tolist()
                    ]
                    rewritten = torch.tensor(rows, dtype=logits.dtype)
                    sums["now"] = rewritten.logsumexp(-1, keepdim=True)
                    return rewritten.view_as(logits)

            def before(module: Any, args: Any, slow_linear: Any = slow_linear) -> None:
                torch.nn.functional.linear = slow_linear

            def after(
                module: Any, args: Any, output: Any, layer: int = layer, sums: dict[str, torch.Tensor] = log_sums
            ) -> Any:
                torch.nn.functional.linear = linear
                indices = next(t for t in output if t.dtype in (torch.int64, torch.int32))
                chosen[layer] = [sorted(row) for row in indices.flatten(0, -2).tolist()]
                if self._rounds is None or not self._log_sum_rounds:
                    return None
                with _disable_current_modes():
                    signs = torch.randint(0, 2, sums["now"].shape, generator=self._rounds) * 2 - 1
                    factor = 1 + Roundings.UNIT * signs * sums["now"].abs()
                    weights = next(t for t in output if t.is_floating_point() and t.shape == indices.shape)
                    return tuple(t * factor.view(*t.shape[:-1], 1) if t is weights else t for t in output)

            handles += [router.register_forward_pre_hook(before), router.register_forward_hook(after)]
        try:
            yield
        finally:
            torch.nn.functional.linear = linear
            for handle in handles:
                handle.remove()
