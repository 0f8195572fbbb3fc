"""Methods added to vLLM's workers, called by `collective_rpc` with plain arguments and results."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from expert_registry.errors import EngineError, UnsupportedModelError
from vllm_steermoe_plugin.compat.handshake import WorkerStatus, users_extension, worker_status
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.worker.runners.guard import why_unbound
from vllm_steermoe_plugin.worker.runners.lookup import state_of


class SteerMoEWorker:
    """Mixed into the worker class by vLLM."""

    model_runner: Any

    def steermoe_handshake(self) -> WorkerStatus:
        """Whether this worker steers; see `why_not_all`."""
        try:
            state = state_of(self.model_runner)
        except EngineError as error:
            # Answered, not raised: vLLM would leave the other workers' answers to the next question.
            return worker_status(steers=False, fault=str(error))
        if state is None:
            return worker_status(steers=False, why=why_unbound(self.model_runner.get_model()))
        return worker_status(steers=True, corrects=state.corrects)

    def steermoe_status(self) -> dict[str, Any]:
        """Layers bound on this worker, what their routers do, and how many steered requests it has seen."""
        state = self._steermoe_state()
        return {
            "layers": list(state.layers),
            "routers": list(state.routers),
            "steered_requests": state.steered_requests,
        }

    def steermoe_take_counts(self) -> dict[str, Any]:
        """Counted tokens `[G]` of this worker since counting started, and their selections: the bytes of a
        little-endian int32 array of `shape`, `[G, L, E]`. Counting starts anew."""
        state = self._steermoe_state()
        selections, tokens = state.counts.read()
        state.counts.reset()
        if selections.size and selections.max() > np.iinfo(np.int32).max:
            raise EngineError("more selections than can be handed over at once; take the counts more often")
        return {
            "layers": list(state.layers),
            "shape": list(selections.shape),
            "selections": selections.astype("<i4").tobytes(),
            "tokens": tokens.tolist(),
        }

    def steermoe_reset_counts(self) -> None:
        """Start counting anew."""
        self._steermoe_state().counts.reset()

    def _steermoe_state(self) -> SteeringState:
        state = state_of(self.model_runner)
        if state is None:
            raise UnsupportedModelError("this worker's model is not steerable, or steering is switched off")
        return state


def __getattr__(name: str) -> type:
    """The extension with the methods of a user's own beside its own (`extension_beside`)."""
    theirs = users_extension(name)
    if theirs is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = theirs.rpartition(".")
    cls: type = getattr(importlib.import_module(module), attribute)
    # Remembered: vLLM compares the class with those that it has mixed in before.
    globals()[name] = cls if issubclass(cls, SteerMoEWorker) else type(name, (SteerMoEWorker, cls), {})
    found: type = globals()[name]
    return found
