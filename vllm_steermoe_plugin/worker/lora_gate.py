"""LoRA: vLLM wraps the gate and adds the adapter's part to its output, so the rewrite must come after that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_steermoe_plugin.compat.internal import wrap_once
from vllm_steermoe_plugin.compat.symbols.worker import LORA_ADD, LORA_APPLY, LORA_LAYER
from vllm_steermoe_plugin.worker.gate import SteeredGateLinear


def install_lora_hook() -> None:
    """Wrap the LoRA layer that vLLM puts around gates, once per process."""
    LORA_LAYER.load()
    LORA_ADD.load()
    wrap_once(LORA_APPLY, _apply)


def _apply(original: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        gate = self.base_layer
        if not isinstance(gate, SteeredGateLinear) or gate.steering is None:
            return original(self, x, bias)
        # vLLM's own gate; called as usual, this one would rewrite before the adapter shifts the logits.
        output = super(SteeredGateLinear, gate).forward(x)
        logits = output[0] if isinstance(output, tuple) else output
        return gate.rewrite(self._apply_lora_to_output(x, logits))

    return apply
