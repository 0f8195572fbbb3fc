"""Pick experts from a ranking: the step from a ranking to a profile. And its control, experts picked at random."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from expert_registry.errors import ProfileError
from expert_registry.ranking import RankedExpert, Ranking
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.steering.profile import Phase, SteeringProfile, Weight


@dataclass(frozen=True, slots=True)
class Selection:
    """A profile made from a ranking, and what did not fit into it."""

    profile: SteeringProfile
    dropped: tuple[RankedExpert, ...]
    """Experts among the first `activate` whose layer already had K activated ones."""


def select_experts(
    ranking: Ranking,
    *,
    activate: int,
    deactivate: int,
    reverse: bool = False,
    phase: Phase = "both",
    weight: Weight = "top",
) -> Selection:
    """Activate the top experts of the positive side and deactivate the top experts of the negative side.

    Args:
        ranking: of the model to be steered.
        activate: n+, how many of the experts with positive risk difference to activate. In each
            layer only the first K are; the others are reported in `dropped`.
        deactivate: n-, how many of those with negative risk difference to deactivate.
        reverse: negate the risk differences first, to steer away from the behaviour.
        phase: the tokens to steer.
        weight: of the profile.

    Raises:
        ProfileError: the ranking has fewer experts on a side than were asked for, or n+ = n- = 0.

    Source: arXiv 2509.09660, expert selection and algorithm 2.
    """
    sign = -1.0 if reverse else 1.0
    ranked = ranking.experts()
    first = _first([e for e in ranked if sign * e.risk_difference > 0], activate, "activate")
    last = _first([e for e in ranked if sign * e.risk_difference < 0], deactivate, "deactivate")
    per_layer: Counter[int] = Counter()
    kept: set[tuple[int, int]] = set()
    dropped: list[RankedExpert] = []
    for entry in first:
        if per_layer[entry.layer] == ranking.card.top_k:
            dropped.append(entry)
        else:
            per_layer[entry.layer] += 1
            kept.add((entry.layer, entry.expert))
    profile = SteeringProfile(frozenset(kept), frozenset((e.layer, e.expert) for e in last), phase, weight)
    return Selection(profile, tuple(dropped))


def _first(candidates: Sequence[RankedExpert], count: int, verb: str) -> Sequence[RankedExpert]:
    if not 0 <= count <= len(candidates):
        raise ProfileError(f"{verb}: {count} experts asked for, but the ranking has {len(candidates)} on that side")
    return candidates[:count]


def random_experts(shape: MoEShape, *, activate: int, deactivate: int, seed: int) -> SteeringProfile:
    """As many experts drawn at random: the control without which a steering effect means little.

    Uniform over all `(layer, expert)` of the model, but for what a layer allows (at most K
    activated and E - K deactivated) and that no expert goes both ways.

    Raises:
        ProfileError: the model has not that many.
    """
    if activate < 0 or deactivate < 0:
        raise ProfileError(f"numbers of experts cannot be negative, got {activate} and {deactivate}")
    cells = [(layer, expert) for layer in shape.layers for expert in range(shape.num_experts)]
    random.Random(seed).shuffle(cells)
    chosen: dict[str, set[tuple[int, int]]] = {}
    for verb, number, limit in (
        ("activate", activate, shape.top_k),
        ("deactivate", deactivate, shape.num_experts - shape.top_k),
    ):
        room = dict.fromkeys(shape.layers, limit)
        taken: set[tuple[int, int]] = set()
        for cell in cells:
            if len(taken) < number and room[cell[0]]:
                room[cell[0]] -= 1
                taken.add(cell)
        if len(taken) < number:
            raise ProfileError(f"{verb}: {number} random experts asked for, but {shape} allows {len(taken)}")
        cells = [cell for cell in cells if cell not in taken]
        chosen[verb] = taken
    return SteeringProfile(frozenset(chosen["activate"]), frozenset(chosen["deactivate"]))
