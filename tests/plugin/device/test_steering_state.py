"""The steering state of a worker against a slow one that looks at each token by itself."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_registry import MoEShape, SteerMoEError
from expert_registry.errors import EngineError, ProfileError, RequestError
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.device.ops import count_, rewrite_
from vllm_steermoe_plugin.device.rewrite import apply_rules
from vllm_steermoe_plugin.device.staging_ring import Carrier
from vllm_steermoe_plugin.device.steering_state import BatchRow, SteeringState
from vllm_steermoe_plugin.steering.biases import Bias
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.profile import PHASES, Phase, SteeringProfile
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, BIASES, DEACTIVATE, FORCES
from vllm_steermoe_plugin.steering.rules import RuleTable
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, STEER_KEY

SHAPE = MoEShape("Qwen3MoeForCausalLM", (0, 1, 3, 6), 6, 2)
CPU = torch.device("cpu")
MAX_TOKENS = 40
GROUPS = 3


def make_state(
    layers: Sequence[int] = SHAPE.layers,
    *,
    max_requests: int = 4,
    groups: int = GROUPS,
    carrier: Carrier | None = None,
) -> SteeringState:
    return SteeringState(
        SHAPE,
        layers,
        max_requests=max_requests,
        max_tokens=MAX_TOKENS,
        count_groups=groups,
        device=CPU,
        carrier=carrier,
    )


def some_profile(seed: int, phase: Phase | None = None) -> SteeringProfile:
    """One of many profiles within the limits, some of which leave layers alone."""
    chance = random.Random(seed)
    activate, deactivate = set(), set()
    bias: list[Bias] = []
    while not activate | deactivate and not bias:
        for layer in SHAPE.layers:
            experts = chance.sample(range(SHAPE.num_experts), SHAPE.num_experts)
            up, down = chance.choice([0, 0, 1, 2]), chance.choice([0, 0, 1, 4])
            activate |= {(layer, e) for e in experts[:up]}
            deactivate |= {(layer, e) for e in experts[up : up + down]}
            bias += [(layer, e, chance.uniform(-4, 4)) for e in experts[: chance.choice([0, 0, 2])]]
    return SteeringProfile(frozenset(activate), frozenset(deactivate), phase or chance.choice(PHASES), bias=tuple(bias))


def arguments(profile: SteeringProfile | None = None, counted: CountedSpans | None = None) -> dict[str, object] | None:
    """`extra_args` as the front end writes them."""
    args: dict[str, object] = {}
    if profile is not None:
        args[STEER_KEY] = profile.to_json()
    if counted is not None:
        args[COUNT_KEY] = counted.to_json()
    return args or None


def expected_row(profile: SteeringProfile | None, layers: Sequence[int], *, in_prompt: bool) -> list[list[float]]:
    """Rules `[L, E]` of one token."""
    if profile is None or profile.phase == ("generation" if in_prompt else "prompt"):
        return [[0.0] * SHAPE.num_experts for _ in layers]
    rules = {(layer, expert): float(np.float16(bias)) for layer, expert, bias in profile.bias}
    rules |= dict.fromkeys(profile.activate, ACTIVATE) | dict.fromkeys(profile.deactivate, DEACTIVATE)
    return [[rules.get((layer, e), 0.0) for e in range(SHAPE.num_experts)] for layer in layers]


def rules_by_token(state: SteeringState) -> list[list[list[float]]]:
    """What the graph reads for each position of a padded step."""
    rows: list[list[list[float]]] = state.rules[state.token_slots.long()].tolist()
    return rows


@dataclass
class SlowRequest:
    """A request as a scheduler has it."""

    id: str
    profile: SteeringProfile | None
    counted: CountedSpans | None
    prompt: int
    length: int
    computed: int = 0
    seen: set[int] = field(default_factory=set)

    @property
    def args(self) -> dict[str, object] | None:
        return arguments(self.profile, self.counted)


@st.composite
def requests(draw: st.DrawFn) -> SlowRequest:
    prompt = draw(st.integers(1, 20))
    edges = sorted(draw(st.sets(st.integers(0, prompt), min_size=2, max_size=6)) | {0, prompt})
    ranges = tuple(zip(edges[: len(edges) // 2 * 2 : 2], edges[1::2], strict=True))
    return SlowRequest(
        id="",
        profile=draw(st.none() | st.integers(0, 11).map(some_profile)),
        counted=draw(st.none() | st.builds(CountedSpans, st.integers(1, GROUPS), st.just(ranges))),
        prompt=prompt,
        length=prompt + draw(st.integers(1, 4)),
    )


def check_step(state: SteeringState, batch: list[tuple[SlowRequest, int]], layers: Sequence[int]) -> None:
    """Compare the buffers of a step with rules looked up token by token, padding included."""
    rows = [
        expected_row(request.profile, layers, in_prompt=position < request.prompt)
        for request, number in batch
        for position in range(request.computed, request.computed + number)
    ]
    nothing = expected_row(None, layers, in_prompt=True)
    assert rules_by_token(state) == rows + [nothing] * (MAX_TOKENS - len(rows))
    for index, layer in enumerate(layers):
        touched = any(any(row[index]) for row in rows)
        profiles = [request.profile for request, _ in batch if request.profile]
        forced = any(at == layer for profile in profiles for at, _ in profile.activate | profile.deactivate)
        biased = any(at == layer for profile in profiles for at, *_ in profile.bias)
        assert touched <= bool(state.active[index])
        assert not int(state.active[index]) & ~(FORCES * forced | BIASES * biased)


@given(st.lists(requests(), min_size=1, max_size=8), st.integers(0, 1 << 32), st.sampled_from([SHAPE.layers, (1, 6)]))
@settings(max_examples=60, deadline=None)
def test_equals_the_slow_oracle_over_random_schedules(
    waiting: list[SlowRequest], seed: int, layers: tuple[int, ...]
) -> None:
    """Arrivals, chunked prefill, decoding, preemption with and without forgetting, ends; more profiles than slots."""
    chance = random.Random(seed)
    state = make_state(layers)
    counters = np.zeros((GROUPS, len(layers), SHAPE.num_experts), dtype=np.int64)
    tokens = np.zeros(GROUPS, dtype=np.int64)
    running: list[SlowRequest] = []
    args: dict[str, dict[str, object] | None] = {}
    for number, request in enumerate(waiting):
        request.id = f"request-{number}"
    while waiting or running:
        while waiting and len(running) < 4 and (not running or chance.random() < 0.6):
            request = waiting.pop()
            running.append(request)
            args[request.id] = request.args
            state.admit(request.id, args[request.id], request.prompt)
        chance.shuffle(running)
        for request in running:
            if request.computed and chance.random() < 0.1:
                request.computed = 0
                if chance.random() < 0.5:
                    state.forget(request.id)
                    args[request.id] = request.args
            state.admit(request.id, args[request.id], request.prompt)
        batch = []
        for request in running[: chance.randint(1, 4)]:
            left = request.prompt - request.computed
            batch.append((request, chance.randint(1, min(left, 9)) if left > 0 else 1))
        state.begin_step([BatchRow(request.id, request.computed, number) for request, number in batch])
        check_step(state, batch, layers)
        selected = torch.tensor([chance.sample(range(SHAPE.num_experts), SHAPE.top_k) for _ in range(MAX_TOKENS)])
        for index in range(len(layers)):
            count_(selected.int() if index else selected, state.counters, state.token_groups, index)
        at = 0
        for request, number in batch:
            for position in range(request.computed, request.computed + number):
                ranges = request.counted.ranges if request.counted else ()
                if any(a <= position < b for a, b in ranges) and position not in request.seen:
                    assert request.counted is not None
                    request.seen.add(position)
                    tokens[request.counted.group - 1] += 1
                    for expert in selected[at].tolist():
                        counters[request.counted.group - 1, :, expert] += 1
                at += 1
            request.computed += number
        if chance.random() < 0.2:
            state.clear_step()
            check_step(state, [], layers)
            assert not state.token_groups.any() and not state.active.any()
        for request in [request for request in running if request.computed >= request.length]:
            running.remove(request)
            state.forget(request.id)
    found, found_tokens = state.counts.read()
    assert np.array_equal(found, counters) and np.array_equal(found_tokens, tokens)
    assert state.num_requests == 0 and state.known_requests() == set()
    state.counts.reset()
    assert not state.counts.read()[0].any() and not state.counts.read()[1].any()


def test_a_thousand_profiles_in_turn_find_a_slot_beside_one_that_stays() -> None:
    state = make_state(max_requests=2)
    staying = some_profile(10_000, "both")
    state.admit("staying", arguments(staying), 1)
    for seed in range(1000):
        profile = some_profile(seed, "both")
        state.admit(f"r{seed}", arguments(profile), 1)
        state.begin_step([BatchRow(f"r{seed}", 0, 1), BatchRow("staying", seed, 1)])
        rows = state.rules[state.token_slots[:2].long()].tolist()
        assert rows == [expected_row(p, SHAPE.layers, in_prompt=True) for p in (profile, staying)]
        state.forget(f"r{seed}")
    assert state.steered_requests == 1001


def test_of_profiles_that_are_gone_only_so_many_are_kept_while_the_worker_is_busy() -> None:
    state = make_state(max_requests=2)
    state.admit("staying", arguments(some_profile(10_000)), 1)

    def kept() -> int:
        gc.collect()
        return sum(isinstance(thing, RuleTable) for thing in gc.get_objects())

    before = kept()
    for seed in range(1500):
        state.admit(f"r{seed}", arguments(some_profile(seed)), 1)
        state.begin_step([BatchRow(f"r{seed}", 0, 1), BatchRow("staying", seed, 1)])
        state.forget(f"r{seed}")
    assert kept() - before < 1200


def test_all_slots_are_used_at_once_and_by_others_in_the_next_step() -> None:
    state = make_state(max_requests=16)
    for offset in (0, 8, 100):
        batch = [SlowRequest(f"{offset}-{i}", some_profile(offset + i, "both"), None, 2, 3) for i in range(16)]
        for request in batch:
            state.admit(request.id, request.args, 2)
        state.begin_step([BatchRow(request.id, 0, 2) for request in batch])
        check_step(state, [(request, 2) for request in batch], SHAPE.layers)
        for request in batch:
            state.forget(request.id)


def test_slot_zero_never_holds_a_rule() -> None:
    state = make_state(max_requests=1)
    for seed in range(20):
        state.admit("r", arguments(some_profile(seed)), 1)
        state.begin_step([BatchRow("r", 0, 1)])
        assert not state.rules[0].any()


def test_a_phase_ends_where_the_prompt_does_even_inside_a_step() -> None:
    for phase, steered in [("both", "11111"), ("prompt", "11100"), ("generation", "00011")]:
        state = make_state()
        state.admit("r", arguments(SteeringProfile(frozenset({(0, 1)}), phase=phase)), 3)
        for first in range(5):
            state.begin_step([BatchRow("r", first, 5 - first)])
            assert state.rules[state.token_slots[: 5 - first].long(), 0, 1].tolist() == [
                ACTIVATE if s == "1" else 0 for s in steered[first:]
            ]


def test_a_shorter_step_leaves_nothing_of_a_longer_one_behind() -> None:
    state = make_state()
    spans = CountedSpans(1, ((0, 30),))
    state.admit("long", arguments(some_profile(1, "both"), spans), 30)
    state.admit("short", arguments(some_profile(2, "both")), 2)
    state.begin_step([BatchRow("long", 0, 30)])
    assert state.token_slots[:30].all() and state.token_groups[:30].all()
    state.begin_step([BatchRow("short", 0, 2)])
    assert state.token_slots[:2].all() and not state.token_slots[2:].any() and not state.token_groups.any()
    state.forget("short")
    state.admit("plain", None, 2)
    state.begin_step([BatchRow("plain", 0, 2)])
    assert not state.token_slots.any() and not state.active.any()


def test_a_preempted_request_that_runs_again_counts_each_position_once() -> None:
    state = make_state(groups=1)
    spans = CountedSpans(1, ((1, 4), (6, 9)))
    for chunks in ([(0, 3)], [(0, 2), (2, 5)], [(0, 12)], [(3, 9)]):
        state.forget("r")
        state.admit("r", arguments(None, spans), 12)
        for start, stop in chunks:
            state.begin_step([BatchRow("r", start, stop - start)])
            for row in range(len(SHAPE.layers)):
                count_(torch.tensor([[0, 1]] * (stop - start)), state.counters, state.token_groups, row)
    selections, tokens = state.counts.read()
    assert tokens.tolist() == [6]
    assert selections[0].tolist() == [[6, 6, 0, 0, 0, 0]] * len(SHAPE.layers)


def test_of_requests_that_were_counted_only_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that is still being computed is not forgotten for those that have ended."""
    monkeypatch.setattr("vllm_steermoe_plugin.device.routing_counters.REMEMBERED_IDS", 8)
    state = make_state(groups=1)
    spans = CountedSpans(1, ((0, 200),))
    state.admit("long", arguments(None, spans), 200)
    for number in range(100):
        state.admit(f"r{number}", arguments(None, spans), 1)
        state.begin_step([BatchRow("long", number, 1), BatchRow(f"r{number}", 0, 1)])
        state.forget(f"r{number}")
    assert len(state.counts._counted_until) == 8
    state.forget("long")
    state.admit("long", arguments(None, spans), 200)
    before = state.counts.tokens[1]
    state.begin_step([BatchRow("long", 0, 40)])
    assert state.counts.tokens[1] == before == 200, "what is computed again is not counted again"


