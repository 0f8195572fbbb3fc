"""The seam for counting, with vLLM's own binding and a layer as small as it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from expert_registry.errors import EngineError
from expert_registry.shape import MoEShape
from tests.support.top_k_router import TopK
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.worker.routed_ids import count_selections

SHAPE = MoEShape("OlmoeForCausalLM", (4,), 6, 2)


class Layer(MoERunner):
    """As much of an MoE layer as is asked for its router."""

    def __init__(self, **kernel: Any) -> None:
        torch.nn.Module.__init__(self)
        self.layer_name = "model.layers.4.mlp.experts"
        self.routed_experts = SimpleNamespace(quant_method=SimpleNamespace(**kernel))
        self.router = TopK(2, 6)

    @property
    def _quant_method(self) -> Any:
        return self.routed_experts.quant_method


def new_state() -> SteeringState:
    return SteeringState(SHAPE, (4,), max_requests=2, max_tokens=8, count_groups=1, device=torch.device("cpu"))


def test_a_layer_hands_over_what_its_router_selected() -> None:
    state, layer = new_state(), Layer(is_monolithic=False)
    count_selections(torch.nn.Sequential(layer), state)
    state.token_groups[:3] = 1
    layer.router.select_experts(torch.zeros(4, 8), torch.arange(6).float().repeat(4, 1))
    assert state.counters[0, 1].tolist() == [0, 0, 0, 0, 3, 3]


@pytest.mark.parametrize("kernel", [None, SimpleNamespace(impl=SimpleNamespace(fused_experts=object()))])
def test_a_kernel_that_selects_by_itself_and_does_not_say_what_is_refused(kernel: Any) -> None:
    layer = Layer(is_monolithic=True, moe_kernel=kernel)
    with pytest.raises(EngineError, match=r"cannot be counted here: .*monolithic.*moe_backend"):
        count_selections(torch.nn.Sequential(layer), new_state())
