"""From a model runner, V1 or V2, to the steering state of its model."""

from __future__ import annotations

from typing import Any

from vllm_steermoe_plugin.state import SteeringState

_STATE = "steermoe_state"


def state_of(runner: Any) -> SteeringState | None:
    """The steering state of a runner's model; None if it is not one of ours or steering is off."""
    if not hasattr(runner, _STATE):
        states = [module.steering_state for module in runner.get_model().modules() if hasattr(module, "steering_state")]
        setattr(runner, _STATE, states[0] if states else None)
    state: SteeringState | None = getattr(runner, _STATE)
    return state