def test_a_request_that_is_admitted_again_is_one_steered_request() -> None:
    state = make_state()
    args = arguments(some_profile(1))
    for _ in range(3):
        state.admit("r", args, 3)
        state.admit("plain", None, 3)
    # Model Runner V2 removes a request when it is preempted and adds it again when it goes on.
    state.begin_step([BatchRow("r", 0, 3)])
    state.forget("r")
    state.admit("r", arguments(some_profile(1)), 3)
    assert state.steered_requests == 1 and state.num_requests == 2


def test_an_id_that_comes_again_with_another_profile_gets_that() -> None:
    for forgotten in [False, True]:
        state = make_state()
        for seed in (1, 2, 3):
            profile = some_profile(seed, "both")
            state.admit("same", arguments(profile), 2)
            state.begin_step([BatchRow("same", 0, 1)])
            assert state.rules[state.token_slots[0]].tolist() == expected_row(profile, SHAPE.layers, in_prompt=True)
            if forgotten:
                state.forget("same")
        state.admit("same", None, 2)
        state.begin_step([BatchRow("same", 0, 1)])
        assert not state.token_slots.any()


def test_a_request_that_was_never_admitted_or_is_gone_stops_the_step() -> None:
    for neighbour in [None, some_profile(1)]:
        state = make_state()
        state.admit("known", arguments(neighbour), 1)
        with pytest.raises(EngineError, match="'stranger'"):
            state.begin_step([BatchRow("known", 0, 1), BatchRow("stranger", 0, 1)])
        state.forget("known")
        with pytest.raises(EngineError, match="'known'"):
            state.begin_step([BatchRow("known", 0, 1)])
        state.forget("known")


