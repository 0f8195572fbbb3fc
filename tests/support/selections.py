"""Selections to be corrected, and what is wrong with a correction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from hypothesis import strategies as st

from tests.support.oracle import Router
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE, OWN_WEIGHT

Rules = dict[int, int]


@dataclass(frozen=True)
class Case:
    """Logits `[T, E]`, rules float16 `[T, E]`, and what `router` makes of the logits: weights and ids `[T, K]`."""

    router: Router
    logits: torch.Tensor
    rules: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    bias: torch.Tensor | None

    @property
    def kind(self) -> RouterKind:
        """As the code under test has it."""
        router = self.router
        return RouterKind(
            router.score,  # type: ignore[arg-type]
            router.bias is not None,
            router.groups,
            router.kept,
            router.renormalize,
            router.scale,
        )


def selection_of(case: Case, logits: torch.Tensor) -> Case:
    """`case` with other logits, of which -inf counts as very low."""
    rows = logits.double().clamp(-100, 100).tolist()
    chosen = [case.router.select(row) for row in rows]
    weights = [case.router.weigh(row, experts) for row, experts in zip(rows, chosen, strict=True)]
    return replace(case, logits=logits, weights=torch.tensor(weights), ids=torch.tensor(chosen))


def drawn(
    router: Router,
    *,
    tokens: int,
    seed: int,
    rules: Rules,
    experts: int = 16,
    offset: float = 0.0,
    logits_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """A case of random logits and, if the router has one, a random bias with a standard deviation of 0.7."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, experts, generator=generator) * logits_scale).to(dtype)
    bias = None
    if router.bias is not None:
        bias = torch.randn(experts, generator=generator) * 0.7 + offset
        router = replace(router, bias=tuple(bias.tolist()))
    forced = {1: ACTIVATE, -1: DEACTIVATE}
    row = torch.tensor([forced.get(rules.get(e, 0), rules.get(e, 0)) for e in range(experts)]).half()
    empty = torch.empty(0)
    return selection_of(Case(router, logits, row.repeat(tokens, 1), empty, empty, bias), logits)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any kind of router, with rules of its tokens' own."""
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    experts = groups * draw(st.integers(2, 6))
    kept = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(5, kept * experts // groups)))
    router = Router(
        top_k,
        draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        draw(st.sampled_from([None, (0.0,) * experts])),
        groups,
        kept,
        draw(st.booleans()),
        draw(st.sampled_from([1.0, 2.5])),
    )
    own = draw(st.booleans())
    case = drawn(
        router,
        tokens=draw(st.integers(1, 5)),
        seed=draw(st.integers(0, 10_000)),
        rules={},
        experts=experts,
        offset=draw(st.sampled_from([0.0, 30.0])),
        logits_scale=draw(st.sampled_from([0.1, 1.0, 8.0])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
    )
    for row in case.rules:
        order = draw(st.permutations(range(experts)))
        up, down = draw(st.integers(0, top_k)), draw(st.integers(0, experts - top_k))
        row[list(order[:up])] = OWN_WEIGHT if own else ACTIVATE
        row[list(order[up : up + down])] = DEACTIVATE
    return case


def fault(case: Case, weights: torch.Tensor, ids: torch.Tensor) -> str | None:
    """What is wrong with a correction in float32; None if it is what the loop in float64 says.

    Where two scores are closer than float32 tells apart, either may come first.
    """
    for t, row in enumerate(case.logits.double().tolist()):
        rules = {e: rule for e, rule in enumerate(case.rules[t].tolist()) if rule}
        own = OWN_WEIGHT in rules.values()
        wanted = case.router.steer(row, rules, own=own)
        found = dict(zip(ids[t].tolist(), weights[t].double().tolist(), strict=True))
        if is_close(case.router, row):
            continue
        if found.keys() != wanted.keys():
            return f"token {t}: experts {sorted(found)}, not {sorted(wanted)}"
        for e, weight in wanted.items():
            if abs(found[e] - weight) > 2e-6 * max(abs(weight), 1e-3) + 1e-7:
                return f"token {t}, expert {e}: weight {found[e]}, not {weight}"
    return None


def is_close(router: Router, row: list[float]) -> bool:
    """Whether two corrected scores, or two groups, are too close for float32."""
    c = sorted(router.corrected(row))
    unit = 2.0**-20 * max(1.0, abs(c[-1]))
    if any(b - a < unit for a, b in pairwise(c)):
        return True
    size = len(row) // router.groups
    corrected = router.corrected(row)
    count = 1 if router.bias is None else 2
    best = sorted(sum(sorted(corrected[g * size : (g + 1) * size], reverse=True)[:count]) for g in range(router.groups))
    return any(b - a < 2 * unit for a, b in pairwise(best))
