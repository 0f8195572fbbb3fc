"""A counted request shares its prompt's cached blocks with others, up to the first token that counts.

A token found in vLLM's prefix cache is not routed again, so it would not be counted. From the block of the first
counted token on, a block's key therefore has a part that no other request has; the blocks before it (a document that
many questions share, a chat's beginning that both sides of a pair share) are found and left as they would be without
counting. vLLM chains the keys, so one such block is enough.

The front end says where; here, in the engine's core, the key gets its part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_steermoe_plugin.compat.internal import wrap_once
from vllm_steermoe_plugin.compat.symbols.core import BLOCK_KEYS, CORE_REQUEST
from vllm_steermoe_plugin.steering.wire import SHARED_KEY


def install_block_keys() -> None:
    """Wrap vLLM's function, once per process."""
    CORE_REQUEST.load()
    wrap_once(BLOCK_KEYS, _block_keys)


def _block_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    def block_keys(request: Any, start: int, end: int, *args: Any) -> tuple[tuple[Any, ...] | None, int]:
        keys, following = original(request, start, end, *args)
        params = request.sampling_params
        match params.extra_args.get(SHARED_KEY) if params is not None and params.extra_args else None:
            # Anything else did not come from the front end; it must not stop the engine.
            case [int(first), str(own)] if start <= first < end:
                keys = (*(keys or ()), (SHARED_KEY, own))
        return keys, following

    return block_keys
