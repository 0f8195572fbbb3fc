"""Make the model type and the tasks known to lm-eval in this process.

Both functions may be called any number of times.
"""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from lm_eval_tasks import TASKS

MODELS = {
    "steermoe-vllm": "lm_eval_tasks.models.in_process:SteerMoEVLLM",
    "steermoe-completions": "lm_eval_tasks.models.served:SteerMoECompletions",
    "steermoe-chat-completions": "lm_eval_tasks.models.served:SteerMoEChatCompletions",
}
"""Model type -> where it is; the same as the entry points `lm_eval.models`."""
_SENTINEL = "__steermoe__"


def add_model() -> None:
    """Register our model types, lazily: neither vLLM nor torch is imported."""
    # First of all: lm-eval adds its own models only while its registry is empty.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import model_registry

    for name, target in MODELS.items():
        # Later releases of lm-eval find the package's entry points themselves.
        if name not in model_registry:
            model_registry.register(name, target=target)


def add_tasks() -> None:
    """Have every TaskManager look into this package's folder, after lm-eval's own and before the user's.

    Raises:
        TypeError: this lm-eval's TaskManager takes no `include_path`.
    """
    from lm_eval.tasks.manager import TaskManager

    original = TaskManager.__init__
    if getattr(original, _SENTINEL, False):
        return
    signature = inspect.signature(original)
    if "include_path" not in signature.parameters:
        raise TypeError(f"TaskManager{signature} has no include_path")

    @functools.wraps(original)
    def init(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.arguments["include_path"] = _with_ours(bound.arguments.get("include_path"))
        original(*bound.args, **bound.kwargs)

    setattr(init, _SENTINEL, True)
    TaskManager.__init__ = init


def _with_ours(include_path: Any) -> list[Any]:
    given = list(include_path) if isinstance(include_path, list | tuple) else [include_path] if include_path else []
    # A folder that is scanned twice is reported as a conflict.
    return [TASKS, *(path for path in given if Path(path).resolve() != TASKS)]
