"""The control of forced experts, of biases and of both: as much of each, elsewhere."""

from __future__ import annotations

from collections import Counter

from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.steering.control import random_control
from vllm_steermoe_plugin.steering.profile import SteeringProfile

SHAPE = MoEShape("SomeForCausalLM", (1, 3), num_experts=16, top_k=2)
FORCED = {"activate": frozenset({(1, 4)}), "deactivate": frozenset({(1, 5), (3, 0)})}
BIAS = tuple((layer, expert, 0.25 * (expert - 3)) for layer in (1, 3) for expert in (0, 1, 2, 6))


def by_layer(profile: SteeringProfile) -> dict[int, Counter[float]]:
    found: dict[int, Counter[float]] = {}
    for layer, _, bias in profile.bias:
        found.setdefault(layer, Counter())[bias] += 1
    return found


def test_a_control_has_as_much_of_everything_in_other_places() -> None:
    for profile in (
        SteeringProfile(**FORCED, phase="prompt", weight="own"),
        SteeringProfile(bias=BIAS, phase="generation"),
        SteeringProfile(frozenset({(1, 4)}), frozenset({(3, 7)}), "prompt", "own", BIAS),
    ):
        drawn = [random_control(profile, SHAPE, seed) for seed in range(20)]
        assert drawn[0] == random_control(profile, SHAPE, 0) and len(set(drawn)) > 15
        for one in drawn:
            assert (len(one.activate), len(one.deactivate)) == (len(profile.activate), len(profile.deactivate))
            assert (one.phase, one.weight) == (profile.phase, profile.weight)
            assert by_layer(one) == by_layer(profile)
            assert not {cell[:2] for cell in one.bias} & (one.activate | one.deactivate)


def test_biases_of_a_layer_without_room_are_left_out() -> None:
    profile = SteeringProfile(frozenset({(1, 0)}), bias=tuple((layer, e, 1.0) for layer in (1, 3) for e in range(16)))
    for seed in range(10):
        one = random_control(profile, SHAPE, seed)
        ((layer, _),) = one.activate
        # The first layer has 15 biases to give, for its own expert is forced; the other 16, for 15 experts.
        assert {at: sum(found.values()) for at, found in by_layer(one).items()} == {1: 15, 3: 16 if layer == 1 else 15}
