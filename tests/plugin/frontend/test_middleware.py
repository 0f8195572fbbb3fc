"""The middleware before an app of the test's own: what is refused, and that all else comes as it was sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from expert_registry import Registry
from expert_registry.errors import EngineError
from vllm_steermoe_plugin.admission.request_admission import FrontEnd
from vllm_steermoe_plugin.frontend.attached import _FRONT_END
from vllm_steermoe_plugin.frontend.decided import decision_of
from vllm_steermoe_plugin.frontend.http_checks import _checked_line, _with_ours, install_http_checks
from vllm_steermoe_plugin.frontend.middleware import SteeringMiddleware
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.settings import Settings

CHAT = "/v1/chat/completions"


def front_end(settings: Settings) -> FrontEnd:
    shape = shape_in(lab_checkpoint.MODEL_DIR)
    models = [lab_checkpoint.NAME]
    return FrontEnd(settings=settings, shape=shape, models=models, registry=Registry.default(), served=True)


def served(front: FrontEnd | None) -> Starlette:
    """A server that answers with the body that reached it, and what was decided on it."""

    async def echo(request: Request) -> JSONResponse | StreamingResponse:
        body = await request.body()
        if b"streamed" in body:
            return StreamingResponse(iter([b"data: ", b"one"]), media_type="text/event-stream")
        found = decision_of(front) if front is not None else None
        steered = found is not None and found.resolved is not None
        decision = {"decided": None if found is None else found.spec, "steered": steered}
        return JSONResponse({"body": body.decode("latin-1"), **decision})

    app = Starlette(routes=[Route("/{path:path}", echo, methods=["GET", "POST", "PUT"])])
    app.add_middleware(SteeringMiddleware)
    processor = SimpleNamespace(**{_FRONT_END: front})
    app.state.engine_client = None if front is None else SimpleNamespace(input_processor=processor)
    return app


def send(app: Starlette, path: str = CHAT, body: bytes | dict[str, Any] = b"", **options: Any) -> httpx.Response:
    async def sent() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            if not options.keys() & {"data", "files"}:
                options["content"] = json.dumps(body).encode() if isinstance(body, dict) else body
                options["headers"] = {"content-type": "application/json"} | options.get("headers", {})
            return await client.request(options.pop("method", "POST"), path, **options)

    return asyncio.run(sent())


@pytest.fixture
def app() -> Starlette:
    return served(front_end(Settings()))


def refused(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == 400 and error["param"] == "steermoe" and error["message"].startswith("steermoe: ")
    assert "[STEERMOE-E1" in error["message"], "a code that is stable across releases"
    return str(error["message"])


@pytest.mark.parametrize(
    "body",
    [
        {"steermoe": "digits"},
        {"extra_body": {"steermoe": "digits"}},
        b'{"st\\u0065ermoe": "digits"}',
        json.dumps({"vllm_xargs": {"SteerMoE": "digits"}}).encode("utf-16"),
        json.dumps({"steermoe": "digits"}).encode("utf-32-le"),
    ],
)
def test_misplaced_steering_is_refused_however_the_body_is_written(
    app: Starlette, body: bytes | dict[str, Any]
) -> None:
    assert "write vllm_xargs.steermoe" in refused(send(app, body=body))
    assert "write vllm_xargs.steermoe" in refused(send(app, body=body, headers={"content-type": "text/plain"}))


def test_headers_query_parameters_and_forms_are_looked_at(app: Starlette) -> None:
    assert "query parameter" in refused(send(app, f"{CHAT}?steermoe=digits", {}))
    assert "header" in refused(send(app, body={}, headers={"X-SteerMoE": "digits"}))
    speech = "/v1/audio/transcriptions"
    for form in ({"files": {"file": b"\0\1"}, "data": {"vllm_xargs[steermoe]": "digits"}}, {"data": {"steermoe": "x"}}):
        assert "does not read" in refused(send(app, speech, **form))
    assert send(app, speech, files={"file": b"steermoe"}).status_code == 200


def test_what_the_front_end_refuses_is_a_400_before_a_streamed_answer_begins(app: Starlette) -> None:
    for spec, reason in (("digitz", "did you mean"), ("digits:reverse", "allow_reverse"), (7, "must be a string")):
        body = {"vllm_xargs": {"steermoe": spec}, "stream": True, "prompt": "streamed"}
        assert reason in refused(send(app, body=body))
        assert send(
            app, "/inference/v1/generate", body={"sampling_params": {"extra_args": {"steermoe": spec}}}
        ).is_error
    assert send(app, body={"vllm_xargs": {"steermoe": "digits"}, "prompt": "streamed"}).text == "data: one"
    assert refused(send(app, body={"vllm_xargs": {"steermoe_checked": True, "a": "steermoe"}}))


@pytest.mark.parametrize("path", ["/v1/decisions", "/v1/systemone", "/generative_scoring", "/cohere/v2/chat"])
def test_where_nothing_can_ask_the_default_is_decided_on_once(path: str) -> None:
    """All questions of such a request are answered under one steering, also while a profile is replaced."""
    front = front_end(Settings(default="digits"))
    answer = send(served(front), path, {"questions": {"steermoe": "Is it a name?"}, "state": {"steermoe": 1}})
    assert answer.status_code == 200 and answer.json()["steered"]
    assert "does not read" in refused(send(served(front), path, {"steermoe": "digits"}))


def test_an_operators_mistake_is_a_500_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    front = front_end(Settings(default="digits"))

    def gone() -> None:
        raise EngineError("the ranking is gone")

    monkeypatch.setattr(front.resolver, "resolve_default", gone)
    answer = send(served(front), body={"prompt": "Hi"})
    assert answer.status_code == 500 and "the ranking is gone" in answer.text


def test_beam_search_is_refused_where_it_would_drop_or_misapply_steering(app: Starlette) -> None:
    steered, beams = {"vllm_xargs": {"steermoe": "digits"}}, {"use_beam_search": True}
    assert "beam search" in refused(send(app, body=steered | beams))
    assert send(app, body=beams).status_code == 200
    by_phase = served(front_end(Settings(default="digits:phase=generation")))
    assert "one phase" in refused(send(by_phase, body=beams))
    assert send(by_phase, body={}).status_code == 200


@pytest.mark.parametrize("make", [lambda: front_end(Settings()), lambda: None])
def test_all_else_comes_as_it_was_sent(make: Callable[[], FrontEnd | None]) -> None:
    server = served(make())
    for body in (b"", b"{", b"[" * 10_000, b"\xff\xfe\0", b'{"a": "steermoe"}', b'{"vllm_xargs": {"steermoe": null}}'):
        answer = send(server, body=body)
        assert answer.status_code == 200 and answer.json() == {
            "body": body.decode("latin-1"),
            "decided": None,
            "steered": False,
        }
    assert send(server, method="GET", body=b'{"steermoe": 1}').status_code == 200
    broken = send(server, body=b"no form", headers={"content-type": "multipart/form-data; boundary=x"})
    assert broken.status_code == 200, "the endpoint says what is wrong with a form"


def test_a_body_that_comes_in_pieces_is_handed_on_whole_and_the_disconnect_after_it(app: Starlette) -> None:
    seen: list[Any] = []

    async def inner(scope: Any, receive: Any, send_: Any) -> None:
        seen.extend([await receive(), await receive(), await receive()])

    pieces = [
        {"type": "http.request", "body": b'{"prompt":', "more_body": True},
        {"type": "http.request", "body": b' "steermoe"}', "more_body": False},
        {"type": "http.disconnect"},
    ]
    left = iter(pieces)

    async def receive() -> Any:
        return next(left)

    scope = {"type": "http", "method": "POST", "path": "/tokenize", "headers": [], "query_string": b"", "app": app}
    asyncio.run(SteeringMiddleware(inner)(scope, receive, None))  # type: ignore[arg-type]
    assert seen == pieces


def test_a_request_is_decided_on_once(app: Starlette, monkeypatch: pytest.MonkeyPatch) -> None:
    front = getattr(app.state.engine_client.input_processor, _FRONT_END)
    assert send(app, body={"vllm_xargs": {"steermoe": "digits"}}).json()["decided"] == "digits"
    decision = front.admit({"steermoe": "digits"}).decision
    monkeypatch.setattr(front.resolver, "resolve", lambda request: pytest.fail("resolved again"))
    again = front.admit({"steermoe": "digits", "other": 1}, decision)
    assert again.decision == decision and again.extra_args["other"] == 1
    with pytest.raises(BaseException, match="resolved again"):
        front.admit({"steermoe": "refusal"}, decision)


def test_vllms_app_has_it_behind_authentication_and_batch_lines_are_checked() -> None:
    from vllm.entrypoints.launchers import app as launcher
    from vllm.entrypoints.launchers import run_batch

    install_http_checks(load=True)
    install_http_checks(load=True)
    assert hasattr(launcher.init_entrypoints_middleware, "__steermoe__")
    assert hasattr(run_batch.handle_endpoint_request, "__steermoe__")
    order: list[Any] = []
    app = SimpleNamespace(add_middleware=lambda cls, **_: order.append(cls))
    _with_ours(lambda args, app: app.add_middleware("vLLM's"))(None, app)
    assert order == [SteeringMiddleware, "vLLM's"], "what is added later stands before"


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/embeddings", {"input": "Hi"}),
        ("/v1/audio/transcriptions", {"file_url": "data:audio/wav;base64,AA=="}),
    ],
)
def test_lines_of_batch_files_are_refused_alone(url: str, body: dict[str, Any]) -> None:
    from vllm.entrypoints.launchers.run_batch import BatchRequestInput

    def line(**more: Any) -> Any:
        return BatchRequestInput.model_validate_json(
            json.dumps({"custom_id": "1", "method": "POST", "url": url, "body": {"model": "m", **body, **more}})
        )

    handle = _checked_line(lambda request, *_: "handled")
    wrong: list[dict[str, Any]] = [{"steermoe": "digits"}, {"extra_body": {"steermoe": "digits"}}]
    if "chat" in url:
        wrong.append({"vllm_xargs": {"steermoe": "digits"}, "use_beam_search": True})
    for more in wrong:
        answer = asyncio.run(handle(line(**more)))
        assert answer.custom_id == "1" and "steermoe: " in str(answer.error) and answer.response.status_code == 400
    assert handle(line()) == "handled"
    if url != "/v1/embeddings":
        assert handle(line(vllm_xargs={"steermoe": "digits"})) == "handled"
