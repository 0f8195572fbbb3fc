"""From a model runner, V1 or V2, to the steering state of its model."""

from __future__ import annotations

from typing import Any

from vllm_steermoe_plugin.device.steering_state import SteeringState

_STATE = "steermoe_state"


def show_state(runner: Any) -> SteeringState | None:
    """The steering state of the model that a runner has just loaded, to be remembered by `state_of`."""
    states = [module.steering_state for module in runner.get_model().modules() if hasattr(module, "steering_state")]
    setattr(runner, _STATE, states[0] if states else None)
    return states[0] if states else None


def state_of(runner: Any) -> SteeringState | None:
    """The steering state of a runner's model; None if it is not one of ours or steering is off."""
    if not hasattr(runner, _STATE):
        show_state(runner)
    state: SteeringState | None = getattr(runner, _STATE)
    return state
