"""Figures of rankings: what they show, on which scale, and whether it can be read."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

from expert_registry import DataRef, ModelRef, Ranking, RoutingCounts, write_ranking
from expert_registry.errors import ConfigurationError, UsageError
from expert_registry.statistics import overlap
from tests.registry.test_statistics import ranking_of, routed, summed
from tests.support.planted import planted_ranking
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.views import figures


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("rankings")
    paths = folder / "digits.safetensors", folder / "refusal.safetensors"
    for path in paths:
        write_ranking(planted_ranking(path.stem), path)
    return paths


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would have been written."""
    found: list[Figure] = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: found.append(figure))
    return found


def large(layers: int = 48, experts: int = 128, seed: int = 0, top_k: int = 8) -> Ranking:
    """Small differences, as of a model of that size."""
    chance = np.random.default_rng(seed)
    counts = np.zeros((2, layers, experts), dtype=np.int64)
    for side in range(2):
        for layer in range(layers):
            for _ in range(50):
                counts[side, layer, chance.permutation(experts)[:top_k]] += 1
    card = ranking_of(*summed(*routed(0, 3))).card
    card = card.model_copy(
        update={
            "num_experts": experts,
            "top_k": top_k,
            "sides": ("costs $5 or $x_1^2$", "is free of $\\frac{1}$"),
            "model": ModelRef(id="some/model", architecture="Qwen3MoeForCausalLM"),
        }
    )
    return Ranking(RoutingCounts(counts[0], counts[1], np.asarray([50, 50]), np.arange(layers) + 3), card)


@pytest.mark.parametrize("kind", ["heatmap", "experts", "depth"])
def test_figures_of_several_rankings(kind: str, files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "new" / "figure.png"
    assert run("plot", *map(str, files), "--kind", kind, "--out", str(out), "--top", "9").exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_overlap_of_two_rankings(files: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "figure.svg"
    assert run("plot", *map(str, files), "--kind", "overlap", "--out", str(out)).exit_code == 0
    assert b"<svg" in out.read_bytes()
    assert isinstance(run("plot", str(files[0]), "--kind", "overlap").exception, UsageError)


def test_the_colours_reach_as_far_below_zero_as_above_on_one_scale(drawn: list[Figure]) -> None:
    one, two = large(), large(6, 16, seed=1)
    figures.draw_heatmaps([one, two], Path("unused"))
    images = [image for axis in drawn[0].axes for image in axis.images]
    most = max(float(np.abs(ranking.counts.risk_difference()).max()) for ranking in (one, two))
    assert most < 0.5
    assert [image.get_clim() for image in images] == [(-most, most)] * 2
    np.testing.assert_array_equal(images[0].get_array(), one.counts.risk_difference())


def test_a_ranking_without_any_difference_is_drawn(drawn: list[Figure]) -> None:
    ranking = large(2, 16)
    same = RoutingCounts(
        ranking.counts.activations_1, ranking.counts.activations_1, ranking.counts.tokens, ranking.counts.layers
    )
    figures.draw_heatmaps([Ranking(same, ranking.card)], Path("unused"))
    assert next(image for axis in drawn[0].axes for image in axis.images).get_clim() == (-1, 1)


def test_layers_bear_the_checkpoints_numbers_and_room_to_read_them(drawn: list[Figure]) -> None:
    figures.draw_heatmaps([large()], Path("unused"))
    axis = drawn[0].axes[0]
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == [str(layer) for layer in range(3, 51, 3)]
    drawn[0].canvas.draw()
    boxes = sorted((label.get_window_extent() for label in axis.get_yticklabels()), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in pairwise(boxes)), "labels lie on each other"


@pytest.mark.parametrize("kind", ["heatmap", "experts", "depth"])
def test_what_the_sides_are_called_is_no_formula(kind: str, tmp_path: Path) -> None:
    write_ranking(large(4, 16), tmp_path / "ranking")
    out = tmp_path / "figure.svg"
    done = run("plot", str(tmp_path / "ranking"), "--kind", kind, "--out", str(out))
    assert done.exit_code == 0, done.exception
    assert "costs $5 or $x_1^2$" in out.read_text(encoding="utf-8")


def test_intervals_are_drawn_where_they_are_known(drawn: list[Figure]) -> None:
    counts, clusters = summed(*routed(3, 40))
    one = summed(*routed(3, 1))
    shared = ranking_of(counts, clusters)
    shared = replace(shared, card=shared.card.model_copy(update={"data": DataRef(name="made", pairs=200)}))
    for ranking in (ranking_of(counts, clusters), ranking_of(counts, None), ranking_of(*one), shared):
        figures.draw_experts([ranking], Path("unused"), 4)
    said = [figure.axes[0].get_xlabel() for figure in drawn]
    assert "95 % intervals by pair" in said[0] and "no clustering summary" in said[1] and "from one pair" in said[2]
    assert "95 % intervals by cluster" in said[3]
    assert len(drawn[0].axes[0].collections) == 1 and not drawn[1].axes[0].collections
    assert len(drawn[0].axes[0].patches) == 4


def test_bars_are_as_many_as_there_are_experts_and_not_too_many(drawn: list[Figure]) -> None:
    figures.draw_experts([large(2, 8, top_k=2)], Path("unused"), 400)
    assert len(drawn[0].axes[0].patches) == 16 and drawn[0].get_figheight() < 5
    with pytest.raises(UsageError, match="at most 500 of them in all, not 600"):
        figures.draw_experts([large(8, 64), large(8, 64)], Path("unused"), 300)


def test_overlap_and_chance_equal_a_slow_reference() -> None:
    one, two = large(4, 16, seed=5, top_k=4), large(4, 16, seed=6, top_k=4)
    shared, chance = figures.overlap_curves(one, two, 1000)
    assert len(shared) == 64
    np.testing.assert_allclose(shared, [overlap(one.counts, two.counts, n) for n in range(1, 65)])
    # Against rankings whose places were dealt anew, signs kept.
    dealt = np.random.default_rng(0)
    signs = [np.asarray([e.risk_difference > 0 for e in ranking.experts()]) for ranking in (one, two)]
    found = []
    for _ in range(3000):
        places = dealt.permutation(64)[:20], dealt.permutation(64)[:20]
        mine, theirs = (
            {(int(place), bool(sign)) for place, sign in zip(some, sign_of[:20], strict=True)}
            for some, sign_of in zip(places, signs, strict=True)
        )
        found.append(len(mine & theirs) / 20)
    assert chance[19] == pytest.approx(np.mean(found), abs=0.01)


def test_without_matplotlib_the_extra_is_named(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = run("plot", str(files[0])).exception
    assert isinstance(error, ConfigurationError) and "install vllm-steermoe-plugin[plot]" in str(error)
