"""How sure a ranking is: standard errors by cluster, intervals, tests, stability. Plain numpy.

The risk difference is `A1/N1 - A2/N2`, a difference of two ratios of sums over examples. Its variance is the
usual linearised one of survey statistics (Taylor series; Woodruff, JASA 66, 1971): with p = A/N,

    u_i = (A1_i - p1 N1_i) / N1 - (A2_i - p2 N2_i) / N2        var = n / (n - 1) * sum of u_i^2

Tokens of one text are not independent, nor are pairs that share a document. The unit, called an example in names, is
the cluster: all pairs that share something, both sides together, or one pair that shares nothing. n is their number.
Intervals and p-values go by Student's t with n - 1 degrees of freedom.

Axes: L MoE layers, E routed experts per layer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expert_registry.clusters import ClusterSummary
from expert_registry.counts import RoutingCounts
from expert_registry.ranking import Ranking, rank_experts

Floats = NDArray[np.float64]

FEW_EXAMPLES = 30
"""Below this, intervals and tests are not reliable."""
UNEQUAL = 1.5
"""Ratio of the sides' counted tokens from which on a difference in length may be what is detected."""


def standard_errors(counts: RoutingCounts, clusters: ClusterSummary) -> Floats:
    """Of the risk difference, by cluster; float64 `[L, E]`, NaN with a single cluster."""
    return np.asarray(np.sqrt(_variances(counts, clusters, paired=True)))


def _variances(counts: RoutingCounts, clusters: ClusterSummary, *, paired: bool) -> Floats:
    """Of the risk difference, `[L, E]`; not `paired`: as if the sides came from different clusters."""
    n = int(clusters.examples[0])
    if n < 2:
        return np.full(counts.activations_1.shape, np.nan)
    # Exact integers: for an expert that is alike everywhere, large terms cancel to nothing.
    n1, n2 = (int(x) for x in counts.tokens)
    t11, t22, t12 = (int(x) for x in clusters.token_products)
    a1, a2 = _exact(counts.activations_1), _exact(counts.activations_2)
    own_1 = _exact(clusters.squares_1) * n1**2 - 2 * a1 * n1 * _exact(clusters.with_tokens_1) + a1**2 * t11
    own_2 = _exact(clusters.squares_2) * n2**2 - 2 * a2 * n2 * _exact(clusters.with_tokens_2) + a2**2 * t22
    total = own_1 * n2**4 + own_2 * n1**4
    if paired:
        both = _exact(clusters.products) * n1 * n2 + a1 * a2 * t12
        both = both - a2 * n1 * _exact(clusters.with_other_1) - a1 * n2 * _exact(clusters.with_other_2)
        total = total - 2 * both * (n1 * n2) ** 2
    variance = (total * n / ((n - 1) * (n1 * n2) ** 4)).astype(np.float64)
    # A file may hold sums that no examples have.
    return np.asarray(np.maximum(variance, 0.0))


def _exact(counts: NDArray[np.int64]) -> Any:
    """The same as Python's integers, which have no largest one."""
    return counts.astype(object)


def intervals(counts: RoutingCounts, clusters: ClusterSummary, level: float = 0.95) -> tuple[Floats, Floats]:
    """Lower and upper ends of intervals for the risk difference, float64 `[L, E]` within [-1, 1].

    NaN with a single cluster.
    """
    # A third of a second to import, and the look-up of rankings needs none of it.
    from scipy.special import stdtrit

    difference = counts.risk_difference()
    freedom = max(int(clusters.examples[0]) - 1, 1)
    width = stdtrit(freedom, 0.5 + level / 2) * standard_errors(counts, clusters)
    return np.clip(difference - width, -1, 1), np.clip(difference + width, -1, 1)


