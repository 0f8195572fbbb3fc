"""Figures of rankings: heat map, top experts with intervals, depth, overlap. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from expert_registry import Ranking, intervals
from expert_registry.errors import ProfileError, UsageError
from expert_registry.statistics import clustered_by

_SIDE_1, _SIDE_2, _CHANCE = "#b2182b", "#2166ac", "#777777"
Curve = NDArray[np.float64]

_WIDTH = 60
"""Characters of a side's name that are shown."""
_NUMBERED = 8
"""Experts of a heat map that get their rank written on them."""
_LABELLED = 16
"""At most so many layers have their number beside them."""
MOST_EXPERTS = 500
"""Bars in one figure; more would make an image that hardly any program opens."""


def draw_heatmaps(rankings: Sequence[Ranking], path: Path) -> None:
    """Write an image with one panel per ranking; one scale for all, symmetric about zero (positive: positive side).

    Raises:
        UsageError: it cannot be written.
    """
    heights = [max(2.2, 0.08 * len(ranking.shape.layers)) + 0.5 for ranking in rankings]
    figure = Figure(figsize=(9.0, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(rankings), 1, squeeze=False, height_ratios=heights)[:, 0]
    values = [ranking.counts.risk_difference() for ranking in rankings]
    # Of most models the largest is far below 1, where a scale to 1 would leave all cells pale.
    most = max(float(np.abs(value).max()) for value in values) or 1.0
    image = None
    for axis, ranking, value in zip(axes, rankings, values, strict=True):
        image = axis.imshow(value, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        axis.set_title(_title(ranking), fontsize=9, loc="left", parse_math=False)
        axis.set_ylabel("layer")
        axis.set_xlabel(f"expert of {ranking.card.model.id}; the numbers are the first ranks")
        layers = ranking.shape.layers
        step = -(-len(layers) // _LABELLED)
        axis.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        rows = {layer: row for row, layer in enumerate(layers)}
        for rank, expert in enumerate(ranking.experts()[:_NUMBERED], start=1):
            number = axis.text(
                expert.expert, rows[expert.layer], str(rank), ha="center", va="center", fontsize=7, color="black"
            )
            # Legible on every colour of the map.
            number.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="risk difference", shrink=0.8)
    _save(figure, path)


def draw_experts(rankings: Sequence[Ranking], path: Path, top: int) -> None:
    """The first `top` experts of each ranking with their risk difference and, if it can be had, 95 % interval.

    Raises:
        UsageError: these are more than `MOST_EXPERTS` bars, or the image cannot be written.
    """
    numbers = [min(top, ranking.counts.activations_1.size) for ranking in rankings]
    if sum(numbers) > MOST_EXPERTS:
        raise UsageError(f"experts are drawn one by one, at most {MOST_EXPERTS} of them in all, not {sum(numbers)}")
    heights = [0.22 * number + 1.2 for number in numbers]
    figure = Figure(figsize=(7.0, sum(heights)), layout="constrained")
    axes = figure.subplots(len(rankings), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, ranking in zip(axes, rankings, strict=True):
        experts = ranking.experts()[:top]
        values = np.asarray([expert.risk_difference for expert in experts])
        places = np.arange(len(experts))
        colours = [_SIDE_1 if value > 0 else _SIDE_2 for value in values]
        axis.barh(places, values, color=colours, height=0.6)
        if ranking.clusters is not None:
            low, high = intervals(ranking.counts, ranking.clusters)
            rows = ranking.shape.rows
            at = ([rows[e.layer] for e in experts], [e.expert for e in experts])
            axis.hlines(places, low[at], high[at], color="black", linewidth=1.2)
        axis.set_yticks(places, [f"layer {e.layer}, expert {e.expert}" for e in experts], fontsize=7)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_ylim(len(experts) - 0.4, -0.6)
        axis.set_title(_title(ranking), fontsize=9, loc="left", parse_math=False)
        axis.set_xlabel(f"risk difference ({_intervals_in_words(ranking)})", fontsize=9)
    _save(figure, path)


def draw_depth(rankings: Sequence[Ranking], path: Path, top: int) -> None:
    """How many of the first `top` experts each layer has, the positive side upwards and the negative side downwards.

    Raises:
        UsageError: the image cannot be written.
    """
    figure = Figure(figsize=(8.0, 2.4 * len(rankings) + 0.4), layout="constrained")
    axes = figure.subplots(len(rankings), 1, squeeze=False)[:, 0]
    for axis, ranking in zip(axes, rankings, strict=True):
        layers = ranking.shape.layers
        experts = ranking.experts()[:top]
        for sign, colour in ((1, _SIDE_1), (-1, _SIDE_2)):
            mine = [e.layer for e in experts if sign * e.risk_difference > 0]
            heights = [sign * mine.count(layer) for layer in layers]
            side = textwrap.shorten(ranking.card.sides[0 if sign > 0 else 1], _WIDTH, placeholder="...")
            axis.bar(range(len(layers)), heights, color=colour, label=side)
        axis.axhline(0, color="black", linewidth=0.8)
        step = -(-len(layers) // _LABELLED)
        axis.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axis.set_xlabel("layer")
        axis.set_ylabel(f"of the top {len(experts)}")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.yaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
        axis.set_title(_title(ranking), fontsize=9, loc="left", parse_math=False)
        _plain(axis.legend(fontsize=7))
    _save(figure, path)


def draw_overlap(one: Ranking, other: Ranking, path: Path, top: int) -> None:
    """Share of the first n experts, with their sign, that two rankings have in common, for n up to `top`.

    Raises:
        ProfileError: they are of models of different shape.
        UsageError: the image cannot be written.
    """
    if one.shape != other.shape:
        raise ProfileError(f"rankings of {one.shape} and of {other.shape} name different experts; they cannot overlap")
    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axis = figure.subplots()
    shared, chance = overlap_curves(one, other, top)
    numbers = np.arange(1, len(shared) + 1)
    axis.plot(numbers, shared, color=_SIDE_1, label="in common")
    axis.plot(numbers, chance, color=_CHANCE, linestyle="--", label="by chance, with as many of each sign")
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("first n experts")
    axis.set_ylabel("share in common")
    names = [f"{r.card.model.id} {r.card.behaviour} v{r.card.version}, {r.card.data.name:.60}" for r in (one, other)]
    axis.set_title("\n".join(names), fontsize=9, loc="left", parse_math=False)
    axis.legend(fontsize=8)
    _save(figure, path)


def overlap_curves(one: Ranking, other: Ranking, top: int) -> tuple[Curve, Curve]:
    """For n = 1, 2, ... up to `top`: the share of the first n experts, with their sign, that both rankings have.

    And the share that would be expected if the two chose independently, each with its own numbers of experts of
    either sign: of n out of all, n / all are in both, and of these p p' + (1 - p) (1 - p') have the same sign.
    """
    ranked = [[(e.layer, e.expert, e.risk_difference > 0) for e in ranking.experts()[:top]] for ranking in (one, other)]
    numbers = np.arange(1, len(ranked[0]) + 1)
    places = [{expert: place for place, expert in enumerate(experts)} for experts in ranked]
    # An expert is in common from the n on that holds both of its places.
    both = [max(place, places[1][expert]) for expert, place in places[0].items() if expert in places[1]]
    shared = np.cumsum(np.bincount(both, minlength=len(numbers))) / numbers
    first, second = (np.cumsum([positive for _, _, positive in experts]) / numbers for experts in ranked)
    alike = first * second + (1 - first) * (1 - second)
    return shared, alike * numbers / one.counts.activations_1.size


def _title(ranking: Ranking) -> str:
    card = ranking.card
    sides = [textwrap.shorten(side, _WIDTH, placeholder="...") for side in card.sides]
    return f"{card.behaviour}: {sides[0]} (+)\nagainst {sides[1]} (-)"


def _intervals_in_words(ranking: Ranking) -> str:
    if ranking.clusters is None:
        return "no intervals: no clustering summary"
    unit = clustered_by(ranking)
    if int(ranking.clusters.examples[0]) < 2:
        return f"no intervals from one {unit}"
    return f"95 % intervals by {unit}; for experts chosen as the first ones too narrow"


def _plain(legend: Any) -> None:
    """What the sides are called is no formula, even between dollar signs."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def _save(figure: Figure, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
