"""The two operators on random inputs against float64: dtypes, shapes, strides, ties, -inf, NaN."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.gpu.models import MODELS
from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.reference import expected_counts, fault, what_rules_do
from vllm_steermoe_plugin.device.kernels.tiles import MAX_EXPERTS, SMALL_STEP
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE


class Rewrite(Protocol):
    """Rewrites logits in place."""

    def __call__(
        self,
        logits: torch.Tensor,
        rules: torch.Tensor,
        token_slots: torch.Tensor,
        active: torch.Tensor,
        row: int,
        log_softmax: bool = False,
        /,
        *,
        forces: bool = True,
    ) -> None: ...


Count = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]
"""(topk_ids, counters, token_groups, row): in place."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("rows", "padded rows", "misaligned rows", "columns")
KINDS = ("plain", "tiny", "huge", "ties", "masked", "nan")
SLOTS = 5
"""Slot 0 has no rule, slot 1 none in the layer, slot 3 biases too, slot 4 all it may have."""
ODD_EXPERTS = (1, 2, 3, 60, 100, 256, 384, 512, 1000, MAX_EXPERTS)
LARGE_STEP = SMALL_STEP + 13
_OUTSIDE = 7.0


@dataclass(frozen=True, slots=True)
class Case:
    """Logits `[T, E]` of a layer with top-k K, one of L."""

    tokens: int
    experts: int
    top_k: int
    layers: int
    dtype: torch.dtype
    layout: str = "rows"
    kind: str = "plain"
    log_softmax: bool = False
    forces: bool = True

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        form = ", log-softmax" * self.log_softmax + ", biases alone" * (not self.forces)
        return f"rewrite T={self.tokens} E={self.experts} L={self.layers} {dtype}, {self.layout}, {self.kind}{form}"

    @property
    def seed(self) -> int:
        """The same in every process."""
        return zlib.crc32(str(self).encode())


def all_cases() -> Iterator[Case]:
    """For a GPU: the six models in all dtypes and kinds, small and large steps; strides; other numbers of experts."""
    for model, dtype, kind, tokens in itertools.product(MODELS, DTYPES, KINDS, (1, 8, 64, LARGE_STEP, 3000)):
        for log_softmax in {False, model.log_softmax}:
            yield Case(tokens, model.experts, model.top_k, model.layers, dtype, kind=kind, log_softmax=log_softmax)
    for experts, dtype, layout, tokens in itertools.product((8, 60, 128), DTYPES, LAYOUTS, (9, LARGE_STEP)):
        yield Case(tokens, experts, 2, 3, dtype, layout)
    for experts, dtype, tokens in itertools.product(ODD_EXPERTS, DTYPES, (9, LARGE_STEP)):
        yield Case(tokens, experts, min(4, experts), 2, dtype)
    for dtype, kind, tokens, forces in itertools.product(DTYPES, KINDS, (9, LARGE_STEP), (True, False)):
        yield Case(tokens, 60, 4, 2, dtype, kind=kind, forces=forces)
    for model, dtype in itertools.product(MODELS, DTYPES):
        yield Case(64, model.experts, model.top_k, model.layers, dtype, forces=False)
    # Rules of more than 2**31 bytes: offsets must not wrap.
    yield Case(64, MAX_EXPERTS, 8, 600_000, torch.bfloat16)


def few_cases() -> Iterator[Case]:
    """For Triton's interpreter, which takes about a millisecond for a row."""
    for (index, model), dtype in itertools.product(enumerate(MODELS), DTYPES):
        kind = KINDS[(index + DTYPES.index(dtype)) % len(KINDS)]
        for log_softmax in {False, model.log_softmax}:
            yield Case(9, model.experts, model.top_k, model.layers, dtype, kind=kind, log_softmax=log_softmax)
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        yield Case(5, 60, 4, 3, dtype, layout)
    for dtype, forces in itertools.product(DTYPES, (True, False)):
        yield Case(7, 60, 4, 3, dtype, kind="nan", forces=forces)
    for experts, dtype in zip(ODD_EXPERTS, itertools.cycle(DTYPES), strict=False):
        yield Case(3, experts, min(4, experts), 2, dtype)
    for kind, dtype in zip(KINDS, itertools.cycle(DTYPES), strict=False):
        yield Case(LARGE_STEP, 16, 2, 2, dtype, kind=kind)


