"""Profiles loaded, replaced and dropped in a real server with two front-end processes, under traffic."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from tests.served.conftest import BLOCK, SECRET
from tests.support.served import Server
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.cli.profiles import KEY_VARIABLE
from vllm_steermoe_plugin.models import lab_checkpoint

OPERATOR = {"Authorization": f"Bearer {SECRET}"}
PROMPT = "Start at 23 and count to 27. " * 12


def profiles(server: Server, method: str, name: str = "", body: str | None = None) -> tuple[int, Any]:
    """One call of the operator."""
    path = f"steermoe/profiles/{name}" if name else "steermoe/profiles"
    return server.call(path, body, method=method, headers=OPERATOR)


def load(server: Server, name: str, text: str) -> str:
    """Load a profile; its digest."""
    status, answer = profiles(server, "PUT", name, text)
    assert status in (200, 201), answer
    digest: str = answer["digest"]
    return digest


class Answer(NamedTuple):
    """Of one greedy completion."""

    text: str
    logprobs: list[float]
    cached: int


def body_of(steer: str | None, prompt: str, **more: Any) -> dict[str, Any]:
    body = {
        "model": lab_checkpoint.NAME,
        "prompt": prompt,
        "temperature": 0.0,
        "max_tokens": 8,
        "ignore_eos": True,
        **more,
    }
    return body | ({"vllm_xargs": {"steermoe": steer}} if steer is not None else {})


def complete(server: Server, steer: str | None, prompt: str = PROMPT, **more: Any) -> Answer:
    status, answer = server.call("v1/completions", body_of(steer, prompt, logprobs=0, **more))
    assert status == 200, answer
    choice, usage = answer["choices"][0], answer["usage"]
    return Answer(choice["text"], choice["logprobs"]["token_logprobs"], usage["prompt_tokens_details"]["cached_tokens"])


def test_a_profile_is_loaded_listed_used_replaced_and_dropped(server: Server) -> None:
    # A caller may not ask for this; the operator vouches for it.
    assert server.call("v1/completions", body_of("refusal:reverse", "Hello"))[0] == 400
    digest = load(server, "terse", "refusal:reverse")
    assert {row["name"]: row["digest"] for row in profiles(server, "GET")[1]["profiles"]}["terse"] == digest
    reverse = complete(server, "@terse", cache_salt="a")
    assert reverse.logprobs != complete(server, "none", cache_salt="b").logprobs
    assert load(server, "terse", "digits") != digest
    assert complete(server, "@terse", cache_salt="c")[:2] == complete(server, "digits", cache_salt="d")[:2]
    composed = [complete(server, text, cache_salt=text[1:])[:2] for text in ("@terse+refusal", "digits+refusal")]
    assert composed[0] == composed[1] != complete(server, "@terse", cache_salt="e")[:2]
    status, text = server.call("v1/completions", body_of("@terse+@house", "Hello"))
    assert status == 400 and "at once" in text
    assert profiles(server, "DELETE", "terse")[0] == 200
    status, text = server.call("v1/completions", body_of("@terse", "Hello"))
    assert status == 400 and "unknown loaded profile 'terse'; known: house" in text
    assert profiles(server, "DELETE", "house")[0] == profiles(server, "PUT", "house", "digits")[0] == 409


def test_a_replaced_profile_finds_nothing_of_its_old_self_in_the_prefix_cache(server: Server) -> None:
    expected = {name: complete(server, name, cache_salt="reference") for name in ("digits", "refusal")}
    assert expected["digits"].logprobs != expected["refusal"].logprobs
    for turn, name in enumerate(("digits", "refusal", "digits", "refusal")):
        load(server, "cached", name)
        first = complete(server, "@cached", cache_salt="mine")
        again = complete(server, "@cached", cache_salt="mine")
        if turn < 2:
            assert first.cached == 0 and first[:2] == expected[name][:2]
        else:
            assert first.cached >= BLOCK, "what it computed before is found again"
        assert again.cached >= BLOCK
        for found in (first, again):
            assert found.text == expected[name].text
            assert found.logprobs == pytest.approx(expected[name].logprobs, abs=2e-2)


def test_a_request_under_way_keeps_the_profile_it_started_with(server: Server) -> None:
    long = {"max_tokens": 200, "prompt": "Count on from 7: ", "stream": True}
    expected = {name: stream(server, body_of(name, **long)) for name in ("digits", "refusal")}
    assert "".join(expected["digits"]) != "".join(expected["refusal"])
    load(server, "flying", "digits")
    pieces = []
    for number, piece in enumerate(streamed(server, body_of("@flying", cache_salt="flying", **long))):
        if number == 3:
            load(server, "flying", "refusal")
            replaced_at = len(pieces)
        pieces.append(piece)
    assert len(pieces) > replaced_at + 50, "most of it came after the profile was replaced"
    assert "".join(pieces) == "".join(expected["digits"])
    assert "".join(stream(server, body_of("@flying", **long))) == "".join(expected["refusal"])
    for number, _ in enumerate(streamed(server, body_of("@flying", **long))):
        if number == 3:
            assert profiles(server, "DELETE", "flying")[0] == 200
    assert number > 50


def streamed(server: Server, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of text of a streamed completion, as they come."""
    parts = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        assert reply.status == 200, reply.read()
        for line in reply:
            data = line.removeprefix(b"data: ").strip()
            if data and data != b"[DONE]":
                yield json.loads(data)["choices"][0]["text"]
    finally:
        connection.close()


