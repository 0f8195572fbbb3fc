"""The selection seam: a router's logits are biased, and what it selects is corrected before anything else sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_steermoe_plugin.compat.symbols.worker import ROUTING
from vllm_steermoe_plugin.device.ops import reselect_, rewrite_
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.device.steering_state import SteeringState


class SteeredSelection:
    """Stands in the place of one router's `_compute_routing`: vLLM's own result, corrected by the rules of the step.

    Biases need no correction, and are added to the logits first.

    vLLM captures, counts and maps the ids to physical experts after it, and LoRA, soft caps and casts come before.
    """

    def __init__(self, router: Any, kind: RouterKind, state: SteeringState, row: int, sequence_rank: int) -> None:
        """Put it in place.

        Args:
            router: of one of vLLM's MoE layers.
            kind: what it does.
            state: of the model.
            row: of the layer in the state's rules.
            sequence_rank: see `MoELayer`.
        """
        ROUTING.load()
        self.kind = kind
        self.row = row
        self._router = router
        self._state = state
        self.sequence_rank = sequence_rank
        self._compute: Callable[..., tuple[torch.Tensor, torch.Tensor]] = router._compute_routing
        router._compute_routing = self

    @property
    def bias(self) -> torch.Tensor | None:
        """The router's correction bias `[E]`; vLLM may replace it when it loads weights."""
        return self._router.e_score_correction_bias.data if self.kind.bias else None

    def __call__(
        self,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids `[T, K]`, as of vLLM's router."""
        state = self._state
        slots = state.slots_of(self.sequence_rank, router_logits)
        rewrite_(router_logits, state.rules, slots, state.active, self.row, forces=False)
        weights, ids = self._compute(hidden_states, router_logits, indices_type, input_ids=input_ids)
        steering = (state.rules, slots, state.active, self.row)
        reselect_(weights, ids, router_logits, self.bias, *steering, *self.kind.arguments)
        return weights, ids
