"""Put the checks in the way of what comes to a server, and of the files of `vllm run-batch`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from expert_registry.errors import RequestError
from vllm_steermoe_plugin.compat.internal import Internal, wrap_once
from vllm_steermoe_plugin.compat.symbols.http import (
    ANSWER_ERROR,
    BATCH_ERROR,
    BATCH_LINE,
    BATCH_REQUEST,
    BUILD_MIDDLEWARE,
    ENGINE_CLIENT,
)
from vllm_steermoe_plugin.frontend.misplaced import check_beams, check_body
from vllm_steermoe_plugin.steering.wire import refusal_text


def install_http_checks(*, load: bool = False) -> None:
    """Check what comes to this process's server, and lines of batch files; wraps once per process.

    Args:
        load: also import vLLM's server where it is not imported yet, which takes a second.
    """

    def wanted(internal: Internal) -> bool:
        return load or internal.module in sys.modules

    if wanted(BUILD_MIDDLEWARE):
        for internal in (ANSWER_ERROR, ENGINE_CLIENT):
            internal.load()
        wrap_once(BUILD_MIDDLEWARE, _with_ours)
    if BATCH_LINE.module in sys.modules:
        BATCH_REQUEST.load()
        wrap_once(BATCH_LINE, _checked_line)


def _with_ours(original: Callable[..., Any]) -> Callable[..., Any]:
    def init_entrypoints_middleware(args: Any, app: Any, *more: Any, **options: Any) -> None:
        from vllm_steermoe_plugin.frontend.middleware import SteeringMiddleware

        # First, so that vLLM's authentication and the user's middleware stand before it.
        app.add_middleware(SteeringMiddleware)
        original(args, app, *more, **options)

    return init_entrypoints_middleware


def _checked_line(original: Callable[..., Any]) -> Callable[..., Any]:
    def handle_endpoint_request(request: Any, *args: Any, **kwargs: Any) -> Any:
        body = request.body
        try:
            fields = vars(body) | (body.model_extra or {})
            check_body(request.url, fields)
            check_beams(request.url, fields)
        except RequestError as error:
            return BATCH_ERROR.load()(request, error_msg=refusal_text(error, error.code))
        return original(request, *args, **kwargs)

    return handle_endpoint_request