def test_what_came_past_the_front_end_is_checked_again() -> None:
    state = make_state()
    rows: list[tuple[Any, ...]] = [
        ({STEER_KEY: "digits"}, RequestError, "not JSON"),
        ({STEER_KEY: {"activate": {"0": [1]}}}, EngineError, "dict"),
        ({STEER_KEY: '{"activate": {"2": [1]}}'}, ProfileError, "layer 2"),
        ({STEER_KEY: '{"activate": {"0": [0, 1, 2]}}'}, ProfileError, "at most 2"),
        ({COUNT_KEY: '{"group": 4, "ranges": [[0, 1]]}'}, EngineError, "group 4"),
        ({COUNT_KEY: '{"group": 0, "ranges": [[0, 1]]}'}, RequestError, "group=0"),
        ({COUNT_KEY: [[0, 1]]}, RequestError, "counted spans"),
    ]
    assert not_refused(lambda args: state.admit("r", args, 3), rows) == []
    with pytest.raises(EngineError, match="never admitted"):
        state.begin_step([BatchRow("r", 0, 1)])
    assert state.steered_requests == 0


def test_each_token_may_have_its_own_group() -> None:
    """In pieces, and once though a preempted request computes its tokens again."""
    state = make_state(SHAPE.layers, groups=5)
    spans = CountedSpans(2, ((1, 3), (6, 8)), each=True)
    assert spans.last_group == 5 and CountedSpans.from_json(spans.to_json()) == spans
    state.admit("r", arguments(None, spans), 9)
    for start, stop in ((0, 2), (0, 2), (2, 7), (7, 9)):
        state.begin_step([BatchRow("r", start, stop - start)])
        selected = torch.tensor([[position % 4, 5] for position in range(start, stop)])
        for row in range(len(SHAPE.layers)):
            count_(selected, state.counters, state.token_groups, row)
    selections, tokens = state.counts.read()
    assert tokens.tolist() == [0, 1, 1, 1, 1]
    for group, position in ((2, 1), (3, 2), (4, 6), (5, 7)):
        expected = np.zeros(SHAPE.num_experts, dtype=np.int64)
        expected[[position % 4, 5]] = 1
        assert (selections[group - 1] == expected).all()
    with pytest.raises(EngineError, match="group 6"):
        state.admit("s", arguments(None, CountedSpans(3, ((0, 4),), each=True)), 9)


