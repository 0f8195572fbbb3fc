"""`steermoe detect`: from contrastive pairs to a ranking file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expert_registry import Recommended, Registry, write_ranking
from expert_registry.errors import RankingFormatError, UsageError
from vllm_steermoe_plugin.cli.detection_summary import print_summary
from vllm_steermoe_plugin.cli.inputs import check_writable, json_object

if TYPE_CHECKING:
    from vllm_steermoe_plugin.detection.pairs import PairSet
    from vllm_steermoe_plugin.detection.recipes.recipe import Recipe

_SIDES = ("shown", "not shown")
_ACTIVATE, _DEACTIVATE = 5, 0


def detect(
    out: Annotated[Path, typer.Option(help="Ranking file to write.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, or steermoe-lab.")] = "steermoe-lab",
    pairs: Annotated[Path | None, typer.Option(help="File of contrastive pairs (JSON, CSV, Parquet).")] = None,
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
        int | None, typer.Option(min=1, help="Maximum number of pairs (a recipe's are shuffled first).")
    ] = None,
    behaviour: Annotated[str | None, typer.Option(help="Name of the behaviour, such as terse (with --pairs).")] = None,
    sides: Annotated[
        tuple[str, str] | None, typer.Option(help="Names of the positive and the negative side (with --pairs).")
    ] = None,
    count: Annotated[
        str | None, typer.Option(help="What counts where a line does not say it: all, or a role (with --pairs).")
    ] = None,
    balance: Annotated[
        bool | None, typer.Option(help="Truncate the longer side's counted span to the shorter one's length.")
    ] = None,
    safety: Annotated[
        bool, typer.Option(help="Mark the behaviour as safety-relevant in the ranking card (with --pairs).")
    ] = False,
    activate: Annotated[
        int | None,
        typer.Option(min=0, help=f"Recommended number of experts to activate (with --pairs); else {_ACTIVATE}."),
    ] = None,
    deactivate: Annotated[
        int | None, typer.Option(min=0, help=f"Recommended number to deactivate (with --pairs); else {_DEACTIVATE}.")
    ] = None,
    model_id: Annotated[
        str | None, typer.Option(help="Model name in the registry; default: --model, or the name of its folder.")
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(min=1, help="Version of the new ranking; default: one more than the newest in the registry."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the recipe's pairs and of the permutations.")] = 0,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip pairs that cannot be counted, and report them.")
    ] = False,
    permutations: Annotated[int, typer.Option(min=0, max=10_000, help="Number of permutations of the test.")] = 999,
    stop_when_stable: Annotated[
        int | None, typer.Option(min=1, help="Stop when the first N experts do not change any more.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint file to resume from; default: --out with .partial.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    engine_args: Annotated[str, typer.Option(help="JSON object of arguments for vllm.LLM.")] = "{}",
) -> None:
    """Rank experts by how often the router selects them on the two sides of contrastive pairs."""
    from vllm_steermoe_plugin.detection.card import check_described
    from vllm_steermoe_plugin.detection.detect import detect as run
    from vllm_steermoe_plugin.detection.engine_client import COUNT_GROUPS
    from vllm_steermoe_plugin.detection.loop import DetectionOptions
    from vllm_steermoe_plugin.detection.recipes.lookup import find_recipe
    from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour, PairSampling, Recipe
    from vllm_steermoe_plugin.engine import start_engine
    from vllm_steermoe_plugin.models.checkpoints import resolve_checkpoint, shape_in

    arguments = json_object(engine_args)
    if sum(given is not None for given in (pairs, dataset, recipe)) != 1:
        raise UsageError("give either --pairs FILE or --recipe NAME (or --dataset NAME)")
    kept = checkpoint or out.with_name(out.name + ".partial")
    _check_files(out, kept, pairs, data_file)
    if out.exists() and not overwrite:
        raise RankingFormatError(f"{out} exists and rankings are immutable; give another name or --overwrite")
    found: Recipe
    if recipe is not None:
        own = {"behaviour": behaviour, "sides": sides, "count": count, "activate": activate, "deactivate": deactivate}
        given = [f"--{name}" for name, value in own.items() if value is not None] + ["--safety"] * safety
        if given:
            raise UsageError(f"recipe {recipe!r} says itself what {', '.join(given)} would; leave that out")
        found = find_recipe(recipe, model, PairSampling(seed, limit, data_file, skip_bad))
    else:
        if behaviour is None:
            raise UsageError(f"--{'pairs' if pairs is not None else 'dataset'} needs --behaviour NAME")
        if data_file is not None:
            raise UsageError("--data-file holds the rows of a --recipe; a file of pairs is given by --pairs")
        numbers = Recommended(
            activate=_ACTIVATE if activate is None else activate,
            deactivate=_DEACTIVATE if deactivate is None else deactivate,
        )
        read = _read(pairs, dataset or "", count, skip_bad)
        found = Recipe(read.first(limit), Behaviour(behaviour, sides or _SIDES, safety, numbers))
    folder = Path(resolve_checkpoint(model))
    if folder.is_dir():
        # Before the weights are loaded, which takes minutes for a large model.
        shape_in(folder)
    name = model_id or _name_of(model)
    check_described(name, found.behaviour, found.pairs)
    version = version or Registry.default().next_version(name, found.behaviour.name)
    described = replace(found.behaviour, version=version)
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
    ranking = run(engine, name, found.pairs, described, options=options)
    write_ranking(ranking, out, overwrite=overwrite)
    kept.unlink(missing_ok=True)
    typer.echo(f"{out}: {described.name}@{version} of {name}, {ranking.card.data.pairs} pairs")
    print_summary(ranking)


def _check_files(out: Path, kept: Path, *read: Path | None) -> None:
    check_writable(out)
    check_writable(kept)
    named = [path.resolve() for path in (out, kept, *read) if path is not None]
    if len(set(named)) < len(named):
        raise UsageError("--out, --checkpoint and the file that is read must be different files")


def _read(pairs: Path | None, dataset: str, count: str | None, skip_bad: bool) -> PairSet:
    from vllm_steermoe_plugin.detection.datasets import pairs_from_hub
    from vllm_steermoe_plugin.detection.pairs import read_pairs

    if pairs is not None:
        return read_pairs(pairs, count=count, skip_bad=skip_bad)
    return pairs_from_hub(dataset, count=count, skip_bad=skip_bad)


def _name_of(model: str) -> str:
    """Under which name a ranking of a model given as `--model` will be looked up."""
    from pydantic import ValidationError

    from expert_registry import ModelRef
    from vllm_steermoe_plugin.models.checkpoints import names_of

    for name in names_of(model):
        try:
            return ModelRef(id=name, architecture="any").id
        except ValidationError:
            continue
    raise UsageError(
        f"{model!r} is no name for a registry; give one by --model-id, such as OWNER/NAME or the served model name"
    )


def _tell(text: str) -> None:
    typer.echo(text, err=True)
