"""What comes to a server is looked at before it is answered.

Steering that vLLM would drop is refused, wherever it stands (`misplaced.py`). And what is refused for another reason is
refused here already: a streamed answer has begun with 200 by the time that the engine is asked.

Each JSON endpoint of vLLM passes its check of the content type; there the body has been parsed. Forms and batch files
come by where vLLM makes sampling parameters of a request.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from expert_registry.errors import RequestError
from vllm_steermoe_plugin.compat.internal import Internal, wrap_once
from vllm_steermoe_plugin.compat.symbols.frontend import VALIDATION_ERROR
from vllm_steermoe_plugin.compat.symbols.http import (
    ENGINE_CLIENT,
    TO_BEAMS,
    TO_SAMPLING,
    VALIDATE_INVOCATION,
    VALIDATE_JSON,
)
from vllm_steermoe_plugin.frontend.misplaced import asked_at, check_body, check_fields, check_names, generates
from vllm_steermoe_plugin.steering.wire import STEER_KEY

Check = Callable[[Any, Mapping[str, object] | None], Awaitable[None]]
"""Given an engine client and what is asked for: raise what vLLM answers if that is refused."""


def install_http_hooks(check: Check, *, load: bool = False) -> None:
    """Look at what comes to this process's server; wraps once per process.

    Args:
        check: see above.
        load: also where vLLM's modules of endpoints are not loaded yet, which takes a second. It must be done before
            vLLM makes the endpoints, which keep what they find.
    """

    def wanted(internal: Internal) -> bool:
        return load or internal.module in sys.modules

    for validate_json in (VALIDATE_JSON, VALIDATE_INVOCATION):
        if wanted(validate_json):
            wrap_once(validate_json, _at_the_door(check))
    for to_sampling in TO_SAMPLING:
        if wanted(to_sampling):
            wrap_once(to_sampling, _checked_fields)
    for to_beams in TO_BEAMS:
        if wanted(to_beams):
            wrap_once(to_beams, _no_beams)


def _at_the_door(check: Check) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        engine_client = ENGINE_CLIENT.load()

        async def validate_json_request(raw_request: Any) -> None:
            await original(raw_request)
            try:
                body = await raw_request.json()
            except ValueError:
                return  # The endpoint says so.
            path = raw_request.url.path
            try:
                check_body(path, body)
                check_names(path, "query parameter", raw_request.query_params.keys())
                check_names(path, "header", raw_request.headers.keys())
            except RequestError as error:
                raise _refusal(error) from None
            if generates(path):
                await check(engine_client(raw_request), asked_at(path, body))

        return validate_json_request

    return make


def _checked_fields(original: Callable[..., Any]) -> Callable[..., Any]:
    last: Callable[[], Any] = lambda: None  # noqa: E731

    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal last
        # vLLM calls this once for each of a request's prompts.
        if last() is not self:
            _check_fields(self)
            last = weakref.ref(self)
        return original(self, *args, **kwargs)

    return to_sampling_params


def _no_beams(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check_fields(self)
        if STEER_KEY in (self.vllm_xargs or {}):
            raise _refusal("vLLM's beam search does not carry a request's steering; ask without beam search")
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _check_fields(request: Any) -> None:
    try:
        check_fields(f"vLLM's {type(request).__name__}", vars(request) | (request.model_extra or {}))
    except RequestError as error:
        raise _refusal(error) from None


def _refusal(why: RequestError | str) -> Exception:
    refusal: Exception = VALIDATION_ERROR.load()(f"steermoe: {why}", parameter=STEER_KEY)
    return refusal