def log_odds(counts: RoutingCounts) -> Floats:
    """Log odds ratio with 0.5 added to each cell (Haldane and Anscombe), float64 `[L, E]`.

    For comparison: experts that are hardly ever selected get large values from a few tokens.
    """
    n1, n2 = (float(x) for x in counts.tokens)
    odds = [(a + 0.5) / (n - a + 0.5) for a, n in ((counts.activations_1, n1), (counts.activations_2, n2))]
    return np.asarray(np.log(odds[0]) - np.log(odds[1]))


def design_effects(counts: RoutingCounts, clusters: ClusterSummary) -> Floats:
    """Variance by cluster over the variance if tokens were independent (Kish), float64 `[L, E]`; NaN for experts
    never or always selected.

    How alike the tokens of one side of a cluster are. That the two sides of a cluster are alike too, which narrows
    intervals, makes no token more: both variances leave it out.
    """
    n1, n2 = (float(x) for x in counts.tokens)
    p1, p2 = counts.activations_1 / n1, counts.activations_2 / n2
    naive = p1 * (1 - p1) / n1 + p2 * (1 - p2) / n2
    clustered = _variances(counts, clusters, paired=False)
    return np.divide(clustered, naive, out=np.full_like(naive, np.nan), where=naive > 0)


def effective_tokens(counts: RoutingCounts, clusters: ClusterSummary) -> Floats:
    """How many independent tokens would say as much, `(N1 + N2) / design effect`, float64 `[L, E]`.

    At most N1 + N2: a design effect below 1 (an expert that is selected evenly, once in each text) is left at 1.
    """
    effects = design_effects(counts, clusters)
    return np.asarray(float(counts.tokens.sum()) / np.maximum(effects, 1.0))


def effective_examples(counts: RoutingCounts, clusters: ClusterSummary) -> float:
    """How many clusters of equal length would say as much, `N^2 / sum of N_i^2` (Kish), of the side with fewer."""
    squares = clusters.token_products[:2].tolist()
    return float(min(n * n / square for n, square in zip(counts.tokens.tolist(), squares, strict=True)))


def p_values(counts: RoutingCounts, clusters: ClusterSummary) -> Floats:
    """Two-sided, of the risk difference over its standard error, `[L, E]`; 1 where nothing differs.

    None is below 2^(1 - n), the least that swapping the sides of n clusters could show: a few clusters that happen
    to be alike have a standard error near zero and prove nothing. NaN with a single cluster.
    """
    from scipy.special import stdtr

    n = int(clusters.examples[0])
    difference = np.abs(counts.risk_difference())
    errors = standard_errors(counts, clusters)
    t = np.divide(difference, errors, out=np.where(difference > 0, np.inf, 0.0), where=errors > 0)
    p = np.maximum(2 * stdtr(max(n - 1, 1), -t), 2.0 ** max(1 - n, -1000))
    return np.where(np.isnan(errors), np.nan, p)


def permutation_p_values(clusters: ClusterSummary) -> Floats:
    """`(1 + exceeded) / (1 + permutations)`, `[L, E]`: sides swapped at random, all pairs of a cluster at once.

    Of each expert for itself; for all of them see `family_wise_p_values`. Counting the observed labelling as one of
    the draws keeps the test valid at any number of draws. NaN if none were drawn.
    """
    return _permutation_p(clusters, clusters.exceeded)


def family_wise_p_values(clusters: ClusterSummary) -> Floats:
    """p-values of the permutation test, adjusted for looking at all experts, `[L, E]`; NaN if there are none.

    Choosing the experts with a value of at most a picks, with a probability of at most a, any whose routing would be
    the same with the sides swapped. Each permutation's largest difference is what an observed one is held against
    (step-down maxT: Westfall and Young, Resampling-Based Multiple Testing, 1993; for brain images Nichols and Holmes,
    Human Brain Mapping 15, 2002). So B permutations can show 1 / (B + 1) among any number of experts, where by
    Benjamini and Hochberg's rule on `permutation_p_values` one expert alone cannot get below their number over B + 1.

    Each expert's differences are divided by their root mean square over the permutations and the observed
    labelling, lest the experts that vary most decide alone. As that is the same whichever labelling was observed, it
    costs the test nothing of its exactness.
    """
    if clusters.exceeded_by_any is None:
        return np.full(clusters.exceeded.shape, np.nan)
    return _permutation_p(clusters, clusters.exceeded_by_any)


