"""`steermoe detect`: from contrastive pairs to a ranking file."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from expert_registry import Ranking, Recommended, cautions, intervals, write_ranking
from expert_registry import statistics as stats
from expert_registry.errors import RankingFormatError, RequestError

if TYPE_CHECKING:
    from vllm_steermoe_plugin.recipe import Recipe

_SHOWN = 10
_SIDES = ("shown", "not shown")
_ACTIVATE, _DEACTIVATE = 5, 0


def detect(
    out: Annotated[Path, typer.Option(help="Ranking file to write.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, or steermoe-lab.")] = "steermoe-lab",
    pairs: Annotated[Path | None, typer.Option(help="JSONL file of contrastive pairs.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Hub data set with the columns of such a file: OWNER/NAME or OWNER/NAME:SPLIT.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Built-in pairs: digits, faithfulness, safety; for steermoe-lab also refusal."),
    ] = None,
    data_file: Annotated[
        Path | None, typer.Option(help="JSON lines with the columns of the recipe's data set, instead of the hub.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many pairs: the first ones, of a recipe in a drawn order.")
    ] = None,
    behaviour: Annotated[str | None, typer.Option(help="Name of the behaviour, such as terse (with --pairs).")] = None,
    sides: Annotated[
        tuple[str, str] | None, typer.Option(help="What side 1 and side 2 are, in words (with --pairs).")
    ] = None,
    count: Annotated[
        str | None, typer.Option(help="What counts where a line does not say it: all, or a role (with --pairs).")
    ] = None,
    balance: Annotated[
        bool | None, typer.Option(help="Count as many tokens of the longer side as the shorter has.")
    ] = None,
    safety: Annotated[bool, typer.Option(help="Reversing it lowers a safety behaviour (with --pairs).")] = False,
    activate: Annotated[
        int | None,
        typer.Option(min=0, help=f"Recommended number of experts to activate (with --pairs); else {_ACTIVATE}."),
    ] = None,
    deactivate: Annotated[
        int | None, typer.Option(min=0, help=f"Recommended number to deactivate (with --pairs); else {_DEACTIVATE}.")
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="Name for the registry; default: --model, or the name that its folder bears.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Order and choice of the recipe's pairs; permutations.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out pairs that cannot be counted.")] = False,
    permutations: Annotated[int, typer.Option(min=0, max=10_000, help="Of the permutation test.")] = 999,
    stop_when_stable: Annotated[
        int | None, typer.Option(min=1, help="Stop when the first N experts do not change any more.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to go on from after a kill; default: --out with .partial.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    engine_args: Annotated[str, typer.Option(help="JSON object of arguments for vllm.LLM.")] = "{}",
) -> None:
    """Count which experts the router selects on both sides of contrastive pairs, and rank them."""
    from vllm_steermoe_plugin.behaviour import Behaviour
    from vllm_steermoe_plugin.checkpoints import resolve_checkpoint, revision_of, shape_in
    from vllm_steermoe_plugin.data_rows import pairs_from_hub
    from vllm_steermoe_plugin.detect import detect as run
    from vllm_steermoe_plugin.detection_card import check_described
    from vllm_steermoe_plugin.detection_loop import DetectionOptions
    from vllm_steermoe_plugin.engine import start_engine
    from vllm_steermoe_plugin.pair_counting import COUNT_GROUPS
    from vllm_steermoe_plugin.pairs import read_pairs
    from vllm_steermoe_plugin.recipe import Recipe
    from vllm_steermoe_plugin.recipes import find_recipe

    arguments = json_object(engine_args)
    if sum(given is not None for given in (pairs, dataset, recipe)) != 1:
        raise RequestError("give either --pairs FILE or --recipe NAME (or --dataset NAME)")
    kept = checkpoint or out.with_name(out.name + ".partial")
    check_writable(out)
    check_writable(kept)
    if out.exists() and not overwrite:
        raise RankingFormatError(f"{out} exists and rankings are immutable; give another name or --overwrite")
    found: Recipe
    if recipe is not None:
        own = {"behaviour": behaviour, "sides": sides, "count": count, "activate": activate, "deactivate": deactivate}
        given = [f"--{name}" for name, value in own.items() if value is not None] + ["--safety"] * safety
        if given:
            raise RequestError(f"recipe {recipe!r} says itself what {', '.join(given)} would; leave that out")
        found = find_recipe(recipe, model, seed=seed, limit=limit, data_file=data_file)
    else:
        if behaviour is None:
            raise RequestError(f"--{'pairs' if pairs is not None else 'dataset'} needs --behaviour NAME")
        if data_file is not None:
            raise RequestError("--data-file holds the rows of a --recipe; a file of pairs is given by --pairs")
        read = (
            read_pairs(pairs, count=count, skip_bad=skip_bad)
            if pairs is not None
            else pairs_from_hub(dataset or "", count=count, skip_bad=skip_bad)
        )
        numbers = Recommended(
            activate=_ACTIVATE if activate is None else activate,
            deactivate=_DEACTIVATE if deactivate is None else deactivate,
        )
        found = Recipe(read.first(limit), Behaviour(behaviour, sides or _SIDES, safety, numbers))
    folder = Path(resolve_checkpoint(model))
    if folder.is_dir():
        # Before the weights are loaded, which takes minutes for a large model.
        shape_in(folder)
    name = model_id or _name_of(model)
    check_described(name, found.behaviour, found.pairs)
    for text in found.pairs.skipped:
        _tell(f"skipped: {text}")
    options = DetectionOptions(
        balance=found.balance if balance is None else balance,
        skip_bad=skip_bad,
        permutations=permutations,
        seed=seed,
        stop_when_stable=stop_when_stable,
        checkpoint=kept,
        report=_tell,
    )
    engine = start_engine(model, {"count_groups": COUNT_GROUPS}, **arguments)
    ranking = run(engine, name, found.pairs, found.behaviour, revision_of(name), options)
    write_ranking(ranking, out, overwrite=overwrite)
    kept.unlink(missing_ok=True)
    typer.echo(f"{out}: {found.behaviour.name} of {ranking.card.model.id}, {ranking.card.data.pairs} pairs")
    _summary(ranking)


def _name_of(model: str) -> str:
    """Under which name a ranking of a model given as `--model` will be looked up."""
    from pydantic import ValidationError

    from expert_registry import ModelRef
    from vllm_steermoe_plugin.checkpoints import names_of

    for name in names_of(model):
        try:
            return ModelRef(id=name, architecture="any").id
        except ValidationError:
            continue
    raise RequestError(
        f"{model!r} is no name for a registry; give one by --model-id, such as OWNER/NAME or the served model name"
    )


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        RequestError: it is a folder, or its folder cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror or error}") from None
    if path.is_dir():
        raise RequestError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"cannot write {path}: its folder cannot be written to")


def _summary(ranking: Ranking) -> None:
    """The first experts with intervals and tests, how stable they are, and what speaks against them."""
    counts, clusters = ranking.counts, ranking.clusters
    for text in cautions(counts, clusters):
        _tell(f"caution: {text}")
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


def _tell(text: str) -> None:
    typer.echo(text, err=True)


def json_object(text: str) -> dict[str, Any]:
    """The value of `--engine-args`."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"--engine-args is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("--engine-args must be a JSON object")
    return value