def make_logits(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Random logits `[T, E]`, on the CPU."""
    z = torch.randn((case.tokens, case.experts), generator=generator)
    z *= {"tiny": 1e-5, "huge": 3000.0, "ties": 1.0}.get(case.kind, 5.0)
    if case.kind == "ties":
        z = z.round()
    if case.kind == "masked":
        masked = torch.rand(z.shape, generator=generator) < 0.2
        # One expert stays in every row: a row of -inf alone is no distribution.
        masked[:, 0] = False
        z = z.masked_fill(masked, -torch.inf)
    if case.kind == "nan":
        z[::3, 0] = torch.nan
    return z.to(case.dtype)


def lay_out(values: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`values` with the strides that `layout` names, and the whole memory they lie in."""
    tokens, experts = values.shape
    shape, first, turned = {
        "rows": ((tokens, experts), 0, False),
        "padded rows": ((tokens, experts + 24), 0, False),
        "misaligned rows": ((tokens, experts + 8), 3, False),
        "columns": ((experts, tokens), 0, True),
    }[layout]
    memory = torch.full(shape, _OUTSIDE, dtype=values.dtype, device=values.device)
    view = memory.T if turned else memory[:, first : first + experts]
    view.copy_(values)
    return view, memory


def make_rules(case: Case, row: int, generator: torch.Generator) -> torch.Tensor:
    """Rules float16 `[SLOTS, E]` of layer `row`: up to K activated, up to E - K deactivated; biases in slot 3."""
    rules = torch.zeros((SLOTS, case.experts), dtype=torch.float16)
    for slot in range(2, SLOTS):
        order = torch.randperm(case.experts, generator=generator)
        most = (case.top_k, case.experts - case.top_k)
        up, down = most if slot == SLOTS - 1 else (int(torch.randint(0, n + 1, (), generator=generator)) for n in most)
        if slot % 2:
            rules[slot, order[case.experts // 4 :]] = torch.randn(case.experts, generator=generator).half()[
                case.experts // 4 :
            ]
        rules[slot, order[:up]], rules[slot, order[case.experts - down :]] = ACTIVATE, DEACTIVATE
    return rules


def check_rewrite(rewrite: Rewrite, device: torch.device, case: Case) -> Outcome:
    """Tokens in all kinds of slots, in the last layer, with other rules in the other layers; then none steered."""
    generator = torch.Generator().manual_seed(case.seed)
    row = case.layers - 1
    mine = make_rules(case, row, generator).to(device)
    rules = torch.full((SLOTS, case.layers, case.experts), ACTIVATE, dtype=torch.float16, device=device)
    rules[:, row] = mine
    # Beside each slot lies a group, as when selections are counted; tokens beyond T are steered, and not to be read.
    marks = torch.randint(0, SLOTS, (case.tokens + 5, 2), generator=generator, dtype=torch.int32).to(device)
    slots = marks[:, 0] if case.seed % 2 else marks[:, 0].contiguous()
    before = make_logits(case, generator).to(device)
    view, memory = lay_out(before, case.layout)
    active = what_rules_do(rules)
    rewrite(view, rules, slots, active, row, case.log_softmax, forces=case.forces)
    mine = mine if case.forces else mine.where(mine.isfinite(), 0)
    wrong = fault(before, view, mine[slots[: case.tokens].long()], log_softmax=case.log_softmax)
    view.fill_(_OUTSIDE)
    if wrong is None and not (memory == _OUTSIDE).all():
        wrong = "memory beside the logits was written"
    view.copy_(before)
    rewrite(view, rules, torch.zeros_like(slots), active, row, case.log_softmax, forces=case.forces)
    if wrong is None:
        wrong = fault(before, view, torch.zeros_like(before, dtype=torch.float16))
    return Outcome(str(case), wrong)


def check_count(
    count: Count, device: torch.device, tokens: int, experts: int, top_k: int, dtype: torch.dtype
) -> Outcome:
    """Tokens in three groups or none; padding with the id -1 in none; columns of ids that lie apart."""
    name = f"count T={tokens} E={experts} K={top_k} {str(dtype).removeprefix('torch.')}"
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    ids = torch.rand((tokens, experts), generator=generator).argsort(dim=1)[:, :top_k].to(dtype)
    marks = torch.randint(0, 4, (tokens + 3, 2), generator=generator, dtype=torch.int32)
    groups = marks[:, 1]
    ids[groups[:tokens] == 0] = -1
    apart = torch.zeros((tokens, 2 * top_k), dtype=dtype)[:, ::2].copy_(ids)
    counters = torch.randint(0, 9, (3, 4, experts), generator=generator)
    wanted = counters.clone()
    wanted[1] += expected_counts(ids, groups[:tokens], 3, experts)
    found = counters.to(device)
    count((apart if tokens % 2 else ids).to(device), found, marks.to(device)[:, 1], 1)
    return Outcome(name, None if torch.equal(found.cpu(), wanted) else "the counters differ")


def all_counts() -> Iterator[tuple[int, int, int, torch.dtype]]:
    """T, E, K and dtype of ids."""
    for model, tokens, dtype in itertools.product(MODELS, (1, 33, 600), (torch.int32, torch.int64)):
        yield tokens, model.experts, model.top_k, dtype


def few_counts() -> Iterator[tuple[int, int, int, torch.dtype]]:
    """For the interpreter."""
    for model in MODELS:
        yield 33, model.experts, model.top_k, torch.int32
    yield 40, 16, 3, torch.int64
