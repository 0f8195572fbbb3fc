"""The operator's HTTP routes over a real front end, without an engine: who may, what is answered, what is refused."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
from argparse import Namespace
from collections.abc import Iterator
from importlib.metadata import EntryPoints
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from expert_registry import Registry
from expert_registry.errors import EngineError
from expert_registry.registry import publish
from tests.support.front_ends import DIGITS, EXPERTS, front_end
from vllm_steermoe_plugin.compat.symbols.http import ENDPOINT_PLUGIN
from vllm_steermoe_plugin.compat.symbols.registry import ENDPOINT_GROUP, PLUGIN_GROUPS
from vllm_steermoe_plugin.frontend.attached import _FRONT_END, _check_manageable
from vllm_steermoe_plugin.frontend.management.endpoints import PROFILES, REFRESH, ProfileEndpoints
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.profile import MAX_TEXT

SECRET = "correct-horse-battery"
OPERATOR = {"Authorization": f"Bearer {SECRET}"}
ROUTES = [
    ("GET", PROFILES),
    ("GET", f"{PROFILES}/terse"),
    ("PUT", f"{PROFILES}/terse"),
    ("DELETE", f"{PROFILES}/terse"),
    ("POST", REFRESH),
]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERMOE_MANAGE_KEY", SECRET)


def client(tmp_path: Path, api_key: list[str] | None = None, **settings: object) -> TestClient:
    """As vLLM sets the routes up: `attach_router`, then `init_state`."""
    publish(DIGITS, tmp_path / "rankings", overwrite=True)
    args = Namespace(additional_config={"steermoe": settings}, api_key=api_key)
    app = FastAPI()
    app.state.args = args
    plugin = ProfileEndpoints()
    plugin.attach_router(app)
    there = front_end(Registry((tmp_path / "rankings",)), Settings.model_validate(settings), served=True)
    engine = SimpleNamespace(input_processor=SimpleNamespace(**{_FRONT_END: there}))
    asyncio.run(plugin.init_state(engine, app.state, args))
    return TestClient(app)


@pytest.fixture
def managed(tmp_path: Path) -> Iterator[TestClient]:
    with client(tmp_path, manage="env:STEERMOE_MANAGE_KEY") as there:
        yield there


def test_it_is_what_vllm_calls_an_endpoint_plugin() -> None:
    assert isinstance(ProfileEndpoints(), ENDPOINT_PLUGIN.load())


def test_vllms_plugin_groups_are_those_that_we_know() -> None:
    import vllm.plugins

    groups = {value for name, value in vars(vllm.plugins).items() if name.endswith("_GROUP")}
    assert groups == {*PLUGIN_GROUPS, ENDPOINT_GROUP}


def test_without_the_setting_there_are_no_routes(tmp_path: Path) -> None:
    there = client(tmp_path, profiles={"house": "digits"})
    for method, path in ROUTES:
        assert there.request(method, path, headers=OPERATOR).status_code == 404


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": ""}, {"Authorization": SECRET}, {"Authorization": "Bearer wrong-horse-battery"}],
    ids=["none", "empty", "no scheme", "wrong"],
)
def test_without_the_key_nothing_is_shown_or_done(
    managed: TestClient, method: str, path: str, headers: dict[str, str]
) -> None:
    managed.put(f"{PROFILES}/terse", content=EXPERTS, headers=OPERATOR)
    before = managed.get(PROFILES, headers=OPERATOR).json()
    answer = managed.request(method, path, content="digits" * MAX_TEXT if method == "PUT" else None, headers=headers)
    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    assert "terse" not in answer.text and SECRET not in answer.text
    assert managed.get(PROFILES, headers=OPERATOR).json() == before


def test_load_list_replace_and_drop(managed: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    assert managed.get(PROFILES, headers=OPERATOR).json() == {"profiles": []}
    first = managed.put(f"{PROFILES}/terse", content="digits:reverse", headers=OPERATOR)
    assert first.status_code == 201 and first.json()["name"] == "terse"
    second = managed.put(f"{PROFILES}/terse", content=EXPERTS, headers=OPERATOR)
    assert second.status_code == 200 and second.json()["digest"] != first.json()["digest"]
    shown = managed.get(f"{PROFILES}/terse", headers=OPERATOR).json()
    assert shown.pop("experts") == {"activate": {"3": [5]}, "deactivate": {}}
    assert managed.get(PROFILES, headers=OPERATOR).json() == {"profiles": [shown]} == {"profiles": [second.json()]}
    assert managed.delete(f"{PROFILES}/terse", headers=OPERATOR).status_code == 200
    assert managed.delete(f"{PROFILES}/terse", headers=OPERATOR).status_code == 404
    assert managed.get(f"{PROFILES}/terse", headers=OPERATOR).status_code == 404
    assert managed.post(REFRESH, headers=OPERATOR).json() == {"refreshed": 1}
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        ("", 400, "no steering request"),
        ("none", 400, "steers nothing"),
        ("digit", 400, "did you mean 'digits'"),
        ("@house", 400, "not of @house"),
        ("{", 400, "not JSON"),
        ('{"activate": {"2": [0]}}', 400, "layer 2"),
        ('{"activate": {"3": [1e9]}}', 400, "indices"),
        ("[" * 100_000, 400, "no steering request"),
        ('{"activate":' * 50_000, 400, "not JSON"),
        (b"\xff\xfe", 400, "UTF-8"),
        (b"x" * (MAX_TEXT + 1), 413, "at most"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_cannot_be_loaded_is_refused_with_a_reason(
    managed: TestClient, content: str | bytes, status: int, reason: str
) -> None:
    answer = managed.put(f"{PROFILES}/terse", content=content, headers=OPERATOR)
    assert answer.status_code == status and reason in answer.json()["error"]["message"]
    assert len(answer.text) < 2000
    assert managed.get(PROFILES, headers=OPERATOR).json() == {"profiles": []}


def test_a_body_without_a_stated_length_is_bounded_too(managed: TestClient) -> None:
    pieces = (b"x" * (1 << 16) for _ in range(2 * MAX_TEXT >> 16))
    answer = managed.put(f"{PROFILES}/terse", content=pieces, headers=OPERATOR)
    assert answer.status_code == 413
    assert managed.put(f"{PROFILES}/terse", content="digits", headers=OPERATOR).status_code == 201


@pytest.mark.parametrize(
    "name", ["none", "Terse", "a b", "a%00", "%2e%2e", "a" * 65, "1a", "caf%C3%A9", "@a", "a+b", "-"]
)
def test_a_name_that_is_none_is_refused(managed: TestClient, name: str) -> None:
    answer = managed.put(f"{PROFILES}/{name}", content="digits", headers=OPERATOR)
    assert answer.status_code in (400, 404)
    assert managed.get(PROFILES, headers=OPERATOR).json() == {"profiles": []}


def test_what_stands_in_the_settings_is_a_conflict(tmp_path: Path) -> None:
    there = client(tmp_path, manage="env:STEERMOE_MANAGE_KEY", profiles={"house": "digits"}, default="@house")
    for method in ("PUT", "DELETE"):
        answer = there.request(method, f"{PROFILES}/house", content="digits", headers=OPERATOR)
        assert answer.status_code == 409 and "settings" in answer.text


def test_the_default_is_a_conflict(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"manage": "env:STEERMOE_MANAGE_KEY", "profile_store": str(tmp_path / "profiles.json")}
    client(tmp_path, **settings).put(f"{PROFILES}/house", content="digits", headers=OPERATOR)
    there = client(tmp_path, **settings, default="@house")
    answer = there.delete(f"{PROFILES}/house", headers=OPERATOR)
    assert answer.status_code == 409 and "default steering" in answer.text
    assert there.put(f"{PROFILES}/house", content=EXPERTS, headers=OPERATOR).status_code == 200


def test_a_store_that_cannot_be_read_is_the_servers_fault_and_says_no_path(tmp_path: Path) -> None:
    store = tmp_path / "profiles.json"
    there = client(tmp_path, manage="env:STEERMOE_MANAGE_KEY", profile_store=str(store))
    store.write_text("{")
    answer = there.get(PROFILES, headers=OPERATOR)
    assert answer.status_code == 500 and "profile store" in answer.text and str(tmp_path) not in answer.text


def test_a_damaged_ranking_is_refused_without_its_path(managed: TestClient, tmp_path: Path) -> None:
    path = next((tmp_path / "rankings").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    answer = managed.put(f"{PROFILES}/terse", content="digits", headers=OPERATOR)
    assert answer.status_code == 500 and "v1" in answer.text and str(tmp_path) not in answer.text


def test_the_key_of_the_models_callers_is_not_the_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client(tmp_path, ["another-key-of-callers"], manage="env:STEERMOE_MANAGE_KEY")
    with pytest.raises(EngineError, match="take another one"):
        client(tmp_path, ["one", SECRET], manage="env:STEERMOE_MANAGE_KEY")
    monkeypatch.setenv("VLLM_API_KEY", SECRET)
    with pytest.raises(EngineError, match="take another one"):
        client(tmp_path, manage="env:STEERMOE_MANAGE_KEY")


def test_managing_is_refused_at_start_where_it_could_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    one, many = (SimpleNamespace(_api_process_count=n, data_parallel_size=1) for n in (1, 2))
    parallel = SimpleNamespace(_api_process_count=1, data_parallel_size=2)
    settings = Settings(manage="env:STEERMOE_MANAGE_KEY")
    for allowed in (None, "", "other"):
        if allowed is not None:
            monkeypatch.setenv("VLLM_PLUGINS", allowed)
        with pytest.raises(EngineError, match="VLLM_PLUGINS=steermoe"):
            _check_manageable(settings, one)
    monkeypatch.setenv("VLLM_PLUGINS", "other,steermoe")
    _check_manageable(settings, one)
    with monkeypatch.context() as stale:
        stale.setattr(importlib.metadata, "entry_points", lambda group: EntryPoints())
        with pytest.raises(EngineError, match="install it again"):
            _check_manageable(settings, one)
    for processes in (many, parallel):
        with pytest.raises(EngineError, match="profile_store"):
            _check_manageable(settings, processes)
        _check_manageable(settings.model_copy(update={"profile_store": "profiles.json"}), processes)
    monkeypatch.delenv("STEERMOE_MANAGE_KEY")
    with pytest.raises(EngineError, match="env:STEERMOE_MANAGE_KEY must hold a key"):
        _check_manageable(settings, one)
