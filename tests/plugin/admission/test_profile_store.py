"""Profiles that an operator has loaded: what requests make of them, what is kept, and what is refused. No HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from expert_registry import MoEShape, Recommended, Registry
from expert_registry.errors import (
    EngineError,
    PolicyError,
    ProfileError,
    RequestError,
    SteerMoEError,
    UnknownProfileError,
    UnknownRankingError,
)
from expert_registry.format import content_hash
from expert_registry.lock import Pin, read_lock, write_lock
from expert_registry.registry import publish
from tests.support.front_ends import DIGITS, EXPERTS, MODEL, SHAPE, front_end, profile_in
from tests.support.made_rankings import make_ranking
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.admission.policy import check_policy
from vllm_steermoe_plugin.admission.profiles import file as profile_file
from vllm_steermoe_plugin.admission.profiles import store as profile_store
from vllm_steermoe_plugin.admission.profiles.file import StoreError
from vllm_steermoe_plugin.admission.request_admission import DefaultError, FrontEnd
from vllm_steermoe_plugin.compat.plugin_allowlist import names_with_endpoints
from vllm_steermoe_plugin.frontend.management.operator_key import read_key
from vllm_steermoe_plugin.frontend.management.profile_manager import ProfileManager
from vllm_steermoe_plugin.frontend.middleware import _decide
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.request import parse_request
from vllm_steermoe_plugin.steering.wire import STEER_KEY

KEY = "env:STEERMOE_MANAGE_KEY"
OTHER = '{"deactivate": {"0": [1, 2]}}'


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    folder = tmp_path / "rankings"
    publish(DIGITS, folder)
    publish(make_ranking(5, behaviour="refusal", recommended=Recommended(activate=0, deactivate=1)), folder)
    return Registry((folder,))


def managed(registry: Registry, store: Path | None = None, **settings: object) -> tuple[FrontEnd, ProfileManager]:
    """A server's front end, and what its operator holds."""
    values = {"manage": KEY, "profile_store": str(store) if store else None, **settings}
    there = front_end(registry, Settings.model_validate(values), served=True)
    return there, ProfileManager(there.resolver)


def asked(there: FrontEnd, text: str | None) -> SteeringProfile | None:
    """What a worker would apply."""
    return profile_in(there.admit({} if text is None else {STEER_KEY: text}))


