"""What can be known of a bound model only once its weights are loaded, and is done before it first runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from expert_registry.errors import UnsupportedFeatureError
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.settings import SWITCH_OFF
from vllm_steermoe_plugin.worker.layers import MoELayer, is_monolithic, refuse_monolithic
from vllm_steermoe_plugin.worker.routed_ids import count_selections
from vllm_steermoe_plugin.worker.selection import SteeredSelection
from vllm_steermoe_plugin.worker.self_check import check_selection


def check_loaded(model: Any, state: SteeringState, layers: Sequence[MoELayer]) -> None:
    """Check corrected selections against their routers, whose biases are there now, and compile the GPU's kernels.

    Each layer has its kernel only now: one that selects by itself may round a gate's logits, and leaves no selection
    to correct.

    Raises:
        EngineError: a layer would not be steered exactly; or routing is to be counted, and a kernel does not say what
            it selects.
    """
    for layer in layers:
        if layer.gate is not None:
            layer.gate.bfloat16 = is_monolithic(layer.runner)
            continue
        refuse_monolithic(layer.runner)
        if layer.runner.do_naive_dispatch_combine:
            raise UnsupportedFeatureError(
                f"{layer.name} gathers the tokens of all ranks before it selects. Choose a modular kernel with "
                f"--moe-backend, or switch steering off with {SWITCH_OFF}"
            )
        selection = layer.router._compute_routing
        assert isinstance(selection, SteeredSelection)
        check_selection(selection, state, layer.index)
    if state.rules.device.type == "cuda":
        _warm_up(state, layers)
    if state.groups:
        count_selections(model, state)


def _warm_up(state: SteeringState, layers: Sequence[MoELayer]) -> None:
    """Compile what a captured graph will need: nothing may be compiled while it is captured."""
    from vllm_steermoe_plugin.device.kernels.warm_up import warm_up_counting, warm_up_gate, warm_up_selection

    for log_softmax, bfloat16 in {(g.log_softmax, g.bfloat16) for layer in layers if (g := layer.gate) is not None}:
        warm_up_gate(state.rules, state.token_slots, state.active, log_softmax, bfloat16)
    kinds: dict[RouterKind, torch.Tensor | None] = {}
    for layer in layers:
        if layer.gate is None:
            kinds.setdefault(layer.kind, layer.router._compute_routing.bias)
    for kind, bias in kinds.items():
        warm_up_selection(state.rules, state.token_slots, state.active, state.shape.top_k, kind, bias)
    warm_up_counting(state.counters, state.token_groups, state.shape.top_k)
