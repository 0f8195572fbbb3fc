"""HTTP routes by which an operator manages profiles: the `vllm.endpoint_plugins` entry point.

    GET    /steermoe/profiles            all of them
    GET    /steermoe/profiles/NAME       one, with its experts
    PUT    /steermoe/profiles/NAME       load or replace; the body is a request text or a JSON expert list
    DELETE /steermoe/profiles/NAME       drop
    POST   /steermoe/rankings/refresh    look rankings up anew

Without the setting `manage` there are no routes. Each wants `Authorization: Bearer KEY`.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from expert_registry.errors import (
    ConfigurationError,
    EngineError,
    FileError,
    PolicyError,
    RankingFormatError,
    RequestError,
    SteerMoEError,
    UnknownProfileError,
)
from vllm_steermoe_plugin.admission.request_admission import FrontEnd
from vllm_steermoe_plugin.compat.plugin_allowlist import ENTRY_POINT
from vllm_steermoe_plugin.frontend.attached import front_end_of
from vllm_steermoe_plugin.frontend.management.operator_key import OperatorKey, read_key
from vllm_steermoe_plugin.frontend.management.profile_manager import ProfileManager
from vllm_steermoe_plugin.settings import read_settings
from vllm_steermoe_plugin.steering.profile import MAX_TEXT

PROFILES = "/steermoe/profiles"
REFRESH = "/steermoe/rankings/refresh"
_TOO_LARGE = f"a profile has at most {MAX_TEXT} bytes"


class TooLargeError(RequestError):
    """The body is longer than any profile."""

    code = "STEERMOE-E106"


STATUSES: tuple[tuple[type[SteerMoEError], HTTPStatus], ...] = (
    (TooLargeError, HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    (UnknownProfileError, HTTPStatus.NOT_FOUND),
    (PolicyError, HTTPStatus.CONFLICT),
    (EngineError, HTTPStatus.INTERNAL_SERVER_ERROR),
    (RankingFormatError, HTTPStatus.INTERNAL_SERVER_ERROR),
    (FileError, HTTPStatus.INTERNAL_SERVER_ERROR),
)
"""What is answered to an error; any other is a bad request."""


class ProfileEndpoints:
    """What vLLM asks of an endpoint plugin; one per front-end process."""

    name = ENTRY_POINT
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._front_end: FrontEnd | None = None
        self._key: OperatorKey | None = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes, if the settings say who may use them."""
        if read_settings(app.state.args.additional_config).manage is None:
            return
        app.add_api_route(PROFILES, self.list_profiles, methods=["GET"])
        app.add_api_route(PROFILES + "/{name}", self.show_profile, methods=["GET"])
        app.add_api_route(PROFILES + "/{name}", self.load_profile, methods=["PUT"])
        app.add_api_route(PROFILES + "/{name}", self.drop_profile, methods=["DELETE"])
        app.add_api_route(REFRESH, self.refresh_rankings, methods=["POST"])

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Find the front end of this process, and read the key.

        Raises:
            EngineError: there is no key, or it is one that the model's callers have.
        """
        manage = read_settings(args.additional_config).manage
        if manage is None:
            return
        self._front_end = front_end_of(engine_client.input_processor)
        self._key = read_key(manage)
        if any(self._key.is_key(key) for key in callers_keys(args)):
            raise ConfigurationError(
                "setting 'manage': the key is also an API key of the model, so every caller could manage profiles; "
                "take another one"
            )

    async def list_profiles(self, request: Request) -> JSONResponse:
        """All loaded profiles."""
        return await self._answer(request, lambda manager, _: manager.list())

    async def show_profile(self, request: Request, name: str) -> JSONResponse:
        """One loaded profile, with its experts."""
        return await self._answer(request, lambda manager, _: manager.show(name))

    async def load_profile(self, request: Request, name: str) -> JSONResponse:
        """Load or replace a profile."""
        return await self._answer(request, lambda manager, body: manager.load(name, body), reads_body=True)

    async def drop_profile(self, request: Request, name: str) -> JSONResponse:
        """Drop a profile."""
        return await self._answer(request, lambda manager, _: manager.drop(name))

    async def refresh_rankings(self, request: Request) -> JSONResponse:
        """Look rankings up anew."""
        return await self._answer(request, lambda manager, _: manager.refresh())

    async def _answer(
        self, request: Request, act: Callable[[ProfileManager, str], Any], *, reads_body: bool = False
    ) -> JSONResponse:
        if self._front_end is None or self._key is None:
            return _error(HTTPStatus.SERVICE_UNAVAILABLE, "the server is starting")
        # Before anything else of the request is looked at.
        if not self._key.matches(request.headers.get("authorization")):
            return _error(HTTPStatus.UNAUTHORIZED, "this needs the operator's key: Authorization: Bearer KEY")
        try:
            body = await _body(request) if reads_body else ""
            manager = ProfileManager(self._front_end.resolver)
            # Files are read and written; requests of callers must not wait for that.
            done = await run_in_threadpool(act, manager, body)
        except SteerMoEError as error:
            status = next((status for kind, status in STATUSES if isinstance(error, kind)), HTTPStatus.BAD_REQUEST)
            return _error(status, self._front_end.describe(error))
        if isinstance(done, tuple):
            answer, replaced = done
            return JSONResponse(answer, HTTPStatus.OK if replaced else HTTPStatus.CREATED)
        return JSONResponse(done)


async def _body(request: Request) -> str:
    """The body as text, of which no more than the limit is ever kept.

    Raises:
        RequestError: it is too large or not UTF-8.
    """
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated) > MAX_TEXT:
        raise TooLargeError(_TOO_LARGE)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_TEXT:
            raise TooLargeError(_TOO_LARGE)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise RequestError("the body is not UTF-8 text") from None


def callers_keys(args: Namespace) -> list[str]:
    """vLLM's own API keys, which guard the model."""
    return [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]


def _error(status: HTTPStatus, message: str) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else None
    error = {"message": f"steermoe: {message}", "type": status.phrase, "code": status.value}
    return JSONResponse({"error": error}, status, headers)
