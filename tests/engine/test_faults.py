"""What goes wrong, and what it must not do (the first two: `test_faults_served.py`).

| fault                           | must not                                                          |
|---------------------------------|-------------------------------------------------------------------|
| a worker is killed              | answer unsteered, let a request hang, leave the server up         |
| hostile values over HTTP        | be a 500, end the server, change others' answers, be echoed whole |
| hostile values in process       | raise anything but a refusal, reach a worker that rejects them    |
| a ranking file cut or replaced  | steer by half a file, leave a request unsteered                   |
| 1000 distinct profiles in turn  | run out of slots, keep what is gone, steer by another's rules     |
| 256 distinct profiles at once   | mix them up                                                       |
| requests aborted in mid-prefill | leave anything behind, steer the next request of that id          |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams

from expert_registry import Registry, SteerMoEError
from expert_registry.shape import MoEShape
from tests.support.engines import model_of
from tests.support.greedy import asking, run
from tests.support.oracle import Rules, forced
from tests.support.planted import planted_registry
from tests.support.random_steering import as_text, prompt, random_rules
from vllm_steermoe_plugin.admission.request_admission import AdmittedRequest, FrontEnd
from vllm_steermoe_plugin.detection.engine_client import take_counts
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, SHARED_KEY, STEER_KEY

Engines = Callable[..., Any]
Checkpoint = Callable[[str], Path]
ARCHITECTURE = "Qwen3MoeForCausalLM"
AT_ONCE, IN_TURN = 256, 1000


def state_of(engine: Any) -> SteeringState:
    state: SteeringState = model_of(engine).steering_state
    return state


def distinct_profiles(shape: MoEShape, number: int) -> list[Rules]:
    """Random rules of which no two are equal."""
    found: dict[frozenset[tuple[tuple[int, int], float]], Rules] = {}
    seed = 0
    while len(found) < number:
        rules = random_rules(shape, seed)
        found[frozenset(rules.items())] = rules
        seed += 1
    return list(found.values())


@pytest.fixture
def roomy(engines: Engines, checkpoint: Checkpoint) -> Any:
    """An engine that takes 256 requests in one step and counts a thousand of them apart."""
    return engines(
        str(checkpoint(ARCHITECTURE)),
        {"count_groups": IN_TURN},
        dtype="float32",
        enable_prefix_caching=False,
        max_num_seqs=AT_ONCE,
        max_num_batched_tokens=2048,
    )


def requests_for(profiles: list[dict[tuple[int, int], int]], first_group: int, tokens: int) -> tuple[Any, Any]:
    """Prompts and parameters, each request steered by its own profile and counted by itself."""
    prompts = [{"prompt_token_ids": prompt(i, tokens)} for i in range(len(profiles))]
    params = [
        asking(as_text(rules), CountedSpans(group, ((0, tokens),)).to_json(), max_tokens=1)
        for group, rules in enumerate(profiles, first_group)
    ]
    return prompts, params


def assert_obeyed(engine: Any, shape: MoEShape, profiles: list[dict[tuple[int, int], int]], tokens: int) -> None:
    """Every token of request i selected what profile i activates, and nothing that it deactivates."""
    selections, counted = take_counts(engine, shape.layers)
    assert counted[: len(profiles)].tolist() == [tokens] * len(profiles)
    for group, rules in enumerate(profiles):
        for (layer, expert), rule in forced(rules).items():
            found = selections[group, shape.layers.index(layer), expert]
            assert found == (tokens if rule > 0 else 0), (group, layer, expert, rule)


def test_256_profiles_in_one_step_are_kept_apart(
    roomy: Any, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = shape_in(checkpoint(ARCHITECTURE))
    profiles = distinct_profiles(shape, AT_ONCE)
    state = state_of(roomy)
    slots_of_steps: list[int] = []
    begin_step = SteeringState.begin_step

    def seen(self: SteeringState, batch: Any) -> None:
        begin_step(self, batch)
        slots_of_steps.append(len(set(self.token_slots.tolist()) - {0}))

    monkeypatch.setattr(SteeringState, "begin_step", seen)
    roomy.collective_rpc("steermoe_reset_counts")
    roomy.generate(*requests_for(profiles, 1, 4), use_tqdm=False)
    assert max(slots_of_steps) == AT_ONCE, "all of them must have been in one step"
    assert_obeyed(roomy, shape, profiles, 4)
    assert state.rules.shape[0] == AT_ONCE + 1


def test_a_thousand_profiles_in_turn_leave_no_more_than_one_step_needs(roomy: Any, checkpoint: Checkpoint) -> None:
    shape = shape_in(checkpoint(ARCHITECTURE))
    profiles = distinct_profiles(shape, IN_TURN)
    state = state_of(roomy)
    buffers = [(tensor.data_ptr(), tensor.shape) for tensor in (state.rules, state.token_slots, state.counters)]
    roomy.collective_rpc("steermoe_reset_counts")
    plain = run(roomy, [(prompt(0), None)])[0]
    prompts, params = requests_for(profiles, 1, 2)
    # A few at a time and not all at once: most slots hold a profile that is gone when the next one comes.
    for start in range(0, IN_TURN, 4):
        roomy.generate(prompts[start : start + 4], params[start : start + 4], use_tqdm=False)
        assert state.num_requests <= 4
    assert_obeyed(roomy, shape, profiles, 2)
    assert len(state._slots.slot_of) == AT_ONCE == len(set(state._slots.slot_of.values()))
    assert state._table.cache_info().currsize <= 1024
    assert [(t.data_ptr(), t.shape) for t in (state.rules, state.token_slots, state.counters)] == buffers
    again = run(roomy, [(prompt(0), None)])[0]
    assert plain[0] == again[0]
    np.testing.assert_array_equal(plain[1], again[1])


def test_requests_aborted_in_the_middle_of_a_prefill_leave_nothing(engines: Engines, checkpoint: Checkpoint) -> None:
    folder = checkpoint(ARCHITECTURE)
    shape = shape_in(folder)
    engine = engines(
        str(folder), {"count_groups": 4}, dtype="float32", enable_prefix_caching=False, max_num_batched_tokens=16
    )
    state, core = state_of(engine), engine.llm_engine
    texts = [as_text(random_rules(shape, seed)) for seed in range(4)]
    unsteered, steered = run(engine, [(prompt(0), None)])[0], run(engine, [(prompt(1), texts[0])])[0]
    for round_ in range(25):
        params = [
            SamplingParams(
                max_tokens=4, temperature=0.0, detokenize=False, extra_args={STEER_KEY: texts[(round_ + i) % 4]}
            )
            for i in range(3)
        ]
        # Ids come again with another profile in the next round.
        ids = [core.add_request(f"cut-{i}", {"prompt_token_ids": prompt(i, 60)}, p) for i, p in enumerate(params)]
        for _ in range(1 + round_ % 3):
            core.step()
        scheduler = core.engine_core.engine_core.scheduler
        assert any(0 < r.num_computed_tokens < 60 for r in scheduler.requests.values()), "no prefill was cut"
        core.abort_request(ids, internal=True)
        if round_ % 2:
            while core.has_unfinished_requests():
                core.step()
    for expected, (ids_, steer) in ((unsteered, (prompt(0), None)), (steered, (prompt(1), texts[0]))):
        found = run(engine, [(ids_, steer)])[0]
        assert found[0] == expected[0]
        np.testing.assert_array_equal(found[1], expected[1])
    run(engine, [(prompt(0), None)])
    assert state.num_requests <= 1 and not state._marked and not bool(state.active.any())
    assert not bool(state.token_slots.any())


WORDS = (
    "digits",
    "refusal",
    "none",
    "@1",
    "@latest",
    ":reverse",
    ":activate=",
    "+",
    ":",
    "=",
    "-1",
    "9" * 30,
    " ",
    "é",
)
JSON_WORDS = (
    '{"activate":',
    '"deactivate"',
    '{"0":[',
    "[[",
    "]",
    "}",
    "1",
    "1e999",
    "NaN",
    ",",
    '"phase":"both"',
    "\\u0000",
)
TEXTS = (
    st.text(max_size=40)
    | st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
    | st.lists(st.sampled_from(JSON_WORDS), max_size=10).map("".join)
    | st.builds(
        lambda key, layer, experts: f'{{"{key}": {{"{layer}": {experts}}}}}',
        st.sampled_from(["activate", "deactivate", "phase", ""]),
        st.integers(-1, 5) | st.text(max_size=3),
        st.lists(st.integers(-2, 40), max_size=8),
    )
)
VALUES = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
HOSTILE = st.dictionaries(st.sampled_from([STEER_KEY, COUNT_KEY, "other"]), VALUES, max_size=3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry((planted_registry(tmp_path_factory.mktemp("planted")),))


def front_end(registry: Registry, *, served: bool) -> FrontEnd:
    return FrontEnd(
        settings=Settings(allow_reverse=True, allow_experts=True, count_groups=2),
        shape=shape_in(lab_checkpoint.MODEL_DIR),
        models=[lab_checkpoint.NAME],
        registry=registry,
        served=served,
    )


@pytest.mark.parametrize("served", [False, True])
@given(extra_args=HOSTILE)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_arguments_are_refused_or_fit_a_worker(
    served: bool, planted: Registry, extra_args: dict[str, object]
) -> None:
    shape = shape_in(lab_checkpoint.MODEL_DIR)
    try:
        prepared: AdmittedRequest | None = front_end(planted, served=served).admit(extra_args)
    except SteerMoEError as error:
        assert len(str(error)) < 2000, "a refusal must not echo at length"
        return
    if prepared is None:
        assert STEER_KEY not in extra_args and COUNT_KEY not in extra_args
        return
    state = SteeringState(shape, shape.layers, max_requests=1, max_tokens=8, count_groups=2, device=torch.device("cpu"))
    state.admit("request", prepared.extra_args, 8)
    steered = STEER_KEY in prepared.extra_args
    assert state.idle == (not steered and COUNT_KEY not in prepared.extra_args)
    asked = extra_args.get(STEER_KEY)
    # Nothing but null and `none` may go on unsteered.
    assert steered or asked is None or (isinstance(asked, str) and asked.strip() == "none")
    assert (prepared.salt is not None) == steered
    assert (SHARED_KEY in prepared.extra_args) == (COUNT_KEY in prepared.extra_args)


@pytest.mark.parametrize("length", [1 << 10, 1 << 20, (1 << 20) + 1, 1 << 23])
@pytest.mark.parametrize("start", ["{", "digits+", "[", '{"activate": {"0": [' + "1," * 99, "\U0001f600"])
def test_oversized_texts_are_refused_in_few_words(start: str, length: int, planted: Registry) -> None:
    with pytest.raises(SteerMoEError) as caught:
        front_end(planted, served=True).admit({STEER_KEY: start + "[" * length})
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("damage", ["cut short", "emptied", "other bytes", "removed"])
def test_a_damaged_ranking_file_refuses_and_never_steers_by_half(damage: str, tmp_path: Path) -> None:
    folder = planted_registry(tmp_path / "registry")
    at_work = front_end(Registry((folder,)), served=True)
    before = at_work.admit({STEER_KEY: "digits"})
    assert before is not None
    for file in [path for path in folder.rglob("*") if path.is_file() and "digits" in str(path.relative_to(folder))]:
        content = file.read_bytes()
        if damage == "removed":
            file.unlink()
        else:
            file.write_bytes(
                {"cut short": content[: len(content) // 2], "emptied": b"", "other bytes": b"x" * 99}[damage]
            )
    # What was resolved stays what it was; all else is refused.
    again = at_work.admit({STEER_KEY: "digits"})
    assert again is not None and again.extra_args == before.extra_args
    for fresh, asked in ((at_work, "digits:activate=1"), (front_end(Registry((folder,)), served=True), "digits")):
        with pytest.raises(SteerMoEError):
            fresh.admit({STEER_KEY: asked})
    other = at_work.admit({STEER_KEY: "refusal"})
    assert other is not None and SteeringProfile.from_json(str(other.extra_args[STEER_KEY]))


def test_numbers_that_json_does_not_know_are_refused(planted: Registry) -> None:
    for value in (math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(SteerMoEError):
            front_end(planted, served=True).admit({STEER_KEY: value})