def _permutation_p(clusters: ClusterSummary, exceeded: NDArray[np.int64]) -> Floats:
    drawn = int(clusters.permutations[0])
    return np.where(drawn > 0, (1 + exceeded) / (1 + drawn), np.nan)


def false_discovery_rates(p_values: Floats) -> Floats:
    """Benjamini and Hochberg's (1995) adjusted p-values over all experts, in the shape of `p_values`.

    Choosing the experts with a value of at most q keeps the expected share of false ones at q. Where there is no
    p-value (NaN) there is no rate, and the others are adjusted among themselves.
    """
    # It takes most of a second to import, and the look-up of rankings needs none of it.
    from scipy.stats import false_discovery_control

    adjusted = np.full_like(p_values, np.nan)
    known = np.isfinite(p_values)
    adjusted[known] = false_discovery_control(p_values[known])
    return adjusted


def split_half_overlap(counts: RoutingCounts, clusters: ClusterSummary, top: int) -> float:
    """Share of the top n that two random halves of the clusters have in common; NaN if a half has no tokens."""
    rest = counts.tokens - clusters.half_tokens
    if not (clusters.half_tokens.all() and rest.all()):
        return math.nan
    halves = (
        RoutingCounts(clusters.half_1, clusters.half_2, clusters.half_tokens, counts.layers),
        RoutingCounts(
            counts.activations_1 - clusters.half_1, counts.activations_2 - clusters.half_2, rest, counts.layers
        ),
    )
    return overlap(halves[0], halves[1], top)


def overlap(one: RoutingCounts, other: RoutingCounts, top: int) -> float:
    """Share of the top n experts, with their sign, that two rankings of the same model have in common."""
    chosen = [
        {(e.layer, e.expert, e.risk_difference > 0) for e in rank_experts(counts)[:top]} for counts in (one, other)
    ]
    return len(chosen[0] & chosen[1]) / len(chosen[0]) if chosen[0] else math.nan


def clustered_by(ranking: Ranking) -> str:
    """What the statistics take as independent, in a word: `cluster`, or `pair` where each pair is its own."""
    shared = ranking.clusters is not None and int(ranking.clusters.examples[0]) < ranking.card.data.pairs
    return "cluster" if shared else "pair"


def cautions(counts: RoutingCounts, clusters: ClusterSummary | None, unit: str = "cluster") -> list[str]:
    """Reasons to distrust the ranking; empty if there are none.

    `unit` is what the clusters are called, see `clustered_by`.
    """
    n1, n2 = (int(x) for x in counts.tokens)
    found = []
    if max(n1, n2) >= UNEQUAL * min(n1, n2):
        found.append(
            f"the sides differ in length ({n1} and {n2} counted tokens): part of the ranking may be length or "
            "position; balance them"
        )
    if clusters is None:
        return [*found, "there is no clustering summary, so no standard errors by cluster"]
    n, effective = int(clusters.examples[0]), effective_examples(counts, clusters)
    if n < FEW_EXAMPLES:
        found.append(
            f"only {n} {unit}{'s' * (n > 1)}: too few for reliable intervals and tests (below about {FEW_EXAMPLES})"
        )
    elif effective < FEW_EXAMPLES:
        found.append(
            f"a few long {unit}s hold most of the counted tokens: the effective number of {n} {unit}s is "
            f"{effective:.0f}, too few for reliable intervals and tests; balance their sizes"
        )
    certain = int(((standard_errors(counts, clusters) == 0) & (counts.risk_difference() != 0)).sum())
    if certain:
        found.append(
            f"{certain} experts have zero between-{unit} variance, so their standard error is zero; do not "
            f"extrapolate to other {unit}s"
        )
    return found
