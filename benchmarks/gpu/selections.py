"""The correction of a selection on random inputs against float64: kinds, dtypes, ties, saturated scores, -inf, NaN."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu.correctness import DTYPES, SLOTS
from benchmarks.gpu.models import CORRECTED, OTHER_ROUTERS, Model
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.reference import what_rules_do
from benchmarks.gpu.selection_reference import OWN_WEIGHT, fault, unsteered
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE

Reselect = Callable[
    [
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor | None,
        torch.Tensor,
        torch.Tensor,
        torch.Tensor,
        int,
        RouterKind,
    ],
    None,
]
"""(weights, ids, logits, bias, rules, token_slots, active, row, kind): in place."""

KINDS = ("plain", "ties", "saturated", "masked", "nan")
ID_DTYPES = (torch.int32, torch.int64)
_BESIDE = 3
"""Columns beside the K, such as of shared experts."""
_OUTSIDE = 77


@dataclass(frozen=True, slots=True)
class SelectionCase:
    """T tokens of a layer of a model; beside their K columns there are others, or not."""

    tokens: int
    model: Model
    dtype: torch.dtype
    id_dtype: torch.dtype = torch.int32
    kind: str = "plain"
    beside: bool = False

    def __str__(self) -> str:
        dtypes = f"{self.dtype}, {self.id_dtype}".replace("torch.", "")
        return f"reselect {self.model.name} T={self.tokens} {dtypes}, {self.kind}{', beside others' * self.beside}"

    @property
    def seed(self) -> int:
        """The same in every process."""
        return zlib.crc32(str(self).encode())


def all_cases() -> Iterator[SelectionCase]:
    """For a GPU."""
    for model, dtype, kind in itertools.product((*CORRECTED, *OTHER_ROUTERS), DTYPES, KINDS):
        for tokens in (9, 700):
            yield SelectionCase(tokens, model, dtype, kind=kind)
    for model in CORRECTED:
        yield SelectionCase(64, model, torch.float32, torch.int64, beside=True)


def few_cases() -> Iterator[SelectionCase]:
    """For Triton's interpreter, which takes a tenth of a second for a row."""
    models = (*CORRECTED, *OTHER_ROUTERS)
    for index, model in enumerate(models):
        for kind in (KINDS[index % len(KINDS)], KINDS[(index + 2) % len(KINDS)]):
            dtype, id_dtype = DTYPES[index % len(DTYPES)], ID_DTYPES[index % len(ID_DTYPES)]
            yield SelectionCase(7, model, dtype, id_dtype, kind, beside=index % 3 == 0)


def make_rules(model: Model, generator: torch.Generator) -> torch.Tensor:
    """Rules float16 `[SLOTS, E]` of a layer: none in slot 1, all it may have in 4, experts of their own weight in 3.

    Slot 2 deactivates a few, of which a token has often chosen none.
    """
    rules = torch.zeros((SLOTS, model.experts), dtype=torch.float16)
    half = (model.top_k // 2, (model.experts - model.top_k) // 2)
    all_of_them = (model.top_k, model.experts - model.top_k)
    for slot, value, (up, down) in ((2, ACTIVATE, (0, 3)), (3, OWN_WEIGHT, half), (4, ACTIVATE, all_of_them)):
        order = torch.randperm(model.experts, generator=generator)
        rules[slot, order[:up]] = value
        rules[slot, order[model.experts - down :]] = DEACTIVATE
        # Biases are no affair of a correction.
        rules[slot, (rules[slot] == 0) & (order % 3 == 0)] = 0.5
    return rules


def make_router(
    model: Model, tokens: int, dtype: torch.dtype, kind: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits `[T, E]` and bias, on the CPU."""
    z = torch.randn((tokens, model.experts), generator=generator) * {"saturated": 15.0}.get(kind, 3.0)
    bias = torch.randn(model.experts, generator=generator)
    if kind == "ties":
        # Not below 0: no two different pairs have the same sum.
        z, bias = z.abs().round(), bias.round()
    if kind == "saturated":
        bias += 30
    if kind == "masked":
        z = z.masked_fill(torch.rand(z.shape, generator=generator) < 0.2, -torch.inf)
        z[::5] = -torch.inf
    if kind == "nan":
        z[::3, 0], z[1::3, 1] = torch.nan, torch.inf
    return z.to(dtype), bias if model.router.bias else None


def check_reselect(reselect: Reselect, device: torch.device, case: SelectionCase) -> Outcome:
    """Tokens in all kinds of slots, in the last layer, with other rules in the other layers; then none steered."""
    generator = torch.Generator().manual_seed(case.seed)
    model, row = case.model, min(case.model.layers, 3) - 1
    kind = model.router
    mine = make_rules(model, generator)
    rules = torch.full((SLOTS, row + 1, model.experts), ACTIVATE, dtype=torch.float16)
    rules[:, row] = mine
    logits, bias = make_router(model, case.tokens, case.dtype, case.kind, generator)
    # Tokens beyond T are steered, and not to be read.
    slots = torch.randint(0, SLOTS, (case.tokens + 5,), generator=generator, dtype=torch.int32)
    width = model.top_k + _BESIDE * case.beside
    memory = torch.full((case.tokens, width), float(_OUTSIDE)), torch.full((case.tokens, width), _OUTSIDE)
    memory = memory[0].to(device), memory[1].to(case.id_dtype).to(device)
    weights, ids = (of[:, : model.top_k] for of in memory)
    before = (
        torch.rand((case.tokens, model.top_k), generator=generator),
        unsteered(logits.nan_to_num(0, 9, -99), bias, kind, model.top_k).ids.to(case.id_dtype),
    )
    given = (logits.to(device), None if bias is None else bias.to(device), rules.to(device))

    def run(slots: torch.Tensor) -> str | None:
        weights.copy_(before[0])
        ids.copy_(before[1])
        reselect(weights, ids, *given, slots.to(device), what_rules_do(rules).to(device), row, kind)
        return fault(before, (weights, ids), logits, bias, mine[slots[: case.tokens].long()], kind)

    wrong = run(slots) or run(torch.zeros_like(slots))
    if wrong is None and not all((of[:, model.top_k :] == _OUTSIDE).all() for of in memory):
        wrong = "memory beside the K was written"
    return Outcome(str(case), wrong)
