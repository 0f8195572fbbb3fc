"""The correction against transformers' own routers, of models that vLLM's CPU build cannot run.

What a router selects without rules says that its kind is right; what the correction makes of a rule is held against the
same router, asked again without the experts that are out.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.laguna.modeling_laguna import LagunaTopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHTopkRouter

from vllm_steermoe_plugin.device.reselect import reselect, select, weigh
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE

TOKENS, HIDDEN, EXPERTS, TOP_K = 40, 12, 16, 4
CONFIG = SimpleNamespace(
    hidden_size=HIDDEN,
    num_experts=EXPERTS,
    num_local_experts=EXPERTS,
    num_experts_per_tok=TOP_K,
    moe_router_logit_softcapping=3.0,
    moe_norm_min=1e-12,
    scoring_func="sqrtsoftplus",
    routed_scaling_factor=1.5,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
)
ROUTERS: dict[str, tuple[Callable[[Any], Any], RouterKind]] = {
    "MiniMax M2": (MiniMaxM2TopKRouter, RouterKind("sigmoid", bias=True, renormalize=True)),
    "Laguna, capped": (LagunaTopKRouter, RouterKind("sigmoid", bias=True, renormalize=True)),
    "Ernie 4.5": (Ernie4_5_MoeTopKRouter, RouterKind("softmax", bias=True, renormalize=True)),
    "DeepSeek V4": (DeepseekV4TopKRouter, RouterKind("sqrtsoftplus", bias=True, renormalize=True, scale=1.5)),
    "Nemotron-H": (
        NemotronHTopkRouter,
        RouterKind("sigmoid", bias=True, groups=4, kept=2, renormalize=True, scale=1.5),
    ),
}


class Case:
    """One of transformers' routers with random weights and biases, and tokens for it."""

    def __init__(self, name: str) -> None:
        make, self.kind = ROUTERS[name]
        generator = torch.Generator().manual_seed(3)
        self.router = make(CONFIG)
        self.bias = torch.randn(EXPERTS, generator=generator) * 0.7
        self.hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
        with torch.no_grad():
            self.router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator) * 0.4)

    def run(self, out: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, weights and experts; experts that are `out` are kept from being selected by a bias of theirs."""
        bias = self.bias.clone()
        bias[list(out)] = -1e3
        with torch.no_grad():
            if isinstance(self.router, MiniMaxM2TopKRouter):
                found = self.router(self.hidden, bias)
            else:
                holder = self.router.moe_statics if hasattr(self.router, "moe_statics") else self.router
                holder.e_score_correction_bias.copy_(bias.view_as(holder.e_score_correction_bias))
                found = self.router(self.hidden)
        logits, weights, ids = found
        return logits.float(), weights, ids


@pytest.mark.parametrize("name", ROUTERS)
def test_a_routers_kind_says_what_it_selects_and_how_it_weighs(name: str) -> None:
    case = Case(name)
    logits, weights, ids = case.run()
    found = select(logits, case.bias, case.kind, TOP_K)
    assert torch.equal(found[1].sort(1).values, ids.sort(1).values)
    torch.testing.assert_close(weigh(logits, ids, case.kind), weights)


@pytest.mark.parametrize("name", ROUTERS)
def test_deactivated_experts_are_replaced_by_the_routers_next_choice(name: str) -> None:
    case = Case(name)
    logits, weights, ids = case.run()
    favourite = int(ids.flatten().bincount(minlength=EXPERTS).argmax())
    rules = torch.zeros(TOKENS, EXPERTS, dtype=torch.float16)
    rules[:, favourite] = DEACTIVATE
    new, experts = reselect(weights, ids, logits, case.bias, rules, case.kind)
    _, expected, without = case.run((favourite,))
    # Without it another group may be kept; the correction stays within those that the model kept.
    same = (experts.sort(1).values == without.sort(1).values).all(1)
    assert same.all() if case.kind.groups == 1 else same.any()
    order, other = experts[same].sort(1).indices, without[same].sort(1).indices
    torch.testing.assert_close(new[same].gather(1, order), expected[same].gather(1, other))


@pytest.mark.parametrize("name", ROUTERS)
def test_an_activated_expert_pushes_out_the_routers_weakest_choice_and_weighs_as_its_strongest(name: str) -> None:
    case = Case(name)
    logits, weights, ids = case.run()
    rare = int(ids.flatten().bincount(minlength=EXPERTS).argmin())
    rules = torch.zeros(TOKENS, EXPERTS, dtype=torch.float16)
    rules[:, rare] = ACTIVATE
    new, experts = reselect(weights, ids, logits, case.bias, rules, case.kind)
    u = weigh(logits, torch.arange(EXPERTS).expand(TOKENS, -1), RouterKind(case.kind.score))
    for t in range(TOKENS):
        chosen = set(ids[t].tolist())
        kept = chosen if rare in chosen else chosen - {min(chosen, key=lambda e: float(u[t, e] + case.bias[e]))}
        assert set(experts[t].tolist()) == kept | {rare}
        assert float(new[t, experts[t].tolist().index(rare)]) >= float(new[t].max()) - 1e-6
