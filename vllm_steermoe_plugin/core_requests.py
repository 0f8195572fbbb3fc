"""The engine's core takes what a front end of ours has checked, and no text that came past it.

A front end without the plugin, before workers with it, would pass on what a caller wrote: an expert list without
policy, cache salt or default, or a name that no worker can read. Here it ends that request alone, as an error; in a
step it would end the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from expert_registry.errors import EngineError
from vllm_steermoe_plugin import vllm_internals as vllm
from vllm_steermoe_plugin.front_end import is_unchecked


def install_core_check() -> None:
    """Wrap the place where the core takes requests, once per process."""
    vllm.wrap_once(vllm.CORE_TAKES, _preprocess)


def _preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
    def preprocess_add_request(self: Any, request: Any) -> Any:
        # First what it does for its caches, on which the front end counts.
        taken = original(self, request)
        if request.sampling_params is not None and is_unchecked(request.sampling_params.extra_args):
            raise EngineError(
                f"request {request.request_id} asks for steering or counting and was not checked: the process that "
                "sent it does not load the plugin (in the same version); install it there, and mind VLLM_PLUGINS"
            )
        return taken

    return preprocess_add_request
