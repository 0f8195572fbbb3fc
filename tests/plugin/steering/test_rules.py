"""Compiling a profile for a model: a slow loop, and each limit to the expert."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_registry import MoEShape
from expert_registry.errors import ProfileError
from vllm_steermoe_plugin.steering.profile import PHASES, SteeringProfile
from vllm_steermoe_plugin.steering.rule_values import ACTIVATE, DEACTIVATE
from vllm_steermoe_plugin.steering.rules import compile_rules

GAPS = MoEShape("Qwen3MoeForCausalLM", (1, 2, 5, 11), 6, 2)


def fits(activate: set[tuple[int, int]], deactivate: set[tuple[int, int]], shape: MoEShape) -> bool:
    """The rule of the design, said slowly."""
    for layer in {layer for layer, _ in activate | deactivate}:
        if layer not in shape.layers:
            return False
        up = [e for at, e in activate if at == layer]
        down = [e for at, e in deactivate if at == layer]
        if len(up) > shape.top_k or len(down) > shape.num_experts - shape.top_k:
            return False
        if not all(0 <= e < shape.num_experts for e in up + down):
            return False
    return True


@st.composite
def cases(draw: st.DrawFn) -> tuple[SteeringProfile, MoEShape]:
    experts = draw(st.integers(1, 6))
    layers = draw(st.sets(st.integers(0, 8), min_size=1, max_size=4))
    shape = MoEShape("OlmoeForCausalLM", tuple(sorted(layers)), experts, draw(st.integers(1, experts)))
    # Mostly inside the model, sometimes one layer or one expert beyond it.
    layer = st.sampled_from(shape.layers) | st.integers(0, 9)
    expert = st.integers(0, experts - 1) | st.integers(0, experts)
    rules = draw(st.dictionaries(st.tuples(layer, expert), st.sampled_from([1, -1]), min_size=1, max_size=6))
    activate = frozenset(cell for cell, rule in rules.items() if rule == 1)
    return SteeringProfile(activate, frozenset(rules) - activate, draw(st.sampled_from(PHASES))), shape


@given(cases())
@settings(max_examples=150, deadline=None)
def test_equals_the_slow_loop_or_is_refused_as_it_says(case: tuple[SteeringProfile, MoEShape]) -> None:
    profile, shape = case
    try:
        table = compile_rules(profile, shape)
    except ProfileError:
        assert not fits(set(profile.activate), set(profile.deactivate), shape)
        return
    assert fits(set(profile.activate), set(profile.deactivate), shape)
    assert table.rules.dtype.name == "float16" and table.rules.shape == (len(shape.layers), shape.num_experts)
    for row, layer in enumerate(shape.layers):
        for expert in range(shape.num_experts):
            cell = (layer, expert)
            wanted = ACTIVATE if cell in profile.activate else DEACTIVATE if cell in profile.deactivate else 0
            assert table.rules[row, expert] == wanted
    assert (table.digest, table.phase) == (profile.digest, profile.phase)


def test_rows_are_the_layers_that_route_not_the_layers_of_the_model() -> None:
    rules = compile_rules(SteeringProfile(frozenset({(11, 0)}), frozenset({(2, 5)})), GAPS).rules
    assert rules.tolist() == [[0] * 6, [0, 0, 0, 0, 0, DEACTIVATE], [0] * 6, [ACTIVATE, 0, 0, 0, 0, 0]]


def test_the_limits_themselves_are_allowed() -> None:
    profile = SteeringProfile(frozenset({(1, 0), (1, 1)}), frozenset({(1, 2), (1, 3), (1, 4), (1, 5)}))
    assert compile_rules(profile, GAPS).rules[0].tolist() == [ACTIVATE] * 2 + [DEACTIVATE] * 4


def test_what_does_not_fit_the_model_is_refused_by_name() -> None:
    for activate, deactivate, names in [
        ({(0, 0)}, set(), r"activate: layer 0 has no routed experts.*Qwen3"),
        ({(3, 0)}, set(), r"activate: layer 3 has no routed experts"),
        (set(), {(12, 0)}, r"deactivate: layer 12 has no routed experts"),
        ({(1, 6)}, set(), r"activate: layer 1 has no expert 6"),
        (set(), {(1, 65535)}, r"deactivate: layer 1 has no expert 65535"),
        ({(2, 0), (2, 1), (2, 2), (5, 0)}, set(), r"activate: 3 experts in layer 2, but at most 2"),
        (set(), {(5, e) for e in range(5)}, r"deactivate: 5 experts in layer 5, but at most 4.*2 of 6"),
    ]:
        with pytest.raises(ProfileError, match=names):
            compile_rules(SteeringProfile(frozenset(activate), frozenset(deactivate)), GAPS)


def test_a_negative_expert_of_a_profile_made_in_python_does_not_count_from_the_end() -> None:
    for expert in [-1, -6, -7]:
        with pytest.raises(ProfileError, match=str(expert)):
            compile_rules(SteeringProfile(frozenset({(1, expert)})), GAPS)


def test_where_every_expert_is_selected_none_can_be_deactivated() -> None:
    shape = MoEShape("MixtralForCausalLM", (0,), 2, 2)
    assert compile_rules(SteeringProfile(frozenset({(0, 0), (0, 1)})), shape).rules.tolist() == [[ACTIVATE] * 2]
    with pytest.raises(ProfileError, match="at most 0"):
        compile_rules(SteeringProfile(deactivate=frozenset({(0, 0)})), shape)
