"""Heat maps of risk differences: layer by expert, one panel per ranking. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from expert_registry import Ranking

_WIDTH, _PANEL_HEIGHT = 9.0, 2.6
_LABELLED = 8
"""Experts per panel that get their rank written on them."""


def draw_heatmaps(rankings: Sequence[Ranking], path: Path) -> None:
    """Write a PNG with one panel per ranking, colours from -1 (side 2) to +1 (side 1)."""
    figure = Figure(figsize=(_WIDTH, _PANEL_HEIGHT * len(rankings) + 0.6), layout="constrained")
    axes = figure.subplots(len(rankings), 1, squeeze=False)[:, 0]
    image = None
    for axis, ranking in zip(axes, rankings, strict=True):
        image = axis.imshow(ranking.counts.risk_difference(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        card = ranking.card
        axis.set_title(f"{card.behaviour}: {card.sides[0]} (+) against {card.sides[1]} (-)", fontsize=10, loc="left")
        axis.set_yticks(range(len(ranking.shape.layers)), [str(layer) for layer in ranking.shape.layers])
        axis.set_ylabel("layer")
        rows = {layer: row for row, layer in enumerate(ranking.shape.layers)}
        for rank, expert in enumerate(ranking.experts()[:_LABELLED], start=1):
            axis.text(expert.expert, rows[expert.layer], str(rank), ha="center", va="center", fontsize=7, color="white")
    axes[-1].set_xlabel(f"expert of {rankings[0].card.model.id}; numbers are ranks")
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="risk difference", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
