"""Which model runner is live, and does it report to the steering state? Checked in each worker before any forward pass.

A hook on the wrong runner steers nothing and says nothing. So a bound model refuses to run until the worker
has shown its runner here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from expert_registry.errors import EngineError
from vllm_steermoe_plugin.compat.internal import SENTINEL, wrap_once
from vllm_steermoe_plugin.compat.symbols.worker import V1_RUNNER, V2_RUNNER, WORKER, WORKER_KV_CACHE_SPEC
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.settings import SWITCH_OFF
from vllm_steermoe_plugin.worker.routed_ids import count_selections
from vllm_steermoe_plugin.worker.runners.lookup import show_state
from vllm_steermoe_plugin.worker.runners.v1 import V1_METHODS
from vllm_steermoe_plugin.worker.runners.v2 import reports_to

_UNBOUND = "_steermoe_unbound"


def install_worker_check() -> None:
    """Have each worker show its runner and model before the first forward pass; wraps once per process."""
    WORKER.load()
    # vLLM asks each worker for this once its model is loaded.
    wrap_once(WORKER_KV_CACHE_SPEC, _checked_first)


def guard_model(model: torch.nn.Module) -> None:
    """Let `model` raise an EngineError instead of running, until `lift_guard`.

    Raises:
        EngineError: its class does not call `forward` as torch does, so that a call could pass by the guard.
    """
    if type(model).__call__ is not torch.nn.Module.__call__:
        raise EngineError(
            f"{type(model).__name__} has a __call__ of its own (is it compiled as a whole?), so it cannot be kept from "
            f"running before its runner is known. Switch steering off with {SWITCH_OFF}"
        )

    @functools.wraps(model.forward)
    def refuse(*_: Any, **__: Any) -> Any:
        raise EngineError(
            f"{type(model).__name__} is to be steered, but its worker never showed its model runner to the plugin "
            "(it is not one of vLLM's own workers); every request would run unsteered"
        )

    # On the instance, where wrappers that call `forward` themselves find it as well; a forward hook they would miss.
    model.forward = refuse


def lift_guard(model: torch.nn.Module) -> None:
    """Let `model` run; it may be lifted again, as vLLM may ask a worker twice."""
    vars(model).pop("forward", None)


def leave_unbound(model: torch.nn.Module) -> None:
    """Let `model` run as vLLM's own, since nobody may ask for its steering."""
    setattr(model, _UNBOUND, True)


def check_live_runner(runner: Any, state: SteeringState, *, configured_v2: bool) -> None:
    """Raise EngineError unless `runner` tells `state` of every request and every step.

    Args:
        runner: the worker's own, its model loaded.
        state: of the runner's model.
        configured_v2: whether the engine's configuration says Model Runner V2.
    """
    cls = type(runner)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if isinstance(runner, V1_RUNNER.load()):
        if configured_v2:
            raise _wrong(name, "it is Model Runner V1, but the configuration says V2")
        for method in V1_METHODS:
            # As Python finds it: a subclass's own method would stand before the wrapped one.
            if not hasattr(getattr(cls, method), SENTINEL):
                owner = next(base for base in cls.__mro__ if method in vars(base))
                raise _wrong(name, f"{owner.__module__}.{owner.__qualname__} has a {method} of its own")
    elif isinstance(runner, V2_RUNNER.load()):
        if not configured_v2:
            raise _wrong(name, "it is Model Runner V2, but the configuration says V1")
        found = getattr(runner, "model_state", None)
        if not reports_to(found, state):
            raise _wrong(name, f"its model state, {type(found).__qualname__}, does not report to the plugin")
    else:
        raise _wrong(name, "it is neither vLLM's Model Runner V1 nor V2")


def _wrong(runner: str, why: str) -> EngineError:
    return EngineError(
        f"steering would not reach the model runner {runner}: {why}. Use vLLM's own runner, or switch steering off "
        f"with {SWITCH_OFF}"
    )


def _checked_first(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_spec(self: Any) -> Any:
        runner = self.model_runner
        model, state = runner.get_model(), show_state(runner)
        if state is not None:
            check_live_runner(runner, state, configured_v2=self.vllm_config.use_v2_model_runner)
            if state.groups:
                count_selections(model, state)
            lift_guard(model)
        elif hasattr(model, "steering_state") and not hasattr(model, _UNBOUND):
            raise EngineError(f"{type(model).__name__} is to be steered, but its gates were not bound")
        return original(self)

    return get_kv_cache_spec