@pytest.fixture(params=["in memory", "in a file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "profiles.json" if request.param == "in a file" else None


def test_a_loaded_profile_is_listed_used_replaced_and_dropped(registry: Registry, store: Path | None) -> None:
    there, manager = managed(registry, store)
    assert manager.list() == {"profiles": []}
    first, replaced = manager.load("terse", "digits:reverse:activate=1")
    assert not replaced and first["digest"] == asked(there, "@terse").digest  # type: ignore[union-attr]
    assert first["sources"][0]["ranking"].endswith("digits@1") and len(first["sources"][0]["sha256"]) == 64
    assert (first["activated"], first["asked"], first["phase"]) == (1, "digits:reverse:activate=1", "both")
    second, replaced = manager.load("terse", EXPERTS)
    assert replaced and second["digest"] != first["digest"] and second["asked"] is None and second["sources"] == []
    assert asked(there, "@terse") == SteeringProfile.from_json(EXPERTS)
    assert manager.show("terse")["experts"] == {"activate": {"3": [5]}, "deactivate": {}}
    assert [row["name"] for row in manager.list()["profiles"]] == ["terse"]
    assert manager.drop("terse")["digest"] == second["digest"]
    with pytest.raises(UnknownProfileError, match=r"unknown loaded profile 'terse'; known: none"):
        there.admit({STEER_KEY: "@terse"})


def test_a_replaced_profile_has_another_salt_and_its_old_one_again_when_it_is_back(registry: Registry) -> None:
    there, manager = managed(registry)
    salts = []
    for text in ("digits", "refusal", "digits"):
        manager.load("terse", text)
        salts.append(there.admit({STEER_KEY: "@terse"}).salt)  # type: ignore[union-attr]
    assert salts[0] == salts[2] != salts[1]
    assert salts[0] == there.admit({STEER_KEY: "digits"}).salt  # type: ignore[union-attr]


def test_what_a_request_was_given_does_not_change_with_the_profile(registry: Registry) -> None:
    there, manager = managed(registry)
    manager.load("terse", "digits")
    before = there.admit({STEER_KEY: "@terse"})
    assert before is not None
    written = dict(before.extra_args), before.salt
    manager.load("terse", "refusal")
    manager.drop("terse")
    assert (before.extra_args, before.salt) == written


def test_a_loaded_profile_composes_with_behaviours_and_other_profiles(registry: Registry) -> None:
    there, manager = managed(registry)
    manager.load("one", EXPERTS)
    manager.load("two", OTHER)
    both = SteeringProfile.merge([SteeringProfile.from_json(EXPERTS), SteeringProfile.from_json(OTHER)])
    assert asked(there, "@one+@two") == asked(there, " @two + @one ") == both
    refusal = asked(there, "refusal")
    assert refusal is not None
    assert asked(there, "refusal+@one") == SteeringProfile.merge([refusal, SteeringProfile.from_json(EXPERTS)])


def test_what_does_not_go_together_is_refused(registry: Registry) -> None:
    there, manager = managed(registry)
    manager.load("one", EXPERTS)
    manager.load("against", '{"deactivate": {"3": [5]}}')
    manager.load("full", '{"activate": {"3": [1, 2]}}')
    manager.load("prompt", '{"activate": {"0": [1]}, "phase": "prompt"}')
    rows: list[tuple[Any, ...]] = [
        ("@one+@against", ProfileError, "at once"),
        ("@one+@full", ProfileError, "at most 2"),
        ("@one+@prompt", ProfileError, "phase"),
        ("@one+@one", RequestError, "'@one' stands twice"),
        ("@one:reverse", RequestError, "without options"),
        ("@one@2", RequestError, "names no loaded profile"),
        ("@", RequestError, "names no loaded profile"),
        ("@One", RequestError, "names no loaded profile"),
        ("@../one", RequestError, "names no loaded profile"),
        ("none+@one", RequestError, "none"),
        ("@none", UnknownProfileError, "unknown"),
        ("@ons", UnknownProfileError, "did you mean 'one'.*against, full, one, prompt"),
        ("one", UnknownRankingError, "one"),
        ("@one+digits:reverse", PolicyError, "allow_reverse"),
        ("@one+digits:activate=1", PolicyError, "allow_experts"),
        ("@one+" + OTHER, RequestError, "no steering request"),
    ]
    assert not_refused(lambda text: there.admit({STEER_KEY: text}), rows) == []


def test_any_caller_may_use_what_the_operator_has_loaded_unless_requests_may_not_steer() -> None:
    request = parse_request("@terse")
    check_policy(request, Settings(), served=True)
    for settings, names in (
        (Settings(default="digits", allow_override=False), "allow_override"),
        (Settings(enabled=False), "enabled"),
    ):
        with pytest.raises(PolicyError, match=names):
            check_policy(request, settings, served=True)


def test_what_cannot_be_loaded_changes_nothing(registry: Registry, store: Path | None) -> None:
    there, manager = managed(registry, store)
    manager.load("terse", EXPERTS)
    before = manager.list()
    rows: list[tuple[Any, ...]] = [
        (("terse", "none"), RequestError, "steers nothing"),
        (("terse", ""), RequestError, "no steering request"),
        (("terse", "@other"), RequestError, "not of @other"),
        (("terse", "digit"), UnknownRankingError, "did you mean 'digits'"),
        (("terse", '{"activate": {"2": [0]}}'), ProfileError, "layer 2"),
        (("terse", '{"activate": {"3": [0, 1, 2]}}'), ProfileError, "at most 2"),
        (("terse", "{"), RequestError, "not JSON"),
        (("terse", '{"activate": {"3": [5], "3": [4]}}'), RequestError, "twice"),
        *(
            ((name, "digits"), RequestError, "cannot name a profile")
            for name in ("none", "Terse", "a/b", "..", "a\n", "a" * 65, "")
        ),
    ]
    assert not_refused(lambda row: manager.load(*row), rows) == []
    assert manager.list() == before and asked(there, "@terse") == SteeringProfile.from_json(EXPERTS)


def test_profiles_of_the_settings_are_there_and_stay(registry: Registry, store: Path | None) -> None:
    there, manager = managed(registry, store, profiles={"house": "digits:reverse"}, default="@house")
    assert asked(there, None) == asked(there, "@house")
    assert asked(there, None) == asked(front_end(registry, Settings(default="digits:reverse"), served=True), None)
    (row,) = manager.list()["profiles"]
    assert row["fixed"] and row["default"]
    for change in (lambda: manager.load("house", "digits"), lambda: manager.drop("house")):
        with pytest.raises(PolicyError, match="'house'"):
            change()
    with pytest.raises(UnknownProfileError, match="known: house"):
        manager.drop("hous")


def test_profiles_of_the_settings_need_nobody_who_manages(registry: Registry) -> None:
    there = front_end(registry, Settings(profiles={"house": "digits"}), served=True)
    assert asked(there, "@house") == asked(there, "digits")
    with pytest.raises(UnknownProfileError, match="known: none"):
        front_end(registry, Settings(), served=True).admit({STEER_KEY: "@house"})


def test_settings_that_cannot_be_applied_stop_the_start(registry: Registry) -> None:
    for settings, error in [
        ({"profiles": {"house": "digit"}}, UnknownRankingError),
        ({"profiles": {"house": "none"}}, RequestError),
        ({"profiles": {"house": "@other", "other": "digits"}}, RequestError),
        ({"default": "@house"}, UnknownProfileError),
    ]:
        with pytest.raises(error):
            managed(registry, **settings)
        front_end(registry, Settings.model_validate({**settings, "enabled": False}))


def test_the_default_cannot_be_dropped_and_is_replaced_only_by_what_fits(registry: Registry, tmp_path: Path) -> None:
    store = tmp_path / "profiles.json"
    managed(registry, store)[1].load("house", '{"activate": {"3": [5]}}')
    digits = asked(front_end(registry), "digits")
    assert digits is not None
    there, manager = managed(registry, store, default="@house+digits")
    before = asked(there, None)
    with pytest.raises(PolicyError, match="default steering"):
        manager.drop("house")
    layer, expert = sorted(digits.activate)[0]
    with pytest.raises(ProfileError, match="at once"):
        manager.load("house", json.dumps({"deactivate": {str(layer): [expert]}}))
    assert asked(there, None) == before
    manager.load("house", '{"deactivate": {"1": [0]}}')
    assert asked(there, None) != before
    # Somebody else who shares the file dropped it: an error for all who rely on it, never no steering.
    managed(registry, store)[1].drop("house")
    with pytest.raises(DefaultError, match="'house'"):
        there.admit(None)
    assert there.admit({STEER_KEY: "none"}).salt is None  # type: ignore[union-attr]


def test_two_loads_that_fit_the_default_only_alone_do_not_both_get_in(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = tmp_path / "profiles.json"
    for name in ("one", "two"):
        managed(registry, store)[1].load(name, '{"activate": {"3": [5]}}')
    there, manager = managed(registry, store, default="@one+@two")
    check = manager.resolver.check_default_with
    refused: list[Exception] = []

    def meanwhile() -> None:
        with pytest.raises(ProfileError, match="at once") as caught:
            manager.load("two", '{"deactivate": {"0": [2]}}')
        refused.append(caught.value)

    other = threading.Thread(target=meanwhile)

    def slow(name: str, profile: Any) -> None:
        check(name, profile)
        if name == "one":
            other.start()
            other.join(0.3)

    monkeypatch.setattr(manager.resolver, "check_default_with", slow)
    manager.load("one", '{"activate": {"0": [2]}}')
    other.join()
    assert len(refused) == 1 and asked(there, None) is not None


# --- the file -----------------------------------------------------------------------------------------------------


def test_processes_that_share_a_file_agree_at_once_and_after_a_restart(registry: Registry, tmp_path: Path) -> None:
    store = tmp_path / "new" / "profiles.json"
    (one, at_one), (two, at_two) = managed(registry, store), managed(registry, store)
    for i in range(20):
        # Equal sizes, within a tick of the file system's clock, and inodes that are free again: none may hide a change.
        at_one.load("terse", f'{{"activate": {{"3": [{i % 6}]}}}}')
        assert asked(two, "@terse") == asked(one, "@terse")
        at_two.load("terse", f'{{"deactivate": {{"0": [{i % 6}]}}}}')
        assert asked(one, "@terse") == asked(two, "@terse")
    at_one.load("named", "digits")
    again, manager = managed(registry, store)
    assert manager.list() == at_one.list() == at_two.list()
    assert asked(again, "@terse") == asked(two, "@terse")


def test_a_loaded_profile_keeps_its_experts_when_the_registry_changes(registry: Registry, tmp_path: Path) -> None:
    there, manager = managed(registry, tmp_path / "profiles.json")
    manager.load("terse", "digits")
    before = asked(there, "@terse")
    publish(make_ranking(7, behaviour="digits", version=2), registry.folders[0])
    manager.refresh()
    assert asked(there, "@terse") == before != asked(there, "digits")
    assert asked(managed(registry, tmp_path / "profiles.json")[0], "@terse") == before


def test_many_who_load_at_once_lose_nothing(registry: Registry, store: Path | None) -> None:
    there, manager = managed(registry, store)
    others = managed(registry, store)[1] if store else manager
    start = threading.Barrier(8)

    def load(i: int) -> None:
        start.wait()
        for k in range(4):
            (manager if i % 2 else others).load(f"p{i}-{k}", f'{{"activate": {{"3": [{i % 6}]}}}}')
            (others if i % 2 else manager).load("shared", f'{{"activate": {{"3": [{i % 6}]}}}}')

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(load, range(8)))
    rows = {row["name"]: row["digest"] for row in manager.list()["profiles"]}
    assert set(rows) == {f"p{i}-{k}" for i in range(8) for k in range(4)} | {"shared"}
    assert rows["shared"] in {digest for name, digest in rows.items() if name != "shared"}
    assert asked(there, "@p3-2") == SteeringProfile.from_json('{"activate": {"3": [3]}}')


def spoil(change: Callable[[dict[str, object]], object]) -> Callable[[str], str]:
    def spoiled(text: str) -> str:
        value = json.loads(text)
        change(value)
        return json.dumps(value)

    return spoiled


SPOILED: dict[str, Callable[[str], str | None]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "gone": lambda text: None,
    "unknown field": spoil(lambda value: value.update(more=1)),
    "later version": spoil(lambda value: value.update(format_version=2)),
    "hostile name": spoil(lambda value: value["profiles"].update({"../x": value["profiles"]["terse"]})),  # type: ignore[attr-defined, index]
    "no experts": spoil(lambda value: value["profiles"]["terse"].update(experts="{}")),  # type: ignore[index]
    "another shape": spoil(lambda value: value.update(num_experts=8)),
    "another model": spoil(lambda value: value.update(models=["org/other"])),
    "a folder": lambda text: ".",
}


def test_a_store_that_cannot_be_read_is_an_error_for_those_who_need_it_only(registry: Registry, tmp_path: Path) -> None:
    for how, spoiled in SPOILED.items():
        store = tmp_path / how / "profiles.json"
        there, manager = managed(registry, store, profiles={"house": EXPERTS})
        manager.load("terse", "digits")
        plain = asked(there, "refusal")
        good = store.read_text()
        bad = spoiled(good)
        store.unlink()
        if bad == ".":
            store.mkdir()
        elif bad is not None:
            store.write_text(bad)
        for call in (lambda: there.admit({STEER_KEY: "@terse"}), manager.list, lambda: manager.load("new", "digits")):  # noqa: B023
            with pytest.raises(StoreError, match="the profile store") as caught:
                call()
            assert str(tmp_path) not in str(caught.value), how
        assert there.admit(None) is None and there.admit({STEER_KEY: "none"}).salt is None  # type: ignore[union-attr]
        assert asked(there, "refusal") == plain and asked(there, "digits") is not None
        assert asked(there, "@house") == SteeringProfile.from_json(EXPERTS)
        if bad is not None:
            with pytest.raises(EngineError, match="the profile store"):
                managed(registry, store)
        if bad == ".":
            store.rmdir()
        store.write_text(good)
        assert asked(there, "@terse") == asked(there, "digits") and asked(there, "refusal") == plain


def test_a_damaged_store_is_read_once(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = tmp_path / "profiles.json"
    there, _ = managed(registry, store)
    parsed: list[object] = []
    parse = profile_file.parse_document
    monkeypatch.setattr(profile_file, "parse_document", lambda *args: parsed.append(args) or parse(*args))
    store.write_text("{")
    lengths = set()
    for _ in range(3):
        asked(there, "digits")
        with pytest.raises(StoreError, match="profile store") as caught:
            there.admit({STEER_KEY: "@terse"})
        lengths.add(len(caught.traceback))
    assert len(parsed) == 1 and len(lengths) <= 2


def test_a_change_of_one_profile_works_out_that_one_only(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "profiles.json"
    (there, manager), (_, other) = managed(registry, store), managed(registry, store)
    for i in range(5):
        manager.load(f"p{i}", EXPERTS)
    asked(there, "@p0")
    worked_out: list[str] = []
    from_row = profile_file._from_row
    monkeypatch.setattr(profile_file, "_from_row", lambda row: worked_out.append(row.experts) or from_row(row))
    other.load("p3", OTHER)
    worked_out.clear()  # Those of the other process, which had not read the file.
    for name in ("p3", "p4", "p3"):
        asked(there, f"@{name}")
    assert worked_out == [SteeringProfile.from_json(OTHER).to_json()]
    assert asked(there, "@p3") == SteeringProfile.from_json(OTHER)


def test_a_changed_store_is_read_off_the_event_loop_for_those_who_need_it(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "profiles.json"
    there, manager = managed(registry, store, profiles={"house": "digits"}, allow_experts=True)
    readers: list[int] = []
    parse = profile_file.parse_document
    monkeypatch.setattr(
        profile_file, "parse_document", lambda *args: readers.append(threading.get_ident()) or parse(*args)
    )

    def decided(text: str | None) -> Any:
        return asyncio.run(_decide(there, None if text is None else {STEER_KEY: text}, beams=False))

    manager.load("terse", "refusal")
    for text, reads in (("@terse", 1), ("digits", 1), (None, 0), ("none", 0), ("@house", 0), (EXPERTS, 0)):
        store.write_bytes(store.read_bytes() + b"\n")
        readers.clear()
        decision = decided(text)
        assert len(readers) == reads and threading.get_ident() not in readers, text
        assert (decision is None) == (text is None)
    store.write_text("{")
    with pytest.raises(StoreError):
        decided("@terse")
    assert decided("digits") is not None


def test_a_name_in_the_settings_and_in_the_file_is_refused_at_start(registry: Registry, tmp_path: Path) -> None:
    managed(registry, tmp_path / "profiles.json")[1].load("house", "digits")
    with pytest.raises(PolicyError, match="'house' stands in the settings and in the profile store"):
        managed(registry, tmp_path / "profiles.json", profiles={"house": "refusal"})


def test_the_number_and_the_size_of_profiles_are_bounded(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, manager = managed(registry, tmp_path / "profiles.json")
    monkeypatch.setattr(profile_store, "MAX_PROFILES", 2)
    manager.load("one", EXPERTS)
    manager.load("two", EXPERTS)
    with pytest.raises(PolicyError, match="drop one"):
        manager.load("three", EXPERTS)
    manager.load("two", OTHER)
    monkeypatch.setattr(profile_file, "MAX_STORE_BYTES", 9 + len((tmp_path / "profiles.json").read_bytes()))
    with pytest.raises(PolicyError, match="larger than"):
        manager.load("two", json.dumps({"activate": {str(layer): [0, 1] for layer in SHAPE.layers}}) + " " * 9)
    assert asked(there, "@two") == SteeringProfile.from_json(OTHER)


def test_a_model_that_cannot_be_steered_keeps_no_profiles(registry: Registry) -> None:
    with pytest.raises(EngineError, match="Llama"):
        front_end(registry, Settings(profiles={"house": "digits"}), shape=EngineError("Llama cannot be steered"))


# --- rankings that change while serving ---------------------------------------------------------------------------


def test_a_name_stays_the_ranking_that_it_was_until_the_operator_refreshes(registry: Registry) -> None:
    there, manager = managed(registry)
    before = asked(there, "digits")
    publish(make_ranking(7, behaviour="digits", version=2), registry.folders[0])
    assert asked(there, "digits") == asked(there, "digits@1") == before
    there.resolver._remembered.cache_clear()
    assert asked(there, "digits") == before
    assert asked(there, "digits@2") != before
    assert manager.refresh() == {"refreshed": 1}
    assert asked(there, "digits") == asked(there, "digits@2") != before


def test_a_refresh_reaches_all_who_share_the_store(registry: Registry, tmp_path: Path) -> None:
    (one, at_one), (two, _) = (managed(registry, tmp_path / "profiles.json") for _ in range(2))
    before = [asked(there, "digits") for there in (one, two)]
    publish(make_ranking(7, behaviour="digits", version=2), registry.folders[0])
    assert [asked(there, "digits") for there in (one, two)] == before
    at_one.refresh()
    assert asked(one, "digits") == asked(two, "digits") != before[0]


def test_a_refresh_that_would_leave_the_default_without_a_ranking_changes_nothing(registry: Registry) -> None:
    there, manager = managed(registry, default="digits")
    before = asked(there, None)
    (registry.folders[0] / "org--tiny-moe" / "digits" / "v1.safetensors").unlink()
    with pytest.raises(UnknownRankingError):
        manager.refresh()
    assert asked(there, None) == before


@pytest.mark.parametrize("text", ["digits", "digits@1"])
def test_another_file_under_the_same_version_is_never_taken_for_it(registry: Registry, text: str) -> None:
    there, manager = managed(registry)
    before = asked(there, text)
    publish(make_ranking(8, behaviour="digits"), registry.folders[0], overwrite=True)
    assert asked(there, text) == before
    # Once it is not remembered any more, or asked for in another way: an error, not other experts.
    there.resolver._remembered.cache_clear()
    for again in (text, "digits", "digits@1", "digits:phase=prompt"):
        with pytest.raises(UnknownRankingError, match=r"sha256.*refresh the rankings"):
            there.admit({STEER_KEY: again})
    assert there.admit(None) is None and asked(there, "refusal") is not None
    manager.refresh()
    assert asked(there, text) not in (None, before)


def test_a_truncated_ranking_is_an_error_for_those_who_ask_for_it_only(registry: Registry) -> None:
    there, manager = managed(registry)
    path = registry.folders[0] / "org--tiny-moe" / "digits" / "v1.safetensors"
    whole = path.read_bytes()
    for cut in (0, 7, 200, -1):
        path.write_bytes(whole[:cut])
        with pytest.raises(SteerMoEError, match="v1") as caught:
            there.admit({STEER_KEY: "digits"})
        assert str(registry.folders[0]) not in there.describe(caught.value)
        with pytest.raises(SteerMoEError):
            manager.load("terse", "digits")
        assert there.admit(None) is None and asked(there, "refusal") is not None
    path.write_bytes(whole)
    assert asked(there, "digits") is not None


@pytest.mark.parametrize("damaged", ["ranking", "status", "store"])
def test_no_caller_learns_where_rankings_lock_or_store_are(registry: Registry, tmp_path: Path, damaged: str) -> None:
    place = registry.folders[0] / "org--tiny-moe" / "digits"
    files = {"ranking": place / "v1.safetensors", "status": place / "status.json", "store": tmp_path / "store.json"}
    lock = tmp_path / "steermoe.lock"
    write_lock(lock, {"org--tiny-moe/digits": Pin(version=1, sha256=content_hash(files["ranking"].read_bytes()))})
    there, manager = managed(Registry(registry.folders, read_lock(lock)), files["store"])
    manager.load("terse", "digits")
    files[damaged].write_bytes(b"{")
    lock.unlink()
    with pytest.raises(SteerMoEError) as operators:
        read_lock(lock)
    errors = [operators.value]
    for text in ("digits", "digits@1", "digits@2", "refusal", "@terse"):
        there.resolver._remembered.cache_clear()
        for act in (partial(there.prepare, {STEER_KEY: text}), partial(manager.load, "new", text)):
            try:
                act()
            except SteerMoEError as error:
                errors.append(error)
    assert len(errors) > 4 and any(str(tmp_path) in str(error) for error in errors)
    assert [error for error in errors if str(tmp_path) in there.describe(error)] == []


def test_in_process_an_error_says_where_the_file_is(registry: Registry) -> None:
    there = front_end(registry)
    error = RequestError(f"cannot read {registry.folders[0]}/x", paths=registry.folders)
    assert there.describe(error) == str(error)


# --- the key, and vLLM's allow-list -------------------------------------------------------------------------------

SECRET = "correct-horse-battery"


def test_a_key_opens_for_itself_only(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(SECRET + "\n")
    for key in (read_key("env:NAME", {"NAME": SECRET}), read_key(f"file:{file}")):
        assert key.matches(f"Bearer {SECRET}") and key.matches(f"bearer {SECRET}")
        for wrong in (None, "", SECRET, "Bearer", "Bearer ", f"Basic {SECRET}", f"Bearer {SECRET}x", "Bearer é\udcff"):
            assert not key.matches(wrong)
        assert SECRET not in repr(key) + str(key)


def test_what_is_no_key_stops_the_start_and_is_not_repeated(tmp_path: Path) -> None:
    for content in [None, "", "short", "with a blank inside it", "é" * 20, "x" * 5000]:
        file, environment = tmp_path / "key", {}
        if content is not None:
            file.write_text(content)
            environment["NAME"] = content
        for source in ("env:NAME", f"file:{file}"):
            with pytest.raises(EngineError, match="manage") as caught:
                read_key(source, environment)
            assert not content or content not in str(caught.value)


def test_the_allow_list_lets_in_our_routes_and_nothing_else_new() -> None:
    there = {"vllm.general_plugins": ["steermoe", "other"], "vllm.platform_plugins": ["chip"]}

    def installed(group: str) -> list[str]:
        return there.get(group, [])

    assert names_with_endpoints(None, installed) == "chip,other,steermoe"
    assert names_with_endpoints("steermoe,x", installed) == "steermoe,x"
    there["vllm.endpoint_plugins"] = ["steermoe", "routes"]
    assert names_with_endpoints(None, installed) == "chip,other,steermoe"
    there["vllm.endpoint_plugins"] = ["steermoe", "other"]
    with pytest.raises(EngineError, match="'other'"):
        names_with_endpoints(None, installed)


def test_another_shape_of_equal_size_is_another_model(registry: Registry, tmp_path: Path) -> None:
    managed(registry, tmp_path / "profiles.json")[1].load("terse", EXPERTS)
    other = MoEShape(SHAPE.architecture, (0, 2, 3), SHAPE.num_experts, SHAPE.top_k)
    with pytest.raises(EngineError, match="a store of its own"):
        front_end(registry, Settings(profile_store=str(tmp_path / "profiles.json")), shape=other)
    assert MODEL in (tmp_path / "profiles.json").read_text()