def test_a_state_that_does_not_count_refuses_to() -> None:
    state = make_state(groups=0)
    assert state.groups == 0
    with pytest.raises(SteerMoEError, match="count_groups"):
        state.admit("r", arguments(None, CountedSpans(1, ((0, 1),))), 3)
    selections, tokens = state.counts.read()
    assert selections.shape == (0, len(SHAPE.layers), SHAPE.num_experts) and tokens.shape == (0,)


def test_counts_that_do_not_add_up_are_noticed() -> None:
    state = make_state()
    state.admit("r", arguments(None, CountedSpans(2, ((0, 3),))), 3)
    state.begin_step([BatchRow("r", 0, 3)])
    selected = torch.tensor([[0, 1], [2, 3], [4, 5]])
    for row in range(len(SHAPE.layers) - 1):
        count_(selected, state.counters, state.token_groups, row)
    with pytest.raises(EngineError, match="inconsistent"):
        state.counts.read()
    count_(selected, state.counters, state.token_groups, len(SHAPE.layers) - 1)
    assert state.counts.read()[1].tolist() == [0, 3, 0]
    for row, group, expert in ((0, 2, 0), (3, 1, 5)):
        state.counters[row, group, expert] += 1
        with pytest.raises(EngineError, match="inconsistent"):
            state.counts.read()
        state.counters[row, group, expert] -= 1
    state.counts.tokens[2] += 1
    with pytest.raises(EngineError, match="inconsistent"):
        state.counts.read()


