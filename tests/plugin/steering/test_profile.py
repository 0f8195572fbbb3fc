"""Steering profiles: algebra of merging, canonical JSON, and hostile JSON."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_registry.errors import ProfileError, RequestError, SteerMoEError
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.steering.profile import MAX_TEXT, PHASES, Phase, SteeringProfile

Experts = frozenset[tuple[int, int]]
CELLS = [(layer, expert) for layer in (0, 1, 3, 10) for expert in (0, 2, 7, 11)]


@st.composite
def profiles(draw: st.DrawFn, phase: Phase | None = None) -> SteeringProfile:
    """Any profile over CELLS."""
    rules = draw(st.dictionaries(st.sampled_from(CELLS), st.sampled_from([1, -1]), min_size=1))
    activate = frozenset(cell for cell, rule in rules.items() if rule == 1)
    # Multiples of 1/8: float16 holds them, and their sums.
    eighths = draw(st.dictionaries(st.sampled_from(CELLS), st.integers(-20, 20), max_size=4))
    return SteeringProfile(
        activate,
        frozenset(rules) - activate,
        phase or draw(st.sampled_from(PHASES)),
        bias=tuple((layer, expert, number / 8) for (layer, expert), number in eighths.items()),
    )


def merged(*parts: SteeringProfile) -> SteeringProfile | None:
    """Their merge, or None where it is refused."""
    try:
        return SteeringProfile.merge(parts)
    except ProfileError:
        return None


@given(profiles("both"), profiles("both"), profiles("both"))
@settings(max_examples=60, deadline=None)
def test_merging_is_commutative_and_associative_and_of_what_is_forced_idempotent(
    a: SteeringProfile, b: SteeringProfile, c: SteeringProfile
) -> None:
    assert SteeringProfile.merge([a]) == a == SteeringProfile.merge([a, replace(a, bias=())])
    twice = SteeringProfile.merge([a, a])
    assert twice == replace(a, bias=tuple((layer, expert, 2 * bias) for layer, expert, bias in a.bias))
    assert merged(a, b) == merged(b, a)
    ab, bc = merged(a, b), merged(b, c)
    if ab is not None and bc is not None:
        # A bias that a forced expert has taken the place of is gone, so all three must be there.
        assert merged(ab, c) == merged(a, bc) == merged(a, b, c)


@given(profiles("both"), profiles("both"))
@settings(max_examples=60, deadline=None)
def test_biases_add_up_and_a_forced_expert_has_none(a: SteeringProfile, b: SteeringProfile) -> None:
    union = merged(a, b)
    if union is None:
        return
    sums: dict[tuple[int, int], float] = {}
    for layer, expert, bias in a.bias + b.bias:
        sums[layer, expert] = sums.get((layer, expert), 0) + bias
    free = {cell: bias for cell, bias in sums.items() if bias and cell not in union.activate | union.deactivate}
    assert {(layer, expert): bias for layer, expert, bias in union.bias} == free


def test_biases_are_as_the_device_holds_them() -> None:
    one, same = SteeringProfile(bias=((3, 5, 0.7),)), SteeringProfile(bias=((3, 5, 0.70001), (2, 2, 1e-9)))
    assert one == same and one.digest == same.digest
    assert one.to_json() == '{"activate":{},"deactivate":{},"bias":{"3":{"5":0.7}}}'
    assert SteeringProfile.from_json(one.to_json()).to_json() == one.to_json()
    assert not SteeringProfile(bias=((3, 5, 0.0),)) and not SteeringProfile(bias=((3, 5, 1.0), (3, 5, -1.0)))
    for bias in (16.5, -17, float("nan"), float("inf")):
        with pytest.raises(ProfileError, match=r"layer 3, expert 5.*from -16 to 16"):
            SteeringProfile(bias=((3, 5, bias),))
    with pytest.raises(ProfileError, match="18 for layer 3"):
        SteeringProfile.merge([SteeringProfile(bias=((3, 5, 9.0),))] * 2)


@given(profiles("both"), profiles("both"))
@settings(max_examples=60, deadline=None)
def test_a_merge_is_refused_exactly_when_an_expert_would_go_both_ways(a: SteeringProfile, b: SteeringProfile) -> None:
    conflict = a.activate & b.deactivate | a.deactivate & b.activate
    union = merged(a, b)
    assert (union is None) == bool(conflict)
    if union is not None:
        assert union.activate == a.activate | b.activate and union.deactivate == a.deactivate | b.deactivate


@given(profiles(), profiles())
@settings(max_examples=100, deadline=None)
def test_texts_and_digests_are_equal_iff_the_sets_are(a: SteeringProfile, b: SteeringProfile) -> None:
    same = (a.activate, a.deactivate, a.phase, a.bias) == (b.activate, b.deactivate, b.phase, b.bias)
    assert (a == b) == same
    assert (a.to_json() == b.to_json()) == same
    assert (a.digest == b.digest) == same
    assert len(a.digest) == 64 and int(a.digest, 16) >= 0


@given(profiles(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_json_makes_the_round_trip_in_any_order_and_spacing(profile: SteeringProfile, chance: random.Random) -> None:
    text = profile.to_json()
    assert SteeringProfile.from_json(text) == profile
    assert SteeringProfile.from_json(text).to_json() == text
    value = json.loads(text)
    for verb in ("activate", "deactivate"):
        layers = [(layer, chance.sample(experts, len(experts)) * 2) for layer, experts in value[verb].items()]
        chance.shuffle(layers)
        value[verb] = dict(layers)
    keys = list(value.items())
    chance.shuffle(keys)
    assert SteeringProfile.from_json(json.dumps(dict(keys), indent=3)).to_json() == text


def test_the_canonical_text_counts_layers_as_numbers_and_leaves_the_usual_phase_out() -> None:
    profile = SteeringProfile(frozenset({(10, 1), (9, 12), (9, 2)}), frozenset({(0, 0)}))
    assert profile.to_json() == '{"activate":{"9":[2,12],"10":[1]},"deactivate":{"0":[0]}}'
    prompt = SteeringProfile(frozenset({(1, 1)}), phase="prompt")
    assert prompt.to_json() == '{"activate":{"1":[1]},"deactivate":{},"phase":"prompt"}'


def test_every_expert_of_a_large_model_fits_into_the_text() -> None:
    cells = frozenset((layer, expert) for layer in range(128) for expert in range(512))
    assert len(SteeringProfile(cells).to_json()) <= MAX_TEXT
    assert SteeringProfile.from_json(SteeringProfile(cells).to_json()).activate == cells


def test_a_profile_that_contradicts_itself_or_is_empty_is_refused() -> None:
    with pytest.raises(ProfileError, match="layer 3, expert 5"):
        SteeringProfile(frozenset({(3, 5), (0, 1)}), frozenset({(3, 5)}))
    with pytest.raises(ProfileError, match="layer 3, expert 5"):
        SteeringProfile.from_json('{"activate": {"3": [5]}, "deactivate": {"3": [5]}}')
    for text in ("{}", '{"activate": {}}', '{"activate": {"3": []}, "deactivate": {}}', '{"phase": "prompt"}'):
        with pytest.raises(ProfileError, match="no expert"):
            SteeringProfile.from_json(text)


def test_phases_do_not_mix() -> None:
    parts = [SteeringProfile(frozenset({(0, i)}), phase=phase) for i, phase in enumerate(PHASES[:2])]
    with pytest.raises(ProfileError, match="phase"):
        SteeringProfile.merge(parts)


def test_merging_nothing_is_an_error_of_ours() -> None:
    with pytest.raises(ProfileError):
        SteeringProfile.merge([])


def test_hostile_json_is_refused_by_name() -> None:
    def layer(name: str) -> str:
        return f'{{"activate": {{"{name}": [5]}}}}'

    def experts(value: str) -> str:
        return f'{{"activate": {{"3": {value}}}}}'

    rows = [
        *((text, "not JSON") for text in ("", "{", "[" * 100_000, '{"activate":' * 50_000)),
        *(("[]", "list"), ("null", "NoneType"), ("3", "int")),
        ('{"activat": {"3": [5]}}', "'activat'"),
        *(('{"activate": [3, 5]}', "'activate'"), ('{"activate": null}', "'activate'")),
        ('{"deactivate": "3"}', "'deactivate'"),
        *((experts(value), "layer 3") for value in ("5", '{"5": 1}', "[[5]]")),
        *((experts("[true]"), "True"), (experts("[5.0]"), "5.0"), (experts('["5"]'), "'5'"), (experts("[-1]"), "-1")),
        *((experts("[null]"), "None"), (experts("[NaN]"), "nan"), (experts("[65536]"), "65536")),
        *((layer(name), f"'{name}'") for name in ("-1", "03", "3.0", " 3")),
        *((layer(name), "layer index") for name in ("3\\n", "٣", "", "123456")),
        ('{"activate": {"3": [5]}, "phase": "all"}', "'all'"),
        *(('{"bias": [1]}', "'bias' must map"), ('{"bias": {"3": [5]}}', "layer 3"), ('{"bias": {"03": {}}}', "'03'")),
        *((f'{{"bias": {{"3": {{"{e}": 1}}}}}}', "expert's index") for e in ("05", "-1", "5.0", "", "٣", "123456")),
        *((f'{{"bias": {{"3": {{"5": {x}}}}}}}', "not a number") for x in ("true", "null", '"0.5"', "[1]", "{}")),
        ('{"bias": {"3": {"5": 1, "5": 1}}}', "twice"),
        *((f'{{"activate": {{"3": [5]}}, "phase": {value}}}', "phase") for value in ("null", '["both"]')),
        ('{"activate": {"3": [5]}, "activate": {"4": [5]}}', "twice"),
        *((f'{{"activate": {{"3": [5], "{again}": [6]}}}}', "twice") for again in ("3", "\\u0033")),
        ('{"phase": "both", "phase": "prompt", "activate": {"3": [5]}}', "twice"),
        # A number of thousands of digits is refused like any other.
        *((text, "") for text in (experts("[" + "9" * 5000 + "]"), '{"phase": ' + "9" * 5000 + "}")),
    ]
    assert not_refused(SteeringProfile.from_json, rows, RequestError) == []


def test_a_text_beyond_the_limit_is_not_even_parsed() -> None:
    with pytest.raises(RequestError, match=str(MAX_TEXT)):
        SteeringProfile.from_json('{"activate": {"3": [5]}}' + " " * MAX_TEXT)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-2, 1 << 70) | st.floats() | st.sampled_from(["both", "3", "activate"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["activate", "deactivate", "phase", "3", "x"]), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
@settings(max_examples=150, deadline=None)
def test_any_json_value_is_a_profile_or_an_error_of_ours(value: object) -> None:
    try:
        profile = SteeringProfile.from_json(json.dumps(value))
    except SteerMoEError:
        return
    assert SteeringProfile.from_json(profile.to_json()) == profile
