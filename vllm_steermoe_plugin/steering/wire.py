"""What crosses between vLLM's processes with a request: keys of `extra_args`, and the cache salt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from expert_registry.errors import RequestError

STEER_KEY = "steermoe"
"""Key of this text in `SamplingParams.extra_args`; as JSON, with the experts, when it reaches a worker."""

CHECKED_KEY = "steermoe_checked"
"""Key that the front end writes beside it: true. No caller gets it past a front end that loads the plugin."""


COUNT_KEY = "steermoe_count"
"""Key of a request's counted spans in `SamplingParams.extra_args`, as JSON."""

SHARED_KEY = "steermoe_shared"
"""Key that the front end writes for a counted request: `[first counted position, a text no other request has]`."""


SALT_PREFIX = "steermoe:"
"""Reserved for salts of steering."""

STEERED = f"{SALT_PREFIX}1:"
"""The number is that of the rewrite: if it ever computes another cache for the same profile, what a store of KV blocks
has kept from before must not be found."""

OUR_KEYS = (STEER_KEY, COUNT_KEY, SHARED_KEY)


def was_checked(extra_args: Mapping[str, object] | None) -> bool:
    """Whether a front end has prepared a request, by its extra arguments."""
    return extra_args is not None and extra_args.get(CHECKED_KEY) is True


def is_unchecked(extra_args: Mapping[str, object] | None) -> bool:
    """Whether a request asks for something, and no front end has prepared it."""
    return any((extra_args or {}).get(key) is not None for key in OUR_KEYS) and not was_checked(extra_args)


def refusal_text(message: object, code: str) -> str:
    """What a caller is answered to a request that is refused: why, and the error's code."""
    return f"steermoe: {message} [{code}]"


def compose_salt(salt: str | None, user_salt: str | None) -> str | None:
    """The request's cache salt: ours, joined with the user's own.

    It is as vLLM wants salts to be for the caches behind it: at most 128 characters, none of them `@`, `/` or `\\`.

    Raises:
        RequestError: the user's salt looks like ours; it could reach another request's cached blocks.
    """
    if user_salt is not None and user_salt.startswith(SALT_PREFIX):
        raise RequestError(f"a cache salt must not begin with {SALT_PREFIX!r}; that is reserved for steering")
    if salt is None:
        return user_salt
    if user_salt is None:
        return salt
    return SALT_PREFIX + hashlib.sha256(f"{salt}\0{user_salt}".encode("utf-8", "surrogatepass")).hexdigest()
