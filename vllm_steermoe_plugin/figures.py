"""Figures of rankings: heat map, top experts with intervals, depth, overlap. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from expert_registry import Ranking, intervals
from expert_registry.errors import ProfileError
from expert_registry.statistics import overlap

_SIDE_1, _SIDE_2, _CHANCE = "#b2182b", "#2166ac", "#777777"
_NUMBERED = 8
"""Experts of a heat map that get their rank written on them."""


def draw_heatmaps(rankings: Sequence[Ranking], path: Path) -> None:
    """Write a PNG with one panel per ranking, colours from -1 (side 2) to +1 (side 1)."""
    figure = Figure(figsize=(9.0, 2.6 * len(rankings) + 0.6), layout="constrained")
    axes = figure.subplots(len(rankings), 1, squeeze=False)[:, 0]
    image = None
    for axis, ranking in zip(axes, rankings, strict=True):
        image = axis.imshow(ranking.counts.risk_difference(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        card = ranking.card
        axis.set_title(f"{card.behaviour}: {card.sides[0]} (+) against {card.sides[1]} (-)", fontsize=10, loc="left")
        axis.set_yticks(range(len(ranking.shape.layers)), [str(layer) for layer in ranking.shape.layers])
        axis.set_ylabel("layer")
        rows = {layer: row for row, layer in enumerate(ranking.shape.layers)}
        for rank, expert in enumerate(ranking.experts()[:_NUMBERED], start=1):
            axis.text(expert.expert, rows[expert.layer], str(rank), ha="center", va="center", fontsize=7, color="white")
    axes[-1].set_xlabel(f"expert of {rankings[0].card.model.id}; numbers are ranks")
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="risk difference", shrink=0.8)
    _save(figure, path)


def draw_experts(rankings: Sequence[Ranking], path: Path, top: int) -> None:
    """The first `top` experts of each ranking with their risk difference and, if it can be had, 95 % interval."""
    figure = Figure(figsize=(7.0, (0.22 * top + 1.2) * len(rankings)), layout="constrained")
    axes = figure.subplots(len(rankings), 1, squeeze=False)[:, 0]
    for axis, ranking in zip(axes, rankings, strict=True):
        experts = ranking.experts()[:top]
        values = np.asarray([expert.risk_difference for expert in experts])
        places = np.arange(len(experts))
        colours = [_SIDE_1 if value > 0 else _SIDE_2 for value in values]
        axis.barh(places, values, color=colours, height=0.6)
        if ranking.clusters is not None:
            low, high = intervals(ranking.counts, ranking.clusters)
            rows = {layer: row for row, layer in enumerate(ranking.shape.layers)}
            at = ([rows[e.layer] for e in experts], [e.expert for e in experts])
            axis.hlines(places, low[at], high[at], color="black", linewidth=1.2)
        axis.set_yticks(places, [f"layer {e.layer}, expert {e.expert}" for e in experts], fontsize=7)
        axis.invert_yaxis()
        axis.axvline(0, color="black", linewidth=0.8)
        what = "95 % intervals by example" if ranking.clusters is not None else "no intervals: no clustering summary"
        axis.set_title(_title(ranking), fontsize=9, loc="left")
        axis.set_xlabel(f"risk difference ({what})")
    _save(figure, path)


def draw_depth(rankings: Sequence[Ranking], path: Path, top: int) -> None:
    """How many of the first `top` experts each layer has, side 1 upwards and side 2 downwards."""
    figure = Figure(figsize=(8.0, 2.4 * len(rankings) + 0.4), layout="constrained")
    axes = figure.subplots(len(rankings), 1, squeeze=False)[:, 0]
    for axis, ranking in zip(axes, rankings, strict=True):
        layers = ranking.shape.layers
        experts = ranking.experts()[:top]
        for sign, colour in ((1, _SIDE_1), (-1, _SIDE_2)):
            mine = [e.layer for e in experts if sign * e.risk_difference > 0]
            heights = [sign * mine.count(layer) for layer in layers]
            axis.bar(range(len(layers)), heights, color=colour, label=ranking.card.sides[0 if sign > 0 else 1])
        axis.axhline(0, color="black", linewidth=0.8)
        step = max(1, len(layers) // 16)
        axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axis.set_xlabel("layer")
        axis.set_ylabel(f"of the top {len(experts)}")
        axis.set_title(_title(ranking), fontsize=9, loc="left")
        axis.legend(fontsize=7)
    _save(figure, path)


def draw_overlap(one: Ranking, other: Ranking, path: Path, top: int) -> None:
    """Share of the first n experts, with their sign, that two rankings have in common, for n up to `top`.

    Raises:
        ProfileError: they are of models of different shape.
    """
    if one.shape != other.shape:
        raise ProfileError(f"rankings of {one.shape} and of {other.shape} name different experts; they cannot overlap")
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axis = figure.subplots()
    total = one.counts.activations_1.size
    numbers = np.unique(np.linspace(1, min(top, total), 200).astype(int))
    axis.plot(numbers, [overlap(one.counts, other.counts, int(n)) for n in numbers], color=_SIDE_1, label="in common")
    # Two sets of n out of all share n / all of their members by chance, and half of those have the same sign.
    axis.plot(numbers, numbers / total / 2, color=_CHANCE, linestyle="--", label="by chance")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("first n experts")
    axis.set_ylabel("share in common")
    names = [f"{r.card.model.id} {r.card.behaviour} v{r.card.version}" for r in (one, other)]
    axis.set_title(f"{names[0]}\n{names[1]}", fontsize=9, loc="left")
    axis.legend(fontsize=8)
    _save(figure, path)


def _title(ranking: Ranking) -> str:
    card = ranking.card
    return f"{card.behaviour}: {card.sides[0]:.60} (+)\nagainst {card.sides[1]:.60} (-)"


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
