"""The gate: vLLM's router layer, with the rewrite behind it once it is bound."""

from __future__ import annotations

from typing import Any

import torch

from expert_registry.errors import ConfigurationError
from vllm_steermoe_plugin.compat.symbols.worker import GATE_FORWARD, GATE_LINEAR, REPLACED_LAYERS
from vllm_steermoe_plugin.device.ops import rewrite_
from vllm_steermoe_plugin.device.steering_state import SteeringState

_GateLinear: Any = GATE_LINEAR.load()
GATE_FORWARD.load()


class SteeredGateLinear(_GateLinear):  # type: ignore[misc]
    """vLLM's GateLinear. Unbound, it is exactly that; bound, its logits pass through the rewrite."""

    steering: SteeringState | None = None
    steering_row: int = -1
    log_softmax: bool = False
    bfloat16: bool = False
    sequence_rank: int = 0

    def bind_steering(
        self, state: SteeringState, row: int, *, log_softmax: bool = False, sequence_rank: int = 0
    ) -> None:
        """Send this gate's logits through row `row` of the state's rules from now on.

        Args:
            state: of the model.
            row: of the layer in the state's rules.
            log_softmax: of `apply_rules`; `bfloat16`, likewise, is set once the layer's kernel is known.
            sequence_rank: see `MoELayer`.
        """
        self.steering = state
        self.steering_row = row
        self.log_softmax = log_softmax
        self.sequence_rank = sequence_rank

    def rewrite(self, logits: torch.Tensor) -> torch.Tensor:
        """Rewrite logits `[T, E]` in place by the rules of the current step, and return them."""
        state = self.steering
        if state is not None:
            slots = state.slots_of(self.sequence_rank, logits)
            rewrite_(logits, state.rules, slots, state.active, self.steering_row, self.log_softmax, self.bfloat16)
        return logits

    def forward(self, x: torch.Tensor) -> Any:
        """vLLM's own result for hidden states `x [T, H]`, its logits rewritten."""
        output = super().forward(x)
        if self.steering is None:
            return output
        if isinstance(output, tuple):
            logits, *rest = output
            return self.rewrite(logits), *rest
        return self.rewrite(output)


def use_steered_gates() -> None:
    """Have vLLM build SteeredGateLinear wherever a model file builds a GateLinear.

    Raises:
        EngineError: another plugin has already replaced the gate.
    """
    name = _GateLinear.__name__
    replaced = REPLACED_LAYERS.load().get(name)
    if replaced is SteeredGateLinear:
        return
    if replaced is not None:
        raise ConfigurationError(
            f"another plugin has replaced vLLM's {name} by {replaced!r}; steering needs that place"
        )
    _GateLinear.register_oot(SteeredGateLinear)
