"""From a ranking to a profile: a slow loop over fractions, the two directions, and the limit of a layer."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from expert_registry import Ranking, RoutingCounts
from expert_registry.errors import ProfileError
from tests.support.made_rankings import make_ranking
from vllm_steermoe_plugin.steering.selection import Selection, select_experts

Cell = tuple[int, int]


def differences(ranking: Ranking) -> dict[Cell, Fraction]:
    """Risk difference of each expert, exactly."""
    counts = ranking.counts
    n1, n2 = (int(n) for n in counts.tokens)
    return {
        (int(layer), expert): Fraction(int(counts.activations_1[row, expert]), n1)
        - Fraction(int(counts.activations_2[row, expert]), n2)
        for row, layer in enumerate(counts.layers)
        for expert in range(counts.activations_1.shape[1])
    }


def slow_order(ranking: Ranking) -> list[Cell]:
    exact = differences(ranking)
    return sorted(exact, key=lambda cell: (-abs(exact[cell]), cell))


def slow_selection(ranking: Ranking, activate: int, deactivate: int) -> tuple[set[Cell], set[Cell], list[Cell]]:
    """Activated, deactivated and dropped, by algorithm 2 said slowly."""
    exact = differences(ranking)
    wanted = [cell for cell in slow_order(ranking) if exact[cell] > 0][:activate]
    unwanted = [cell for cell in slow_order(ranking) if exact[cell] < 0][:deactivate]
    kept: list[Cell] = []
    for cell in wanted:
        if sum(layer == cell[0] for layer, _ in kept) < ranking.card.top_k:
            kept.append(cell)
    return set(kept), set(unwanted), [cell for cell in wanted if cell not in kept]


def swapped(ranking: Ranking) -> Ranking:
    """The same data with its two sides exchanged."""
    c = ranking.counts
    return Ranking(RoutingCounts(c.activations_2, c.activations_1, c.tokens[::-1].copy(), c.layers), ranking.card)


def cells(selection: Selection) -> tuple[set[Cell], set[Cell], list[Cell]]:
    dropped = [(e.layer, e.expert) for e in selection.dropped]
    return set(selection.profile.activate), set(selection.profile.deactivate), dropped


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    """Few tokens, so that ties are common."""
    experts = draw(st.integers(2, 6))
    return make_ranking(
        draw(st.integers(0, 10_000)),
        layers=draw(st.sampled_from([(0,), (0, 1, 2), (1, 4, 9)])),
        experts=experts,
        top_k=draw(st.integers(1, experts - 1)),
        tokens=draw(st.sampled_from([(3, 3), (3, 7), (40, 50), (6, 4)])),
    )


def sides(ranking: Ranking) -> tuple[int, int]:
    values = differences(ranking).values()
    return sum(v > 0 for v in values), sum(v < 0 for v in values)


@given(rankings(), st.data())
@settings(max_examples=80, deadline=None)
def test_equals_the_slow_loop(ranking: Ranking, data: st.DataObject) -> None:
    assert [(e.layer, e.expert) for e in ranking.experts()] == slow_order(ranking)
    positive, negative = sides(ranking)
    activate, deactivate = data.draw(st.integers(0, positive)), data.draw(st.integers(0, negative))
    assume(activate + deactivate)
    selection = select_experts(ranking, activate=activate, deactivate=deactivate)
    assert cells(selection) == slow_selection(ranking, activate, deactivate)
    kept = len(selection.profile.activate)
    assert kept + len(selection.dropped) == activate and len(selection.profile.deactivate) == deactivate


@given(rankings(), st.data())
@settings(max_examples=80, deadline=None)
def test_reverse_is_forward_of_the_swapped_sides(ranking: Ranking, data: st.DataObject) -> None:
    positive, negative = sides(ranking)
    activate, deactivate = data.draw(st.integers(0, negative)), data.draw(st.integers(0, positive))
    assume(activate + deactivate)
    reverse = select_experts(ranking, activate=activate, deactivate=deactivate, reverse=True)
    forward = select_experts(swapped(ranking), activate=activate, deactivate=deactivate)
    assert cells(reverse) == cells(forward)
    assert reverse.profile == forward.profile


@given(rankings())
@settings(max_examples=40, deadline=None)
def test_asking_for_more_only_adds(ranking: Ranking) -> None:
    positive, _ = sides(ranking)
    before: frozenset[Cell] = frozenset()
    for number in range(1, positive + 1):
        after = select_experts(ranking, activate=number, deactivate=0).profile.activate
        assert before <= after
        before = after


def exact_ranking(first: list[list[int]], second: list[list[int]], tokens: tuple[int, int], top_k: int) -> Ranking:
    made = make_ranking(layers=tuple(range(len(first))), experts=len(first[0]), top_k=top_k)
    counts = RoutingCounts(np.array(first), np.array(second), np.array(tokens), np.arange(len(first), dtype=np.int64))
    counts.check(made.shape)
    return Ranking(counts, made.card)


def test_a_layer_takes_only_k_and_the_rest_is_reported_not_replaced() -> None:
    # Layer 0 holds the three largest differences, layer 1 the fourth; K is 2.
    ranking = exact_ranking(
        [[9, 8, 7, 0, 0, 0], [6, 6, 4, 4, 2, 2]], [[0, 0, 0, 4, 10, 10], [0, 8, 8, 4, 2, 2]], (12, 12), 2
    )
    selection = select_experts(ranking, activate=4, deactivate=0)
    assert selection.profile.activate == {(0, 0), (0, 1), (1, 0)}
    assert [(e.layer, e.expert) for e in selection.dropped] == [(0, 2)]
    assert selection.dropped[0].risk_difference == pytest.approx(7 / 12)


def test_ties_go_to_the_lower_layer_then_the_lower_expert() -> None:
    rows = [[4, 4, 0, 0], [4, 4, 0, 0]]
    ranking = exact_ranking(rows, [row[::-1] for row in rows], (4, 4), 2)
    assert [(e.layer, e.expert) for e in ranking.experts()] == [(row, e) for row in (0, 1) for e in range(4)]
    assert select_experts(ranking, activate=3, deactivate=1).profile.activate == {(0, 0), (0, 1), (1, 0)}
    assert select_experts(ranking, activate=3, deactivate=1).profile.deactivate == {(0, 2)}


def test_equal_fractions_of_unlike_counts_tie() -> None:
    # 1/10 - 2/10, 2/10 - 3/10 and 3/10 - 4/10 are one number, but three floating-point numbers.
    ranking = exact_ranking([[1, 2, 3, 4]], [[2, 3, 4, 1]], (10, 10), 1)
    assert len({e.risk_difference for e in ranking.experts()[1:]}) > 1
    assert [e.expert for e in ranking.experts()] == [3, 0, 1, 2]


def test_an_expert_without_a_difference_is_on_no_side() -> None:
    ranking = exact_ranking([[5, 3, 2]], [[3, 5, 2]], (10, 10), 1)
    assert select_experts(ranking, activate=1, deactivate=1).profile.activate == {(0, 0)}
    for verb in ("activate", "deactivate"):
        with pytest.raises(ProfileError, match=f"{verb}: 2 experts asked for, but the ranking has 1"):
            select_experts(ranking, **{"activate": 0, "deactivate": 0} | {verb: 2})


def test_more_than_there_are_and_less_than_none_are_refused() -> None:
    for number in [-1, 19]:
        with pytest.raises(ProfileError, match=f"activate: {number} experts"):
            select_experts(make_ranking(), activate=number, deactivate=0)
        with pytest.raises(ProfileError, match=f"deactivate: {number} experts"):
            select_experts(make_ranking(), activate=0, deactivate=number, reverse=True)


def test_selecting_nothing_is_refused() -> None:
    with pytest.raises(ProfileError, match="no expert"):
        select_experts(make_ranking(), activate=0, deactivate=0)


def test_the_phase_is_handed_on() -> None:
    assert select_experts(make_ranking(), activate=1, deactivate=0, phase="prompt").profile.phase == "prompt"
