"""What `steermoe detect` prints of a ranking."""

from __future__ import annotations

import math

import numpy as np
import typer

from expert_registry import Ranking, cautions, intervals
from expert_registry import statistics as stats
from expert_registry.statistics import clustered_by

_SHOWN = 10


def print_summary(ranking: Ranking) -> None:
    """Print the top experts with intervals and tests, their stability, and cautions."""
    counts, clusters = ranking.counts, ranking.clusters
    unit = clustered_by(ranking)
    for text in cautions(counts, clusters, unit):
        typer.echo(f"caution: {text}", err=True)
    if clusters is None:
        return
    low, high = intervals(counts, clusters)
    rates = stats.false_discovery_rates(stats.p_values(counts, clusters))
    permuted, adjusted = stats.permutation_p_values(clusters), stats.family_wise_p_values(clusters)
    odds, rows = stats.log_odds(counts), ranking.shape.rows
    certain, drawn = not np.isnan(low).any(), not np.isnan(permuted).any()
    # Files made before there was an adjusted one have only the other.
    family = drawn and not np.isnan(adjusted).any()
    number = int(clusters.examples[0])
    if certain:
        permutations = f"; p of {int(clusters.permutations[0])} permutations" if drawn else ""
        both = " (in brackets family-wise, among all)" if family else ""
        of = f" ({number} of {ranking.card.data.pairs} pairs)" if unit == "cluster" else ""
        typer.echo(
            f"  95 % intervals by {unit}{of}; q: false-discovery rate among all {low.size} experts{permutations}{both}"
        )
    for expert in ranking.experts()[:_SHOWN]:
        at = rows[expert.layer], expert.expert
        typer.echo(
            f"  layer {expert.layer:3d}  expert {expert.expert:3d}  risk difference {expert.risk_difference:+.3f}"
            + (f"  {_interval(low[at], high[at], unit)}  q {rates[at]:.1e}" if certain else "")
            + (f"  p {permuted[at]:.3f}" if certain and drawn else "")
            + (f" ({adjusted[at]:.3f})" if certain and family else "")
            + f"  log-odds {odds[at]:+.2f}"
        )
    if not certain:
        return
    n1, n2 = counts.tokens.tolist()
    first = [(rows[expert.layer], expert.expert) for expert in ranking.experts()[:_SHOWN]]
    effective = [stats.effective_tokens(counts, clusters)[at] for at in first]
    if number >= stats.FEW_EXAMPLES and not np.isnan(effective).all():
        typer.echo(
            f"  {n1} + {n2} tokens, effective sample size {np.nanmedian(effective):.0f} (median of these experts)"
        )
    numbers = ranking.card.recommended
    top = max(numbers.activate + numbers.deactivate, 1)
    shared = stats.split_half_overlap(counts, clusters, top)
    if not math.isnan(shared):
        typer.echo(f"  split-half overlap of the top {top}: {shared:.0%} (halves of the {unit}s)")


def _interval(low: float, high: float, unit: str) -> str:
    return f"[{low:+.3f}, {high:+.3f}]" if low < high else "[zero variance]"
