"""From a model runner, V2 or V1, to the steering state of its model; checked when they meet."""

from __future__ import annotations

from typing import Any

from expert_registry.errors import CompatibilityError, EngineError, UnsupportedFeatureError
from vllm_steermoe_plugin.compat.internal import SENTINEL
from vllm_steermoe_plugin.compat.symbols.worker import V1_METHODS, V1_RUNNER, V2_RUNNER
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.settings import SWITCH_OFF
from vllm_steermoe_plugin.worker.runners.guard import lift_guard, why_unbound
from vllm_steermoe_plugin.worker.runners.v2 import reports_to

_STATE = "steermoe_state"


def state_of(runner: Any) -> SteeringState | None:
    """The steering state of a runner's model; None if it is not one of ours or steering is off. Remembered.

    Raises:
        EngineError: the model is to be steered, and the runner would run it without telling its state.
    """
    if not hasattr(runner, _STATE):
        setattr(runner, _STATE, _meet(runner))
    state: SteeringState | None = getattr(runner, _STATE)
    return state


def _meet(runner: Any) -> SteeringState | None:
    model = runner.get_model()
    states = [module.steering_state for module in model.modules() if hasattr(module, "steering_state")]
    if not states:
        return None
    state: SteeringState | None = states[0]
    if state is None:
        if why_unbound(model) is None:
            raise CompatibilityError(f"{type(model).__name__} is to be steered, but its gates were not bound")
        return None
    check_live_runner(runner, state, configured_v2=runner.vllm_config.use_v2_model_runner)
    lift_guard(model)
    return state


def check_live_runner(runner: Any, state: SteeringState, *, configured_v2: bool) -> None:
    """Raise EngineError unless `runner` tells `state` of every request and every step.

    Args:
        runner: the worker's own, its model loaded.
        state: of the runner's model.
        configured_v2: whether the engine's configuration says Model Runner V2.
    """
    cls = type(runner)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if isinstance(runner, V2_RUNNER.load()):
        if not configured_v2:
            raise _wrong(name, "it is Model Runner V2, but the configuration says V1")
        found = getattr(runner, "model_state", None)
        if not reports_to(found, state):
            raise _wrong(name, f"its model state, {type(found).__qualname__}, does not report to the plugin")
    elif isinstance(runner, V1_RUNNER.load()):
        if configured_v2:
            raise _wrong(name, "it is Model Runner V1, but the configuration says V2")
        for method in V1_METHODS:
            # As Python finds it: a subclass's own method would stand before the wrapped one.
            if not hasattr(getattr(cls, method), SENTINEL):
                owner = next(base for base in cls.__mro__ if method in vars(base))
                raise _wrong(name, f"{owner.__module__}.{owner.__qualname__} has a {method} of its own")
    else:
        raise _wrong(name, "it is neither vLLM's Model Runner V1 nor V2")


def _wrong(runner: str, why: str) -> EngineError:
    return UnsupportedFeatureError(
        f"steering would not reach the model runner {runner}: {why}. Use vLLM's own runner, or switch steering off "
        f"with {SWITCH_OFF}"
    )
