"""ASGI middleware that validates what comes to a server before the response starts.

Steering that vLLM would drop is refused, wherever it stands (`misplaced.py`). What is refused for another reason is
refused here already: a streamed answer has begun with 200 by the time that the engine is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expert_registry.errors import RequestError, SteerMoEError
from vllm_steermoe_plugin.admission.request_admission import Decision, FrontEnd
from vllm_steermoe_plugin.compat.symbols.http import ANSWER_ERROR, ENGINE_CLIENT
from vllm_steermoe_plugin.frontend.attached import front_end_of, refusal
from vllm_steermoe_plugin.frontend.decided import decided
from vllm_steermoe_plugin.frontend.misplaced import (
    asked_at,
    check_beams,
    check_body,
    check_names,
    generates,
    has_beams,
)
from vllm_steermoe_plugin.steering.wire import STEER_KEY

_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class SteeringMiddleware:
    """Looks at each request that has a body, once, and hands it on as it came.

    A server of one's own that serves vLLM's routes without vLLM's app adds it itself:
    `app.add_middleware(SteeringMiddleware)`.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand before `app`."""
        self.app = app
        self._engine_client = ENGINE_CLIENT.load()
        self._written = ANSWER_ERROR.load()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request that is refused; let `app` answer any other."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        messages, body = await _read(receive)
        request = Request(scope, _replayed(messages, receive))
        front_end = self._front_end(request)
        try:
            decision = await _check(front_end, request, body)
        except SteerMoEError as error:
            answer = self._written(refusal(front_end, error))
            await JSONResponse(answer.model_dump(), status_code=answer.error.code)(scope, receive, send)
            return
        with decided(front_end, decision):
            await self.app(scope, _replayed(messages, receive), send)

    def _front_end(self, request: Request) -> FrontEnd | None:
        """Who decides on a request: nobody where nothing is generated, or before vLLM has asked the workers."""
        client = self._engine_client(request) if generates(request.url.path) else None
        front_end = front_end_of(client.input_processor) if client is not None else None
        return None if front_end is None or front_end.awaits_workers else front_end


async def _check(front_end: FrontEnd | None, request: Request, body: bytes) -> Decision | None:
    """What is decided on a request's steering; None if nothing is.

    Raises:
        RequestError: the request asks for steering where nothing reads it.
        SteerMoEError: the front end refuses what it asks for.
    """
    path, form = request.url.path, request.headers.get("content-type", "").lower().startswith(_FORMS)
    # Few requests ask for anything: for the others, no body is parsed twice.
    parsed = await _fields(request) if form else _parse(body) if _may_ask(body) else None
    check_body(path, parsed)
    check_names(path, "query parameter", request.query_params.keys())
    check_names(path, "header", request.headers.keys())
    check_beams(path, parsed)
    if front_end is None:
        return None
    return await _decide(front_end, asked_at(path, parsed), beams=has_beams(parsed))


async def _decide(front_end: FrontEnd, extra_args: Mapping[str, object] | None, *, beams: bool) -> Decision | None:
    if STEER_KEY in (extra_args or {}) or front_end.wants_store(extra_args):
        # Files may be read; requests of others must not wait for that.
        admitted = await asyncio.to_thread(front_end.admit, extra_args)
    else:
        admitted = front_end.admit(extra_args)
    if beams and admitted is not None and admitted.by_phase:
        raise RequestError(
            "this engine steers every request in one phase only by default, which vLLM's beam search would apply to "
            "other tokens; ask without beam search"
        )
    return admitted.decision if admitted is not None else None


def _may_ask(body: bytes) -> bool:
    """Whether a JSON body could name us or beam search: in plain letters, by escapes, or in another encoding."""
    small = body.lower()
    return any(sign in small for sign in (STEER_KEY.encode(), b"beam", b"\\u", b"\0"))


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None  # The endpoint says so.


async def _fields(request: Request) -> dict[str, Any] | None:
    try:
        async with request.form() as form:
            return dict(form)
    except HTTPException:
        return None  # The endpoint says so.


async def _read(receive: Receive) -> tuple[list[Message], bytes]:
    messages: list[Message] = []
    while not messages or (messages[-1]["type"] == "http.request" and messages[-1].get("more_body", False)):
        messages.append(await receive())
    return messages, b"".join(message.get("body", b"") for message in messages)


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    """`receive` as it was before `messages` were taken from it."""
    left = iter(messages)

    async def again() -> Message:
        for message in left:
            return message
        return await receive()

    return again
