"""The front end: what becomes of a request's steering, its salt, and what is refused before the engine sees it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from expert_registry import Recommended, Registry, SteerMoEError
from expert_registry.errors import EngineError, PolicyError, ProfileError, RequestError, UnknownRankingError
from expert_registry.registry import publish
from tests.support.front_ends import DIGITS, EXPERTS, MODEL, SHAPE, front_end, profile_in, tiny_registry
from tests.support.made_rankings import make_ranking
from tests.support.refusals import as_said, refusal
from vllm_steermoe_plugin.admission.request_admission import AdmittedRequest, FrontEnd
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.selection import select_experts
from vllm_steermoe_plugin.steering.wire import (
    CHECKED_KEY,
    COUNT_KEY,
    SALT_PREFIX,
    SHARED_KEY,
    STEER_KEY,
    STEERED,
    compose_salt,
)

CHECKED: dict[str, object] = {CHECKED_KEY: True}
SPANS = CountedSpans(2, ((0, 3), (5, 6)))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return tiny_registry(tmp_path)


def admitted(extra_args: Mapping[str, object] | None) -> SteeringState:
    """A worker that was given these arguments; it raises if they are not what it takes."""
    state = SteeringState(SHAPE, SHAPE.layers, max_requests=2, max_tokens=8, count_groups=3, device=torch.device("cpu"))
    state.admit("request", extra_args, 8)
    return state


def test_a_request_that_asks_for_nothing_is_left_alone(registry: Registry) -> None:
    for served, args in itertools.product((False, True), (None, {}, {"other": 3})):
        assert front_end(registry, served=served).admit(args) is None


def test_a_named_behaviour_becomes_what_its_ranking_recommends(registry: Registry) -> None:
    prepared = front_end(registry, served=True).admit({STEER_KEY: "digits", "other": 3})
    expected = select_experts(DIGITS, activate=2, deactivate=2).profile
    assert profile_in(prepared) == expected
    assert prepared == AdmittedRequest(CHECKED | {STEER_KEY: expected.to_json(), "other": 3}, STEERED + expected.digest)
    reverse = front_end(registry).admit({STEER_KEY: "digits:reverse"})
    assert profile_in(reverse) == select_experts(DIGITS, activate=1, deactivate=3, reverse=True).profile
    numbers = front_end(registry).admit({STEER_KEY: "digits:activate=0:phase=prompt"})
    assert profile_in(numbers) == select_experts(DIGITS, activate=0, deactivate=2, phase="prompt").profile


def test_two_behaviours_are_merged(registry: Registry) -> None:
    there = front_end(registry)
    one, two = (profile_in(there.admit({STEER_KEY: name})) for name in ("digits:deactivate=0", "refusal"))
    assert one is not None and two is not None
    both = profile_in(there.admit({STEER_KEY: "digits:deactivate=0+refusal"}))
    assert both == SteeringProfile.merge([one, two])
    assert both == profile_in(there.admit({STEER_KEY: "refusal + digits:deactivate=0"}))


def test_a_worker_takes_what_the_front_end_writes_and_the_callers_arguments_stay(registry: Registry) -> None:
    for text in ("digits", "digits:reverse", "refusal:phase=generation", EXPERTS):
        args: dict[str, object] = {STEER_KEY: text, "other": [1]}
        prepared = front_end(registry).admit(args)
        assert prepared is not None and args == {STEER_KEY: text, "other": [1]}
        written = prepared.extra_args[STEER_KEY]
        assert isinstance(written, str) and SteeringProfile.from_json(written).to_json() == written
        assert admitted(prepared.extra_args).steered_requests == 1


def test_a_default_steers_and_none_lifts_it(registry: Registry) -> None:
    there = front_end(registry, Settings(default="digits"), served=True)
    asked = front_end(registry).admit({STEER_KEY: "digits"})
    assert there.admit(None) == there.admit({}) == asked
    assert there.admit({"other": 1}) is not None
    lifted = there.admit({STEER_KEY: "none", "other": 1})
    assert lifted == AdmittedRequest(CHECKED | {"other": 1}, None)
    assert admitted(lifted.extra_args).steered_requests == 0
    assert profile_in(there.admit({STEER_KEY: "refusal"})) != profile_in(asked)


def test_the_policy_does_not_bind_the_operators_own_default(registry: Registry) -> None:
    there = front_end(registry, Settings(default="digits:reverse"), served=True)
    assert profile_in(there.admit(None)) == select_experts(DIGITS, activate=1, deactivate=3, reverse=True).profile


def test_a_default_that_cannot_be_applied_stops_the_start(registry: Registry) -> None:
    with pytest.raises(UnknownRankingError, match="'digit'"):
        front_end(registry, Settings(default="digit"))
    with pytest.raises(ProfileError, match="layer 2"):
        front_end(registry, Settings(default='{"activate": {"2": [0]}}'))
    with pytest.raises(RequestError):
        front_end(registry, Settings(default=""))
    front_end(registry, Settings(default="digit", enabled=False))


COUNT = SPANS.to_json()
WRONG_RANGES = (
    "[]",
    "[[1,1]]",
    "[[2,3],[0,1]]",
    "[[0,2],[1,3]]",
    "[[-1,1]]",
    '["ab"]',
    "[[0,1,2]]",
    "[[0," + "9" * 5000 + "]]",
)
WRONG_SPANS = [f'{{"group": {group}, "ranges": [[0, 1]]}}' for group in ("0", "true")] + [
    f'{{"group": 1, "ranges": {ranges}}}' for ranges in WRONG_RANGES
]
LOCKED: dict[str, object] = {"default": "digits", "allow_override": False}
OFF: dict[str, object] = {"enabled": False, "default": "digits", "count_groups": 2}
COUNTS: dict[str, object] = {"count_groups": 2}
REFUSED: list[tuple[Any, ...]] = [
    # What the operator does not allow, on a server or at all.
    *((LOCKED, False, {STEER_KEY: text}, PolicyError, "allow_override") for text in ("none", "refusal", "digits")),
    (OFF, False, {STEER_KEY: "digits"}, PolicyError, "enabled"),
    (OFF, False, {COUNT_KEY: COUNT}, EngineError, "count"),
    ({}, True, {STEER_KEY: "digits:reverse"}, PolicyError, "allow_reverse"),
    ({}, True, {STEER_KEY: EXPERTS}, PolicyError, "allow_experts"),
    ({}, True, {STEER_KEY: "digits:activate=1"}, PolicyError, "allow_experts"),
    (COUNTS, True, {COUNT_KEY: COUNT}, PolicyError, "not over HTTP"),
    ({}, False, {COUNT_KEY: COUNT}, EngineError, "count_groups"),
    ({"count_groups": 1}, False, {COUNT_KEY: COUNT}, RequestError, "group 2 of 1"),
    # What the plugin writes is not taken from a caller.
    *(
        (COUNTS, False, {key: value} | more, RequestError, "written by the plugin")
        for key in (SHARED_KEY, CHECKED_KEY)
        for value in (None, [0, "mine"], "x", True)
        for more in ({}, {COUNT_KEY: COUNT}, {STEER_KEY: "none"})
    ),
    # What is no request, or no span.
    *(
        ({}, False, {STEER_KEY: wrong}, RequestError, "")
        for wrong in (3, True, ["digits"], {"activate": {"3": [5]}}, "", "Digits", "digits:boost")
    ),
    *(
        (COUNTS, False, {COUNT_KEY: wrong}, RequestError, "counted|integers")
        for wrong in ("", "[]", "{}", 3, ["x"], "[" * 100_000, *WRONG_SPANS)
    ),
    # What does not fit the model or the registry, before the engine sees it.
    *(
        ({}, False, {STEER_KEY: text}, kind, words)
        for text, kind, words in (
            ("other", UnknownRankingError, "8 experts"),
            ("digits@7", UnknownRankingError, "digits@7"),
            ("lies", UnknownRankingError, "digits, other, refusal"),
            ("none+digits", SteerMoEError, "none"),
            ('{"activate": {"2": [0]}}', ProfileError, "layer 2"),
            ('{"activate": {"3": [6]}}', ProfileError, "expert 6"),
            ('{"activate": {"3": [0, 1, 2]}}', ProfileError, "at most 2"),
            ("digits+digits:reverse", RequestError, "twice"),
            ("digits+refusal:phase=prompt", ProfileError, "phase"),
            ("digits:activate=19", ProfileError, "19 experts"),
            ("lies:strength=0", UnknownRankingError, "digits, other, refusal"),
            ("digits:strength=1:top=999", ProfileError, "top: 999 experts asked for"),
            ("digits:strength=1:by=own", ProfileError, "no weights of its own.*risk_difference"),
            ("digits:strength=16+refusal:strength=16", ProfileError, "from -16 to 16"),
            ("digits+refusal:strength=1:phase=prompt", ProfileError, "phase"),
            ('{"bias": {"2": {"0": 1}}}', ProfileError, "bias: layer 2 has no routed experts"),
            ('{"bias": {"3": {"6": 1}}}', ProfileError, "bias: layer 3 has no expert 6"),
        )
    ),
]
"""Settings, whether served, extra arguments -> the error and its words."""
ADMITTED: list[tuple[dict[str, object], bool, str]] = [
    ({"allow_reverse": True}, True, "digits:reverse"),
    ({"allow_experts": True}, True, EXPERTS),
    ({"allow_experts": True}, True, "digits:activate=1"),
    ({}, True, "digits:phase=prompt"),
    ({}, True, "digits:strength=2"),
    ({"allow_reverse": True}, True, "digits:strength=-1"),
    ({"allow_experts": True}, True, '{"bias": {"3": {"5": -0.5}}}'),
    ({}, False, "digits:reverse:activate=1"),
    ({}, False, EXPERTS),
]


def test_each_request_is_admitted_or_refused_as_settings_and_model_say(registry: Registry) -> None:
    wrong = []
    for settings, served, args, kind, words in REFUSED:
        there = front_end(registry, Settings.model_validate(settings), served=served)
        error = refusal(there.admit, args)
        if not as_said(error, kind, words):
            wrong.append((settings, served, str(args)[:80], error))
    assert wrong == []
    for settings, served, text in ADMITTED:
        there = front_end(registry, Settings.model_validate(settings), served=served)
        assert profile_in(there.admit({STEER_KEY: text})) is not None
    for settings in (OFF, LOCKED):
        steered = front_end(registry, Settings.model_validate(settings)).admit(None)
        assert (steered is None) == (settings is OFF)


def test_equal_steering_has_an_equal_salt_and_other_steering_another(registry: Registry) -> None:
    there = front_end(registry)
    found = there.resolve("digits")
    assert found is not None
    ways = ["digits", " digits@1:forward", "digits@latest:activate=2", found.profile.to_json()]
    assert len({there.admit({STEER_KEY: text}).salt for text in ways}) == 1  # type: ignore[union-attr]
    others = [
        "digits",
        "digits:reverse",
        "digits:activate=1",
        "digits:phase=prompt",
        "digits:phase=generation",
        "refusal",
        EXPERTS,
    ]
    salts = [there.admit({STEER_KEY: text}).salt for text in others]  # type: ignore[union-attr]
    assert len(set(salts)) == len(others) and all(salt and salt.startswith(SALT_PREFIX) for salt in salts)


def test_each_counted_request_has_a_text_of_its_own_from_its_first_counted_token_on(registry: Registry) -> None:
    there = front_end(registry, Settings(count_groups=2))
    args: dict[str, object] = {COUNT_KEY: SPANS.to_json()}
    prepared = [there.admit(extra) for extra in [args, args, args | {STEER_KEY: "digits"}, args | {STEER_KEY: "none"}]]
    shared: list[Any] = [one.extra_args[SHARED_KEY] for one in prepared if one]
    assert [first for first, _ in shared] == 4 * [SPANS.ranges[0][0]] and len({own for _, own in shared}) == 4
    # What comes before is another's too, if that is steered alike.
    steered = there.admit({STEER_KEY: "digits"})
    assert [one.salt for one in prepared if one] == [None, None, steered and steered.salt, None]
    assert prepared[0] is not None and prepared[0].extra_args == args | CHECKED | {SHARED_KEY: shared[0]}
    assert admitted(prepared[0].extra_args).steered_requests == 0
    assert profile_in(prepared[2]) == profile_in(steered)


OURS = (None, *(STEERED + end for end in ("0" * 64, "1" * 64, "0" * 64 + ":1", "0" * 64 + ":12")))


@given(st.lists(st.tuples(st.sampled_from(OURS), st.none() | st.text(st.characters(), max_size=128)), unique=True))
@example(list(itertools.product(OURS, (None, "", "mine", "mine:", ":1", "2", "\0mine", "\ud800"))))
@example([(None, SALT_PREFIX), (OURS[1], SALT_PREFIX + "x:mine"), (OURS[2], OURS[1])])
@hypothesis_settings(max_examples=50, deadline=None)
def test_every_pair_of_our_salt_and_the_users_has_a_salt_of_its_own(pairs: list[tuple[str | None, str | None]]) -> None:
    salts = []
    for ours, users in pairs:
        if users is not None and users.startswith(SALT_PREFIX):
            with pytest.raises(RequestError, match=f"'{SALT_PREFIX}'"):
                compose_salt(ours, users)
            continue
        salts.append(compose_salt(ours, users))
        if ours is None or users is None:
            assert salts[-1] == (users if ours is None else ours)
    assert len(set(salts)) == len(salts)


def test_every_salt_is_one_that_vllm_takes_from_a_user(registry: Registry) -> None:
    from vllm.entrypoints.generate.base.protocol import validate_cache_salt

    there = front_end(registry, Settings(count_groups=2))
    for text, users, counted in itertools.product(
        (None, "digits", "digits:phase=prompt"), (None, "mine", "m" * 128), ({}, {COUNT_KEY: COUNT})
    ):
        prepared = there.admit(({STEER_KEY: text} if text else {}) | counted)
        salt = prepared.salt_for(131_072) if prepared is not None else None
        assert (salt is None) == (text is None)
        validate_cache_salt(compose_salt(salt, users))


def test_counted_positions_lie_in_the_prompt_of_one_answer(registry: Registry) -> None:
    there = front_end(registry, Settings(count_groups=2))
    counted, steered = there.admit({COUNT_KEY: COUNT}), there.admit({STEER_KEY: "digits"})
    assert counted is not None and steered is not None
    FrontEnd.check_counted(counted, [0] * 6, 1)
    for prompt in ([0] * 5, [], None):
        with pytest.raises(RequestError, match="end at 6"):
            FrontEnd.check_counted(counted, prompt, 1)
    for samples in (2, 5):
        with pytest.raises(RequestError, match=f"n={samples} answers .*count with n=1"):
            FrontEnd.check_counted(counted, [0] * 6, samples)
        FrontEnd.check_counted(steered, None, samples)


def test_a_null_that_passes_the_front_end_does_not_stop_a_worker(registry: Registry) -> None:
    there = front_end(registry, Settings(count_groups=2))
    for args in ({STEER_KEY: None}, {COUNT_KEY: None}, {STEER_KEY: "digits", COUNT_KEY: None}):
        # What `prepare` leaves alone goes to the worker as it came.
        prepared = there.admit(args)
        admitted(prepared.extra_args if prepared is not None else args)


def test_a_model_that_cannot_be_steered_serves_those_who_do_not_ask(registry: Registry) -> None:
    llama = EngineError("LlamaForCausalLM cannot be steered")
    there = front_end(registry, shape=llama)
    assert there.admit(None) is None and there.admit({"other": 1}) is None
    assert there.admit({STEER_KEY: "none"}) == AdmittedRequest(CHECKED, None)
    lengths = []
    for text in 3 * ["digits"] + 3 * [EXPERTS]:
        with pytest.raises(EngineError, match="Llama") as caught:
            there.admit({STEER_KEY: text})
        lengths.append(len(caught.traceback))
    assert lengths[0] == lengths[2] and lengths[3] == lengths[5], "refusing gathers nothing"
    with pytest.raises(EngineError, match="Llama"):
        front_end(registry, Settings(default="digits"), shape=llama)


def test_padding_a_request_does_not_fill_the_memory_of_a_server(registry: Registry) -> None:
    import tracemalloc

    there = front_end(registry, served=True)
    there.admit({STEER_KEY: "digits"})
    tracemalloc.start()
    try:
        for i in range(40):
            there.admit({STEER_KEY: "digits" + " " * (200_000 + i)})
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 1 << 20


def test_few_expert_lists_of_callers_are_kept(registry: Registry) -> None:
    import gc

    there = front_end(registry, Settings(allow_experts=True), served=True)
    sets = [frozenset({(0, i % 6), (1, i // 6), (3, 1)}) for i in range(36)]
    for experts in sets:
        there.admit({STEER_KEY: SteeringProfile(experts).to_json()})
    gc.collect()
    kept = [found for found in gc.get_objects() if isinstance(found, SteeringProfile) and found.activate in sets]
    assert len(kept) <= 8


def counting(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[None]:
    """A list that grows by one with each call of a method."""
    calls: list[None] = []
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


# One HTTP request may have thousands of prompts, and each asks for itself.


def test_a_list_that_is_refused_anyway_is_not_read(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    read = counting(monkeypatch, SteeringProfile, "from_json")
    for settings in (Settings(), Settings(enabled=False), Settings(allow_experts=True, allow_override=False)):
        there = front_end(registry, settings, served=True)
        for text in (EXPERTS, " " + EXPERTS, "{", "{" * 1000):
            with pytest.raises(PolicyError):
                there.admit({STEER_KEY: text})
            assert not there.wants_store({STEER_KEY: text})
    assert read == []


def test_a_list_is_read_and_checked_once_for_all_prompts(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    there = front_end(registry, Settings(allow_experts=True), served=True)
    wrong = '{"activate": {"2": [0]}}'
    read = counting(monkeypatch, SteeringProfile, "from_json")
    prepared = []
    for _ in range(50):
        prepared.append(there.admit({STEER_KEY: EXPERTS}))
        with pytest.raises(ProfileError, match="layer 2"):
            there.admit({STEER_KEY: wrong})
    assert len(read) == 2
    assert all(one == prepared[0] for one in prepared)
    there.resolver.refuse("the workers are gone")
    for text in (EXPERTS, wrong):
        with pytest.raises(EngineError, match="gone"):
            there.admit({STEER_KEY: text})


def test_rankings_that_do_not_go_together_are_read_once(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    there = front_end(registry, served=True)
    found = counting(monkeypatch, Registry, "find")
    lengths = []
    for _ in range(50):
        with pytest.raises(ProfileError, match="phase") as caught:
            there.admit({STEER_KEY: "digits:phase=prompt+refusal:phase=generation"})
        lengths.append(len(caught.traceback))
    assert len(found) == 2 and lengths[1] == lengths[-1], "and refusing gathers nothing"


def test_a_ranking_that_is_published_after_it_was_asked_for_is_found(registry: Registry) -> None:
    there = front_end(registry, served=True)
    for text in ("digits@2", "brevity", "brevity+digits"):
        with pytest.raises(UnknownRankingError):
            there.admit({STEER_KEY: text})
    publish(make_ranking(7, behaviour="digits", version=2), registry.folders[0])
    publish(
        make_ranking(8, behaviour="brevity", recommended=Recommended(activate=0, deactivate=1)), registry.folders[0]
    )
    for text in ("digits@2", "brevity"):
        assert there.admit({STEER_KEY: text}) is not None


def test_nothing_is_steered_before_all_workers_are_known_to_steer(registry: Registry) -> None:
    def waiting(**settings: Any) -> FrontEnd:
        values = {"settings": Settings(**settings), "shape": SHAPE, "models": [MODEL], "registry": registry}
        return FrontEnd(**values, served=False, awaits_workers=True)

    for text in ("digits", EXPERTS, "refusal:reverse"):
        for absent, before, after in (
            (None, "handshake", None),
            ("worker 1 is absent", "handshake", "worker 1"),
        ):
            there = waiting()
            for words in (before, after):
                error = refusal(there.admit, {STEER_KEY: text})
                assert error is None if words is None else as_said(error, EngineError, words)
                assert there.admit(None) is None and there.admit({STEER_KEY: "none"}) is not None
                there.set_worker_status(absent)
        with pytest.raises(EngineError, match="worker 1"):
            waiting(default=text).set_worker_status("worker 1 is absent")
    assert not waiting(enabled=False).awaits_workers


def test_weights_of_their_own_are_refused_wherever_they_come_from_once_the_workers_have_said_so(
    registry: Registry,
) -> None:
    own = json.dumps(json.loads(EXPERTS) | {"weight": "own"})
    for corrects in (False, True):
        there = front_end(registry, Settings(profiles={"mine": own}))
        there.set_worker_status(None, corrects=corrects)
        takers = (there.resolve, there.resolver.make_profile, lambda text, to=there: to.admit({STEER_KEY: text}))
        for take, text in itertools.product(takers, ("digits:weight=own", own)):
            error = refusal(take, text)
            assert error is None if corrects else as_said(error, ProfileError, "weight=own: the routers of this model")
        assert (refusal(there.resolve, "@mine") is None) is corrects
        for text in ("digits", EXPERTS, "none"):
            assert refusal(there.resolve, text) is None
    with pytest.raises(ProfileError, match="weight=own"):
        front_end(registry, Settings(default="digits:weight=own")).set_worker_status(None)
