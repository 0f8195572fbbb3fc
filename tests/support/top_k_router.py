"""A router of vLLM that runs on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter


class TopK(BaseRouter):
    """vLLM's router with plain softmax and top-k in it (its fused kernel is not for CPUs)."""

    @property
    def routing_method_type(self) -> Any:
        raise NotImplementedError

    def _compute_routing(
        self, hidden_states: torch.Tensor, router_logits: torch.Tensor, indices_type: Any, *, input_ids: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = router_logits.float().softmax(-1).topk(self.top_k)
        return weights, ids.int()
