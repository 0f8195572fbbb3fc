"""Guard of lm-eval's response cache, whose keys hold the request but neither model nor steering."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from expert_registry.errors import UsageError

MARK = "steermoe"
"""Key of the mark in a cache; lm-eval's own keys are hexadecimal digits."""


def claim_cache(cache: MutableMapping[str, Any] | None, identity: str) -> None:
    """Mark an empty cache as `identity`'s own; refuse one that holds another's responses.

    Args:
        cache: of `--use_cache`; None if there is none.
        identity: text that names the model and its steering.

    Raises:
        UsageError: the responses in the cache were made otherwise, or nobody knows how.
    """
    if cache is None:
        return
    owner = cache.get(MARK)
    if owner is None and len(cache):
        raise UsageError(
            "the file of --use_cache holds responses that were not made by steermoe-vllm, "
            "so nobody can tell how they were steered; give another path"
        )
    if owner is not None and owner != identity:
        raise UsageError(
            f"the file of --use_cache holds responses of {owner}, but this run is {identity}; give each its own path"
        )
    cache[MARK] = identity
