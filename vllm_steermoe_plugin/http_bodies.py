"""JSON bodies that ask for steering where vLLM would drop it without a word: refused.

Each JSON endpoint of vLLM, but for `/invocations` (which hands bodies to the endpoints below), passes its check of the
content type; there the body has been parsed, and is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from expert_registry.errors import RequestError
from vllm_steermoe_plugin import vllm_internals as vllm
from vllm_steermoe_plugin.request import STEER_KEY

READ_XARGS = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
"""Endpoints that generate and read `vllm_xargs`."""
_HARMLESS = (*(f"{path}/render" for path in READ_XARGS), "/tokenize", "/detokenize", "/count_tokens")
"""Endpoints that pass it on, or generate nothing."""
_TOKENS_IN = "/inference/v1/generate"

Place = tuple[str, ...]
"""Keys that lead from a body to the object in which steering is asked for."""
_CONTAINERS = ("extra_args", "extra_body", "sampling_params", "vllm_xargs")
_DEPTH = 3
"""In what, and how deep, a caller may have put it."""


def check_body(path: str, body: object) -> None:
    """Raise RequestError if `body`, sent to `path`, asks for steering where nothing reads it.

    Args:
        path: of the URL; there may be a prefix before that of the endpoint.
        body: as parsed from JSON.
    """
    reads = _read_at(path)
    for place in _asking(body):
        if place != reads:
            raise RequestError(
                f"vLLM's {path:.80} does not read {_shown(place)}, so this request would not be steered; "
                + (f"write {_shown(reads)}" if reads is not None else f"ask at one of {', '.join(READ_XARGS)}")
            )


def install_http_hook() -> None:
    """Look at the JSON bodies of this process's server; wraps once per process."""
    vllm.wrap_once(vllm.VALIDATE_JSON, _then_the_body)


def _read_at(path: str) -> Place | None:
    if path.endswith(_TOKENS_IN):
        return ("sampling_params", "extra_args")
    return ("vllm_xargs",) if path.endswith((*READ_XARGS, *_HARMLESS)) else None


def _asking(body: object, place: Place = ()) -> Iterator[Place]:
    if not isinstance(body, dict):
        return
    # Null asks for nothing, here as everywhere.
    if body.get(STEER_KEY) is not None:
        yield place
    if len(place) < _DEPTH:
        for key in _CONTAINERS:
            yield from _asking(body.get(key), (*place, key))


def _shown(place: Place) -> str:
    return ".".join((*place, STEER_KEY))


def _then_the_body(original: Callable[..., Any]) -> Callable[..., Any]:
    refusal = vllm.VALIDATION_ERROR.load()

    async def validate_json_request(raw_request: Any) -> None:
        await original(raw_request)
        try:
            body = await raw_request.json()
        except ValueError:
            return  # The endpoint says so.
        try:
            check_body(raw_request.url.path, body)
        except RequestError as error:
            raise refusal(f"steermoe: {error}", parameter=STEER_KEY) from error

    return validate_json_request
