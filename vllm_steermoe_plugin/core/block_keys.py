"""A counted request shares its prompt's cached blocks with others, up to the first token that counts.

A token found in vLLM's prefix cache is not routed again, so it would not be counted. From the block of the first
counted token on, the keys of a request's blocks are therefore its own; the blocks before it (a document that many
questions share, a chat's beginning that both sides of a pair share) are found and left as they would be without
counting. vLLM chains the keys of later blocks to these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from vllm_steermoe_plugin.steering.wire import SHARED_KEY


def keep_apart(request: Any, extra_args: Mapping[str, object] | None, scheduler: Any) -> None:
    """Make the keys of a counted request's blocks its own, from its first counted token on.

    Args:
        request: the core's, with the keys of its prompt's blocks (none where there is no prefix cache).
        extra_args: of its sampling parameters.
        scheduler: of the core; it knows of how many tokens a block's key is.
    """
    match (extra_args or {}).get(SHARED_KEY):
        # Anything else did not come from the front end; it must not stop the engine.
        case [int(first), str(own)] if request.block_hashes:
            for block in range(first // scheduler.hash_block_size, len(request.block_hashes)):
                request.block_hashes[block] = hashlib.sha256(request.block_hashes[block] + own.encode()).digest()
