"""A bound model does not run before its model runner is known to report to the steering state.

A hook on the wrong runner steers nothing and says nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from expert_registry.errors import UnsupportedFeatureError, UnsupportedModelError
from vllm_steermoe_plugin.settings import SWITCH_OFF

_UNBOUND = "_steermoe_unbound"


def guard_model(model: torch.nn.Module, when_loaded: Callable[[], None]) -> None:
    """Let `model` raise an EngineError instead of running, until `lift_guard`, which first calls `when_loaded`.

    Raises:
        EngineError: its class does not call `forward` as torch does, so that a call could pass by the guard.
    """
    if type(model).__call__ is not torch.nn.Module.__call__:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a __call__ of its own (is it compiled as a whole?), so it cannot be kept from "
            f"running before its runner is known. Switch steering off with {SWITCH_OFF}"
        )

    @functools.wraps(model.forward)
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnsupportedFeatureError(
            f"{type(model).__name__} is to be steered, but no supported model runner was found in this worker (a "
            "custom worker class?); every request would run unsteered"
        )

    refuse.when_loaded = when_loaded  # type: ignore[attr-defined]
    # On the instance, where wrappers that call `forward` themselves find it as well; a forward hook they would miss.
    model.forward = refuse


def lift_guard(model: torch.nn.Module) -> None:
    """Let `model` run, since its runner reports to its steering state; a second call does nothing.

    Raises:
        EngineError: what was to be done once its weights are loaded has failed.
    """
    guard = vars(model).get("forward")
    if guard is not None:
        guard.when_loaded()
        vars(model).pop("forward")


def leave_unbound(model: torch.nn.Module, why: str = "") -> None:
    """Let `model` run as vLLM's own, since nobody may ask for its steering; `why`, if only its worker knows that."""
    setattr(model, _UNBOUND, why)


def why_unbound(model: torch.nn.Module) -> str | None:
    """What was said of `model` then; None if it was not left so."""
    why: str | None = getattr(model, _UNBOUND, None)
    return why
