"""JSON bodies that ask for steering where vLLM would drop it without a word: refused.

Each JSON endpoint of vLLM, but for `/invocations` (which hands bodies to the endpoints below), passes its check of the
content type; there the body has been parsed, and is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from expert_registry.errors import RequestError
from vllm_steermoe_plugin import vllm_internals as vllm
from vllm_steermoe_plugin.state import STEER_KEY

XARGS = "vllm_xargs"
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


def check_body(path: str, body: object) -> None:
    """Raise RequestError if `body`, sent to `path`, asks for steering where nothing reads it.

    Args:
        path: of the URL; there may be a prefix before that of the endpoint.
        body: as parsed from JSON.
    """
    if not isinstance(body, dict):
        return
    misplaced = [place for place in ((), ("extra_body",), ("extra_body", XARGS), ("extra_args",)) if _asks(body, place)]
    if misplaced:
        place = ".".join((*misplaced[0], STEER_KEY))
        raise RequestError(
            f"vLLM does not read {place}, so this request would not be steered; write {XARGS}.{STEER_KEY}"
        )
    if _asks(body, (XARGS,)) and not path.endswith((*READ_XARGS, *_HARMLESS)):
        raise RequestError(
            f"vLLM's {path:.80} does not read {XARGS}, so this request would not be steered; ask at one of "
            f"{', '.join(READ_XARGS)}"
        )


def install_http_hook() -> None:
    """Look at the JSON bodies of this process's server; wraps once per process."""
    vllm.VALIDATE_JSON.load()
    vllm.wrap_once(vllm.API_UTILS, "validate_json_request", _then_the_body)


def _asks(body: object, place: tuple[str, ...]) -> bool:
    for key in place:
        body = body.get(key) if isinstance(body, dict) else None
    return isinstance(body, dict) and STEER_KEY in body


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
