"""Statistics of a ranking, against loops over examples and against simulation."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_registry import (
    DataRef,
    ExampleSums,
    ModelRef,
    Ranking,
    RankingCard,
    Recommended,
    RoutingCounts,
    read_ranking,
    write_ranking,
)
from expert_registry import statistics as stats
from expert_registry.clusters import OPTIONAL_AXES, SUMMARY_AXES, ClusterSummary
from expert_registry.errors import RankingFormatError

LAYERS, EXPERTS, TOP_K = (1, 4), 5, 2


def routed(seed: int, examples: int, effect: float = 0.0, sizes: tuple[int, int] = (1, 9)) -> tuple[Any, Any]:
    """Selections `[n, 2, L, E]` and tokens `[n, 2]` whose tokens are alike within an example.

    With an `effect`, expert 0 of the first layer is preferred on side 1.
    """
    chance = np.random.default_rng(seed)
    tokens = chance.integers(*sizes, (examples, 2))
    selections = np.zeros((examples, 2, len(LAYERS), EXPERTS), dtype=np.int64)
    for i in range(examples):
        taste = chance.normal(0, 1, (len(LAYERS), EXPERTS))
        for side in range(2):
            mine = taste.copy()
            mine[0, 0] += effect if side == 0 else 0
            for _ in range(tokens[i, side]):
                for layer in range(len(LAYERS)):
                    scores = mine[layer] + chance.normal(0, 0.7, EXPERTS)
                    selections[i, side, layer, np.argsort(scores)[-TOP_K:]] += 1
    return selections, tokens


def summed(selections: Any, tokens: Any, permutations: int = 0, seed: int = 0) -> tuple[RoutingCounts, ClusterSummary]:
    sums = ExampleSums(len(LAYERS), EXPERTS, permutations=permutations, seed=seed)
    sums.add(range(len(tokens)), selections, tokens)
    return sums.counts(LAYERS), sums.summary()


def summed_as(layers: int, experts: int, selections: Any, tokens: Any) -> tuple[RoutingCounts, ClusterSummary]:
    sums = ExampleSums(layers, experts)
    sums.add(range(len(tokens)), selections, tokens)
    return sums.counts(tuple(range(layers))), sums.summary()


def ranking_of(counts: RoutingCounts, clusters: ClusterSummary | None) -> Ranking:
    card = RankingCard(
        model=ModelRef(id="some/model", architecture="OlmoeForCausalLM"),
        num_experts=EXPERTS,
        top_k=TOP_K,
        behaviour="testing",
        version=1,
        sides=("a", "b"),
        data=DataRef(name="made"),
        span="all",
        recommended=Recommended(activate=1, deactivate=1),
        created="2026-01-01",
        license="Apache-2.0",
    )
    return Ranking(counts, card, clusters)


@given(st.integers(0, 10_000), st.integers(2, 7))
@settings(max_examples=30, deadline=None)
def test_standard_errors_equal_a_loop_over_examples(seed: int, examples: int) -> None:
    selections, tokens = routed(seed, examples)
    counts, clusters = summed(selections, tokens)
    found = stats.standard_errors(counts, clusters)
    n1, n2 = (int(x) for x in tokens.sum(axis=0))
    for layer in range(len(LAYERS)):
        for expert in range(EXPERTS):
            a1, a2 = (int(selections[:, side, layer, expert].sum()) for side in range(2))
            squares = Fraction(0)
            for i in range(examples):
                u1 = Fraction(int(selections[i, 0, layer, expert])) - Fraction(a1, n1) * int(tokens[i, 0])
                u2 = Fraction(int(selections[i, 1, layer, expert])) - Fraction(a2, n2) * int(tokens[i, 1])
                squares += (u1 / n1 - u2 / n2) ** 2
            expected = math.sqrt(squares * Fraction(examples, examples - 1))
            assert found[layer, expert] == pytest.approx(expected, rel=1e-12, abs=0)


def test_intervals_hold_what_they_promise() -> None:
    """95 % intervals cover the difference of a large population in about 95 % of samples drawn from it."""
    selections, tokens = routed(1, 4000, effect=0.8)
    counts, _ = summed(selections, tokens)
    truth = counts.risk_difference()
    chance = np.random.default_rng(2)
    inside, naive = [], []
    for _ in range(150):
        some = chance.choice(len(tokens), 80)
        mine, clusters = summed(selections[some], tokens[some])
        low, high = stats.intervals(mine, clusters)
        inside.append((low <= truth) & (truth <= high))
        p = np.stack([mine.activations_1 / mine.tokens[0], mine.activations_2 / mine.tokens[1]])
        narrow = 1.96 * np.sqrt((p * (1 - p) / mine.tokens[:, None, None]).sum(axis=0))
        naive.append(np.abs(mine.risk_difference() - truth) <= narrow)
    assert 0.92 < np.mean(inside) < 0.98
    assert abs(np.mean(naive) - 0.95) > 0.02, "taking tokens as independent must not do as well here"


def test_large_counts_that_nearly_cancel_keep_their_standard_errors() -> None:
    """Two thirds of millions of tokens, give or take one: in float64 little of that is left."""
    tokens = np.full((40, 2), 30_000_000)
    selections = np.zeros((40, 2, 1, 3), dtype=np.int64)
    selections[:, :, 0] = 20_000_000
    moved = np.random.default_rng(0).integers(-1, 2, (40, 2))
    selections[:, :, 0, 0] += moved
    selections[:, :, 0, 1] -= moved
    change = (moved[:, 0] - moved[:, 1]) / 3e7
    expected = change.std(ddof=1) / math.sqrt(40)
    found = stats.standard_errors(*summed_as(1, 3, selections, tokens))[0]
    np.testing.assert_allclose(found, [expected, expected, 0], rtol=1e-6, atol=0)


def test_few_examples_raise_no_more_false_alarms_than_they_say() -> None:
    examples = 6
    alarms, normal = [], []
    for seed in range(300):
        counts, clusters = summed(*routed(1000 * examples + seed, examples, sizes=(3, 12)))
        p = stats.p_values(counts, clusters)
        low, high = stats.intervals(counts, clusters)
        np.testing.assert_array_equal(p < 0.05, (low > 0) | (high < 0))
        alarms.append(p < 0.05)
        normal.append(np.abs(counts.risk_difference()) > 1.96 * stats.standard_errors(counts, clusters))
    # Without an effect, 5 % are expected; 3000 experts, ten of which share their examples.
    assert 0.02 < np.mean(alarms) < 0.08 < np.mean(normal)


def test_tokens_that_are_independent_have_a_design_effect_of_one() -> None:
    selections, tokens = routed(3, 3000, sizes=(1, 2))
    # One token per side, and the sides of different examples together: nothing is left that is alike.
    selections[:, 1] = selections[np.random.default_rng(0).permutation(3000), 1]
    counts, clusters = summed(selections, tokens)
    assert np.allclose(stats.design_effects(counts, clusters), 1, atol=0.12)
    effective = stats.effective_tokens(counts, clusters)
    assert np.allclose(effective, 6000, rtol=0.15) and effective.max() <= 6000


def test_the_design_effect_equals_a_loop_and_the_sides_together_are_no_tokens_more() -> None:
    """Two sides that are alike have narrow intervals, which is not as if there were more tokens."""
    selections, tokens = routed(17, 40)
    selections[:, 1], tokens[:, 1] = selections[:, 0], tokens[:, 0]
    counts, clusters = summed(selections, tokens)
    n1, n2 = tokens.sum(axis=0).tolist()
    p = counts.activations_1 / n1
    residuals = selections[:, 0] - p * tokens[:, :1, None]
    clustered = 2 * 40 / 39 * (residuals**2).sum(axis=0) / n1**2
    found = stats.design_effects(counts, clusters)
    np.testing.assert_allclose(found, clustered / (2 * p * (1 - p) / n1))
    assert not stats.standard_errors(counts, clusters).any() and found.min() > 1.2
    np.testing.assert_allclose(stats.effective_tokens(counts, clusters), (n1 + n2) / found)


def test_no_number_of_effective_tokens_is_above_that_of_the_tokens() -> None:
    """One token of each text selects the expert: more even than chance, but no more tokens than there are."""
    tokens = np.full((40, 2), 4)
    selections = np.zeros((40, 2, 1, 3), dtype=np.int64)
    selections[..., 0] = 1
    selections[..., 1] = 3
    selections[:20, :, :, 0] += 1
    selections[:20, :, :, 1] -= 1
    counts, clusters = summed_as(1, 3, selections, tokens)
    assert (stats.design_effects(counts, clusters)[0, :2] < 0.5).all()
    assert stats.effective_tokens(counts, clusters)[0, :2].tolist() == [320, 320]


def test_examples_repeated_widen_nothing_that_clusters_know_of() -> None:
    """Each token of an example said ten times is no new evidence."""
    selections, tokens = routed(4, 50)
    one = summed(selections, tokens)
    ten = summed(selections * 10, tokens * 10)
    np.testing.assert_allclose(stats.standard_errors(*one), stats.standard_errors(*ten))
    assert np.all(stats.design_effects(*ten) > 5 * stats.design_effects(*one))


def test_clusters_equal_their_pairs_added_up_beforehand() -> None:
    """The sums of pairs in clusters, in whatever chunks and after whatever kills, are those of one pair per cluster."""
    selections, tokens = routed(21, 37)
    chance = np.random.default_rng(22)
    # Of 1 to 9 pairs, numbered by their first; a chunk may lie within one.
    starts = np.concatenate(([0], np.flatnonzero(chance.random(36) < 0.25) + 1))
    numbers = [int(starts[starts <= place].max()) for place in range(37)]
    naive = ExampleSums(2, EXPERTS, permutations=50, seed=7)
    for start in starts.tolist():
        mine = [place for place in range(37) if numbers[place] == start]
        naive.add([start], selections[mine].sum(axis=0, keepdims=True), tokens[mine].sum(axis=0, keepdims=True))
    given = selections.copy(), tokens.copy()
    for size in (1, 2, 5, 37):
        sums = ExampleSums(2, EXPERTS, permutations=50, seed=7)
        for at in range(0, 37, size):
            part = slice(at, at + size)
            sums.add(numbers[part], selections[part], tokens[part])
            resumed = ExampleSums(2, EXPERTS, permutations=50, seed=7)
            resumed.restore({name: tensor.copy() for name, tensor in sums.tensors().items()})
            sums = resumed
            # In the middle of a cluster, too, all that was added is there.
            assert sums.pairs == min(at + size, 37) and sums.examples == len(set(numbers[: at + size]))
            counts = sums.counts(LAYERS)
            sums.summary().check(counts, ranking_of(counts, None).shape)
        assert naive.pairs == naive.examples == sums.examples == len(starts) < sums.pairs == 37
        for name, tensor in (naive.tensors() | naive.summary().tensors()).items():
            if name != "pairs":
                np.testing.assert_array_equal(tensor, (sums.tensors() | sums.summary().tensors())[name], err_msg=name)
    np.testing.assert_array_equal(given[0], selections, err_msg="what was handed over is the caller's")
    np.testing.assert_array_equal(given[1], tokens)
    with pytest.raises(RankingFormatError, match="swapped"):
        naive.restore(ExampleSums(2, EXPERTS, permutations=49).tensors())


def test_a_cluster_that_is_torn_apart_is_refused() -> None:
    selections, tokens = routed(5, 3)
    sums = ExampleSums(2, EXPERTS)
    with pytest.raises(ValueError, match="must not descend"):
        sums.add([0, 1, 0], selections, tokens)
    assert not sums.pairs
    sums.add([0, 1, 1], selections, tokens)
    with pytest.raises(ValueError, match="must not descend"):
        sums.add([0], selections[:1], tokens[:1])


def test_pairs_that_share_a_document_are_no_independent_evidence() -> None:
    """Ten documents of five questions: by pair, alarms are far too many, by document they are as promised."""
    by_pair, by_document = [], []
    for seed in range(300):
        selections, tokens = routed(5000 + seed, 10, sizes=(3, 9))
        many, numbers = (np.repeat(selections, 5, axis=0), np.repeat(tokens, 5, axis=0)), np.repeat(range(10), 5)
        by_pair.append(stats.p_values(*summed(*many)) < 0.05)
        sums = ExampleSums(2, EXPERTS)
        sums.add(numbers.tolist(), *many)
        by_document.append(stats.p_values(sums.counts(LAYERS), sums.summary()) < 0.05)
    assert 0.02 < np.mean(by_document) < 0.08 and np.mean(by_pair) > 0.25


@pytest.mark.parametrize("draws", [60, 9, 8, 7, 6, 5])
def test_permutations_and_family_wise_p_values_equal_a_loop(draws: int) -> None:
    selections, tokens = routed(draws, 12, effect=1.0)
    selections[:, :, 1, :2] = tokens[:, :, None]
    selections[:, :, 1, 2:] = 0
    seed = 3
    counts, clusters = summed(selections, tokens, draws, seed)
    swaps = np.stack([np.random.default_rng((seed, i)).integers(0, 2, draws + 1, dtype=np.int8) for i in range(12)])

    def differences(flips: Any) -> list[Fraction]:
        totals, sizes = np.zeros((2, 2 * EXPERTS), dtype=int), [0, 0]
        for i, flip in enumerate(flips):
            for side in range(2):
                totals[side] += selections[i, 1 - side if flip else side].reshape(-1)
                sizes[side] += int(tokens[i, 1 - side if flip else side])
        return [abs(Fraction(int(a), sizes[0]) - Fraction(int(b), sizes[1])) for a, b in totals.T]

    observed = differences([0] * 12)
    drawn = [differences(swaps[:, 1 + b]) for b in range(draws)]
    alone = [sum(row[e] >= observed[e] for row in drawn) for e in range(2 * EXPERTS)]
    np.testing.assert_array_equal(clusters.exceeded.reshape(-1), alone)
    half = sum(selections[i, 0] for i in range(12) if swaps[i, 0])
    np.testing.assert_array_equal(clusters.half_1, half)
    squares = [sum(row[e] ** 2 for row in [observed, *drawn]) for e in range(2 * EXPERTS)]

    def scaled(row: list[Fraction], e: int) -> Fraction:
        return row[e] ** 2 / squares[e] if squares[e] else Fraction(0)

    order = sorted(range(2 * EXPERTS), key=lambda e: -scaled(observed, e))
    expected, most = [0] * (2 * EXPERTS), 0
    for place, e in enumerate(order):
        rest = order[place:]
        most = max(most, sum(max(scaled(row, o) for o in rest) >= scaled(observed, e) for row in drawn))
        expected[e] = most
    assert clusters.exceeded_by_any is not None
    np.testing.assert_array_equal(clusters.exceeded_by_any.reshape(-1), expected)
    assert (stats.family_wise_p_values(clusters) >= stats.permutation_p_values(clusters)).all()
    # What never differs is never chosen.
    assert (stats.family_wise_p_values(clusters)[1] == 1).all() and not counts.risk_difference()[1].any()


def test_family_wise_p_values_keep_what_they_promise_and_find_the_effect() -> None:
    found = []
    for seed in range(200):
        _, clusters = summed(*routed(9000 + seed, 15, sizes=(3, 9)), permutations=99, seed=seed)
        found.append((stats.family_wise_p_values(clusters).min(), stats.permutation_p_values(clusters).min()))
    family, alone = (np.mean(np.asarray(column) <= 0.1) for column in zip(*found, strict=True))
    # Without an effect, one draw of ten has any expert at 0.1; the others look at one expert as if it were all.
    assert 0.04 < family < 0.17 < 0.35 < alone
    wrong = []
    for seed in range(40):
        p = stats.family_wise_p_values(summed(*routed(seed, 60, effect=1.5), permutations=199, seed=seed)[1])
        assert p[0, 0] == pytest.approx(1 / 200)
        # The second layer has no effect, also where the first has one.
        wrong.append(p[1].min() <= 0.1)
    assert np.mean(wrong) < 0.2


def test_the_permutation_test_finds_the_effect_and_little_else() -> None:
    counts, clusters = summed(*routed(8, 120, effect=1.5), permutations=499)
    p = stats.permutation_p_values(clusters)
    assert p[0, 0] == pytest.approx(1 / 500)
    # The second layer has no effect.
    assert np.median([stats.permutation_p_values(summed(*routed(s, 40), permutations=99)[1]) for s in range(9)]) > 0.3
    normal = stats.p_values(counts, clusters)
    assert normal[0, 0] < 1e-6 and np.all(np.abs(normal[1] - p[1]) < 0.12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_false_discovery_rates_equal_the_step_up_rule(values: list[float]) -> None:
    found = stats.false_discovery_rates(np.asarray(values))
    for rate in (0.05, 0.2, 0.5):
        ordered = sorted(values)
        fit = [k for k, p in enumerate(ordered, start=1) if p * len(values) / k <= rate]
        accepted = len(fit) and fit[-1]
        chosen = ordered[accepted - 1] if accepted else -1.0
        assert [q <= rate for q in found] == [p <= chosen for p in values]


def test_one_p_value_that_is_not_known_leaves_the_others_theirs() -> None:
    known = np.asarray([0.01, 0.2, 0.03, 0.9])
    found = stats.false_discovery_rates(np.asarray([[np.nan, *known[:2]], [*known[2:], np.nan]]))
    assert np.isnan(found[[0, 1], [0, 2]]).all()
    np.testing.assert_allclose(found[~np.isnan(found)], stats.false_discovery_rates(known))
    assert np.isnan(stats.false_discovery_rates(np.full((2, 2), np.nan))).all()


def test_log_odds_are_finite_and_point_the_same_way() -> None:
    counts, _ = summed(*routed(9, 30, effect=2.0))
    odds = stats.log_odds(counts)
    assert np.isfinite(odds).all() and odds[0, 0] > 0
    a1, a2, n1, n2 = counts.activations_1[0, 0], counts.activations_2[0, 0], *counts.tokens
    expected = math.log((a1 + 0.5) * (n2 - a2 + 0.5) / ((n1 - a1 + 0.5) * (a2 + 0.5)))
    assert odds[0, 0] == pytest.approx(expected)


def test_halves_of_the_same_agree_and_overlap_knows_the_sign() -> None:
    selections, tokens = routed(10, 1)
    many = np.repeat(selections, 200, axis=0), np.repeat(tokens, 200, axis=0)
    assert stats.split_half_overlap(*summed(*many), top=3) == 1.0
    assert math.isnan(stats.split_half_overlap(*summed(selections, tokens), top=3))
    counts, _ = summed(*routed(11, 30))
    swapped = RoutingCounts(counts.activations_2, counts.activations_1, counts.tokens[::-1].copy(), counts.layers)
    assert stats.overlap(counts, counts, 4) == 1.0 and stats.overlap(counts, swapped, 4) == 0.0


def test_examples_that_happen_to_be_alike_prove_no_more_than_their_number() -> None:
    selections = np.zeros((6, 2, 2, EXPERTS), dtype=np.int64)
    selections[:, 0, :, :2] = 3
    selections[:, 1, :, 2:4] = 3
    counts, clusters = summed(selections, np.full((6, 2), 3), permutations=99)
    assert not stats.standard_errors(counts, clusters).any()
    found = stats.p_values(counts, clusters)
    assert (found[:, :4] == 2**-5).all() and (found[:, 4] == 1).all()
    assert stats.permutation_p_values(clusters).min() == pytest.approx(2**-5, abs=0.05)


def test_no_permutations_give_no_p_values() -> None:
    clusters = summed(*routed(3, 9))[1]
    assert np.isnan(stats.permutation_p_values(clusters)).all() and np.isnan(stats.family_wise_p_values(clusters)).all()


def test_a_few_long_examples_among_many_are_cautioned_about() -> None:
    selections, tokens = routed(13, 40, sizes=(5, 6))
    counts, clusters = summed(selections, tokens)
    assert stats.effective_examples(counts, clusters) == pytest.approx(40) and stats.cautions(counts, clusters) == []
    selections[:2] *= 100
    tokens[:2] *= 100
    counts, clusters = summed(selections, tokens)
    # (2 * 100 + 38)^2 / (2 * 100^2 + 38)
    assert stats.effective_examples(counts, clusters) == pytest.approx(238**2 / 20_038)
    assert len(stats.cautions(counts, clusters)) == 1 and "is 3, too few" in stats.cautions(counts, clusters)[0]


def test_what_speaks_against_a_ranking_is_cautioned_about() -> None:
    counts, clusters = summed(*routed(12, 1))
    assert np.isnan(stats.standard_errors(counts, clusters)).all()
    assert any("only 1 cluster:" in text for text in stats.cautions(counts, clusters))
    selections, tokens = routed(13, 40)
    selections[:, 0] *= 3
    tokens[:, 0] *= 3
    assert [text for text in stats.cautions(*summed(selections, tokens)) if "differ in length" in text]
    # Routing that is the same in every example has no standard error.
    selections = np.zeros((40, 2, 2, EXPERTS), dtype=np.int64)
    selections[:, 0, :, :2] = 3
    selections[:, 1, :, 2:4] = 3
    (found,) = stats.cautions(*summed(selections, np.full((40, 2), 3)))
    assert "8 experts have zero between-cluster variance" in found


def test_the_summary_survives_a_file(tmp_path: Path) -> None:
    counts, clusters = summed(*routed(14, 9), permutations=20)
    path = tmp_path / "ranking.safetensors"
    write_ranking(ranking_of(counts, clusters), path)
    again = read_ranking(path)
    assert again.clusters is not None
    assert set(clusters.tensors()) == {*SUMMARY_AXES, *OPTIONAL_AXES}
    for name, tensor in clusters.tensors().items():
        np.testing.assert_array_equal(again.clusters.tensors()[name], tensor)
    # As older files are.
    older = replace(clusters, exceeded_by_any=None)
    write_ranking(ranking_of(counts, older), path, overwrite=True)
    read = read_ranking(path).clusters
    assert read is not None and read.exceeded_by_any is None and set(read.tensors()) == set(SUMMARY_AXES)
    assert np.isnan(stats.family_wise_p_values(read)).all()
    write_ranking(ranking_of(counts, None), path, overwrite=True)
    assert read_ranking(path).clusters is None


def test_a_summary_that_cannot_be_is_refused(tmp_path: Path) -> None:
    counts, clusters = summed(*routed(15, 9), permutations=20)

    def write(changed: ClusterSummary) -> None:
        write_ranking(ranking_of(counts, changed), tmp_path / "ranking")

    def put(name: str, index: Any, value: int) -> ClusterSummary:
        tensor = getattr(clusters, name).copy()
        tensor[index] = value
        return replace(clusters, **{name: tensor})

    for name in (name for name, axes in (SUMMARY_AXES | OPTIONAL_AXES).items() if axes == 2):
        there = int(getattr(clusters, name)[0, 0])
        for amount in (10**6, -(10**6)):
            with pytest.raises(RankingFormatError):
                write(put(name, (0, 0), there + amount))
        with pytest.raises(RankingFormatError, match=name):
            write(replace(clusters, **{name: getattr(clusters, name)[:1]}))
    totals = (("examples", 0), ("examples", 10**9), ("permutations", -1), ("token_products", 0), ("half_tokens", 10**9))
    for name, value in totals:
        with pytest.raises(RankingFormatError):
            write(put(name, 0, value))
