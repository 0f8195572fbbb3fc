"""Does every worker of an engine steer? The front end asks once, before any request is steered.

A worker on another machine may lack this package, have another release of it, or be kept from loading it by
VLLM_PLUGINS. It then builds vLLM's own model, and nothing there would complain. So workers that steer say so in
their answer to vLLM's health check, which every worker has; one that does not know this package answers None,
and one that has it but runs vLLM's own model says that.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from vllm_steermoe_plugin.compat.internal import wrap_once
from vllm_steermoe_plugin.compat.symbols.worker import WORKER_CHECK_HEALTH
from vllm_steermoe_plugin.compat.versions import DISTRIBUTION
from vllm_steermoe_plugin.worker.runners.lookup import state_of

CALL = WORKER_CHECK_HEALTH.name
"""The worker method that carries the answer."""
_UNBOUND = "whose model is vLLM's own"


def install_roll_call() -> None:
    """Let the workers of this process say whether they steer; wraps once per process."""
    wrap_once(WORKER_CHECK_HEALTH, _say_so)


def present() -> str:
    """What a worker that steers answers."""
    return f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"


def why_not_all(answers: Sequence[Sequence[object]]) -> str | None:
    """Why steering would not reach all workers; None if it does.

    Args:
        answers: of each engine, of each of its workers.
    """
    expected = present()
    wrong = [
        f"worker {rank} of engine {engine} ({answer or 'without the plugin'})"
        for engine, workers in enumerate(answers)
        for rank, answer in enumerate(workers)
        if answer != expected
    ]
    if not wrong and all(answers):
        return None
    return (
        f"steering would not reach {', '.join(wrong[:8]) or 'any worker'}{' and others' * (len(wrong) > 8)}: install "
        f"{expected} on every machine of this engine, let VLLM_PLUGINS load it there, use a worker class whose {CALL} "
        "returns what vLLM's does, or steer nothing"
    )


def _say_so(original: Callable[..., Any]) -> Callable[..., Any]:
    def check_health(self: Any) -> str | None:
        original(self)
        return f"{present()}, {_UNBOUND}" if state_of(self.model_runner) is None else present()

    return check_health
