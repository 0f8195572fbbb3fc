"""What `steermoe detect` prints of a ranking."""

from __future__ import annotations

import math

import numpy as np
import typer

from expert_registry import Ranking, cautions, intervals
from expert_registry import statistics as stats

_SHOWN = 10


def print_summary(ranking: Ranking) -> None:
    """The first experts with intervals and tests, how stable they are, and what speaks against them."""
    counts, clusters = ranking.counts, ranking.clusters
    for text in cautions(counts, clusters):
        typer.echo(f"caution: {text}", err=True)
    if clusters is None:
        return
    low, high = intervals(counts, clusters)
    rates = stats.false_discovery_rates(stats.p_values(counts, clusters))
    permuted = stats.permutation_p_values(clusters)
    rows = {layer: row for row, layer in enumerate(ranking.shape.layers)}
    certain, drawn = not np.isnan(low).any(), not np.isnan(permuted).any()
    if certain:
        permutations = f"; p of {int(clusters.permutations[0])} permutations" if drawn else ""
        typer.echo(f"  95 % intervals by pair; q: false-discovery rate among all {low.size} experts{permutations}")
    for expert in ranking.experts()[:_SHOWN]:
        at = rows[expert.layer], expert.expert
        typer.echo(
            f"  layer {expert.layer:3d}  expert {expert.expert:3d}  risk difference {expert.risk_difference:+.3f}"
            + (f"  {_interval(low[at], high[at])}  q {rates[at]:.1e}" if certain else "")
            + (f"  p {permuted[at]:.3f}" if certain and drawn else "")
        )
    if not certain:
        return
    n1, n2 = counts.tokens.tolist()
    first = [(rows[expert.layer], expert.expert) for expert in ranking.experts()[:_SHOWN]]
    effective = [stats.effective_tokens(counts, clusters)[at] for at in first]
    if not np.isnan(effective).all():
        typer.echo(
            f"  {n1} + {n2} tokens say of these as much as {np.nanmedian(effective):.0f} independent ones (median)"
        )
    numbers = ranking.card.recommended
    top = max(numbers.activate + numbers.deactivate, 1)
    shared = stats.split_half_overlap(counts, clusters, top)
    if not math.isnan(shared):
        typer.echo(f"  two halves of the pairs share {shared:.0%} of the top {top}")


def _interval(low: float, high: float) -> str:
    return f"[{low:+.3f}, {high:+.3f}]" if low < high else "[alike in all pairs]"
