"""The seam for counting: each MoE layer hands over the expert ids that its router selected."""

from __future__ import annotations

from typing import Any

import torch

from expert_registry.errors import UnsupportedFeatureError
from vllm_steermoe_plugin.compat.symbols.worker import BIND_CAPTURER
from vllm_steermoe_plugin.device.ops import count_
from vllm_steermoe_plugin.device.steering_state import SteeringState


class Counter:
    """What `bind_routed_experts_capturer` binds: counts the ids that each layer's router selected."""

    def __init__(self, state: SteeringState) -> None:
        self._state = state
        self._row_of = {layer: row for row, layer in enumerate(state.layers)}

    def capture(self, layer_id: int, topk_ids: torch.Tensor) -> None:
        """Count `topk_ids [T, K]` of checkpoint layer `layer_id`."""
        if layer_id in self._row_of:  # Layers that select by a hash of the token are not counted.
            count_(topk_ids, self._state.counters, self._state.token_groups, self._row_of[layer_id])


def count_selections(model: Any, state: SteeringState) -> None:
    """Have every MoE layer of a loaded model count into `state`.

    Loaded, because only then each layer has its kernel, and which part of a layer selects is the kernel's affair.

    Raises:
        EngineError: a layer's kernel selects by itself and does not say what.
    """
    try:
        BIND_CAPTURER.load()(model, Counter(state))
    except ValueError as error:
        raise UnsupportedFeatureError(
            f"routing cannot be counted here: {error} Choose another MoE kernel with vLLM's moe_backend, or leave out "
            "the setting 'count_groups'"
        ) from None