@given(st.integers(0, 1000), st.integers(1, MAX_TOKENS), st.integers(1, 4))
@settings(max_examples=50, deadline=None)
def test_counting_equals_a_loop_and_touches_one_layer(seed: int, tokens: int, top_k: int) -> None:
    chance = np.random.default_rng(seed)
    groups = torch.from_numpy(chance.integers(0, GROUPS + 1, MAX_TOKENS).astype(np.int32))
    selected = torch.from_numpy(np.argsort(chance.random((tokens, 6)), axis=1)[:, :top_k].astype(np.int32))
    counters = torch.from_numpy(chance.integers(0, 9, (3, GROUPS + 1, 6)))
    expected = counters.clone()
    for token in range(tokens):
        for expert in selected[token].tolist():
            expected[1, groups[token], expert] += int(groups[token]) > 0
    count_(selected, counters, groups, 1)
    assert torch.equal(counters, expected)


def test_the_rewrite_of_a_step_is_apply_rules_token_by_token_and_leaves_the_others_bit_for_bit() -> None:
    for dtype in [torch.float32, torch.bfloat16, torch.float16]:
        state = make_state((1, 6))
        plan = [
            ("a", some_profile(1, "both")),
            ("plain", None),
            ("b", some_profile(2, "prompt")),
            ("c", some_profile(3, "both")),
        ]
        for name, profile in plan:
            state.admit(name, arguments(profile), 3)
        state.begin_step([BatchRow(name, 1, 4) for name, _ in plan])
        owners = [(profile, position) for _, profile in plan for position in range(1, 5)]
        generator = torch.Generator().manual_seed(0)
        changed = 0
        for row, layer in enumerate((1, 6)):
            logits = (torch.randn(20, SHAPE.num_experts, generator=generator) * 5).to(dtype)
            logits[3, 2] = -0.0
            before = logits.clone()
            assert rewrite_(logits, state.rules, state.token_slots, state.active, row) is None
            for token in range(20):
                profile, position = owners[token] if token < len(owners) else (None, 0)
                rule = torch.tensor(expected_row(profile, (layer,), in_prompt=position < 3)).half()[0]
                expected = apply_rules(before[token : token + 1], rule)[0] if rule.any() else before[token]
                assert torch.equal(logits[token].view(torch.uint8), expected.view(torch.uint8))
                changed += not torch.equal(logits[token], before[token])
        assert 8 <= changed <= 24


def test_a_worker_holds_the_rows_of_its_own_layers() -> None:
    profile = SteeringProfile(frozenset({(0, 0), (6, 5)}), frozenset({(3, 2)}))
    for layers in ((0, 1), (3, 6), (6,), SHAPE.layers):
        state = make_state(layers)
        state.admit("r", arguments(profile), 1)
        state.begin_step([BatchRow("r", 0, 1)])
        assert state.rules[state.token_slots[0]].tolist() == expected_row(profile, layers, in_prompt=True)
        assert state.active.tolist() == [layer != 1 for layer in layers]