def stream(server: Server, body: dict[str, Any]) -> list[str]:
    return list(streamed(server, body))


def test_loads_at_once_under_traffic_end_in_one_profile_that_all_processes_know(server: Server) -> None:
    texts = {"digits": load(server, "busy", "digits"), "refusal": load(server, "busy", "refusal")}
    answers = {name: complete(server, name, max_tokens=2).text for name in texts}
    with ThreadPoolExecutor(8) as pool:
        loads = [pool.submit(load, server, "busy", name) for name in list(texts) * 6]
        asked = [pool.submit(complete, server, "@busy", max_tokens=2) for _ in range(24)]
        assert {load.result() for load in loads} == set(texts.values())
        assert {answer.result().text for answer in asked} <= set(answers.values())
    # Each on a connection of its own, which the kernel gives to one process or the other.
    last = {profiles(server, "GET", "busy")[1]["digest"] for _ in range(16)}
    assert len(last) == 1 and last <= set(texts.values())
    assert server.log.read_text().count("Application startup complete") == 2


def test_a_damaged_store_is_the_servers_fault_and_stops_only_those_who_need_it(server: Server) -> None:
    load(server, "kept", "digits")
    before = {steer: complete(server, steer, max_tokens=2).text for steer in ("refusal", "@kept", "@house", None)}
    store = server.log.parent / "profiles.json"
    good = store.read_bytes()
    store.write_bytes(good[: len(good) // 2])
    for path, asked in (("completions", {}), ("chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})):
        for _ in range(4):  # Of both processes.
            status, text = server.call(f"v1/{path}", {**body_of("@kept", "Hi"), **asked})
            assert status == 500 and "the profile store cannot be read" in text and str(store.parent) not in text
    for steer in ("refusal", "@house", None):
        assert complete(server, steer, max_tokens=2).text == before[steer]
    assert profiles(server, "GET", "kept")[0] == 500
    store.write_bytes(good)
    assert complete(server, "@kept", max_tokens=2).text == before["@kept"]


def test_the_operators_routes_want_the_operators_key_and_bounded_bodies(server: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        for method in ("GET", "PUT", "DELETE"):
            path = "steermoe/profiles" if method == "GET" else "steermoe/profiles/house"
            status, text = server.call(path, "digits" if method == "PUT" else None, method=method, headers=headers)
            assert status == 401 and "house" not in text
    parts = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.request("PUT", "/steermoe/profiles/big", headers={**OPERATOR, "Content-Length": str(1 << 40)})
    assert connection.getresponse().status == 413
    connection.close()
    for name in ("..%2f..%2fx", "%2e%2e", "A", "none", "a%00"):
        assert profiles(server, "PUT", name, "digits")[0] in (400, 404)
    assert SECRET not in server.log.read_text()


def test_the_command_does_the_same(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def steermoe(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["profiles", *arguments, "--server", server.url])

    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    file = tmp_path / "experts.json"
    file.write_text('{"activate": {"1": [2]}}')
    assert steermoe("load", "by-hand", f"@{file}").stdout == "by-hand: 1 activated, 0 deactivated, 0 biased\n"
    assert json.loads(steermoe("show", "by-hand").stdout)["experts"]["activate"] == {"1": [2]}
    assert "by-hand" in {row["name"] for row in json.loads(steermoe("list").stdout)["profiles"]}
    assert steermoe("refresh").exit_code == steermoe("drop", "by-hand").exit_code == 0
    assert "404" in str(steermoe("drop", "by-hand").exception)
    assert "did you mean 'digits'" in str(steermoe("load", "x", "digit").exception)
    monkeypatch.setenv(KEY_VARIABLE, "wrong")
    assert "401" in str(steermoe("list").exception)
    monkeypatch.delenv(KEY_VARIABLE)
    assert KEY_VARIABLE in str(steermoe("list").exception)
