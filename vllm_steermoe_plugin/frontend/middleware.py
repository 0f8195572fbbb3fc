"""ASGI middleware that validates what comes to a server before the response starts.

Steering that vLLM would drop is refused, wherever it stands (`misplaced.py`). What is refused for another reason is
refused here already: a streamed answer has begun with 200 by the time that the engine is asked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expert_registry.errors import RequestError, SteerMoEError
from vllm_steermoe_plugin.admission.request_admission import Decision, FrontEnd
from vllm_steermoe_plugin.compat.symbols.frontend import VALIDATION_ERROR
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

_OPERATORS = "/steermoe/"
"""The operator's routes, which check their bodies themselves."""
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


class SteeringMiddleware:
    """Looks at each request that has a body, once, and hands it on as it came.

    A server of one's own that serves vLLM's routes without vLLM's app adds it itself:
    `app.add_middleware(SteeringMiddleware)`.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Stand before `app`."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let `app` answer."""
        if scope["type"] != "http" or scope["method"] != "POST" or _OPERATORS in scope["path"]:
            await self.app(scope, receive, send)
            return
        messages, body = await _read(receive)
        try:
            checked = await _check(Request(scope, _replayed(messages, receive)), body)
        except RequestError as error:
            answer: Exception = VALIDATION_ERROR.load()(f"steermoe: {error}", parameter=STEER_KEY)
        except _Refused as refused:
            answer = refused.answer
        else:
            with checked:
                await self.app(scope, _replayed(messages, receive), send)
            return
        written = ANSWER_ERROR.load()(answer)
        await JSONResponse(written.model_dump(), status_code=written.error.code)(scope, receive, send)


class _Refused(Exception):
    """Carries the answer of a front end that refuses."""

    def __init__(self, answer: Exception) -> None:
        self.answer = answer


async def _check(request: Request, body: bytes) -> AbstractContextManager[None]:
    """Check a request; what to answer it within.

    Raises:
        RequestError: the request asks for steering where nothing reads it.
        _Refused: the front end refuses it.
    """
    path, form = request.url.path, request.headers.get("content-type", "").lower().startswith(_FORMS)
    # Few requests ask for anything: for the others, no body is parsed twice.
    parsed = (await _fields(request) if form else _parse(body)) if form or _may_ask(body) else None
    check_body(path, parsed)
    check_names(path, "query parameter", request.query_params.keys())
    check_names(path, "header", request.headers.keys())
    check_beams(path, parsed)
    client = ENGINE_CLIENT.load()(request) if generates(path) else None
    if client is None:
        return nullcontext()  # What a server without an engine renders is checked where it is generated from.
    front_end = front_end_of(client.input_processor)
    if front_end.awaits_workers:
        return nullcontext()  # vLLM asks for the tasks first.
    return decided(front_end, await _decide(front_end, asked_at(path, parsed), beams=has_beams(parsed)))


async def _decide(front_end: FrontEnd, extra_args: Mapping[str, object] | None, *, beams: bool) -> Decision | None:
    try:
        if STEER_KEY in (extra_args or {}) or front_end.wants_store(extra_args):
            # Files may be read; requests of others must not wait for that.
            admitted = await asyncio.to_thread(front_end.admit, extra_args)
        else:
            admitted = front_end.admit(extra_args)
        if beams and admitted is not None and admitted.by_phase:
            raise RequestError(
                "this engine steers every request in one phase only by default, which vLLM's beam search would apply "
                "to other tokens; ask without beam search"
            )
    except SteerMoEError as error:
        raise _Refused(refusal(front_end, error)) from None
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
