"""`steermoe detect`: from contrastive pairs to a ranking file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from expert_registry import Recommended, write_ranking
from expert_registry.errors import RequestError


def detect(
    out: Annotated[Path, typer.Option(help="Ranking file to write.")],
    model: Annotated[str, typer.Option(help="Hub id, folder, or steermoe-lab.")] = "steermoe-lab",
    pairs: Annotated[Path | None, typer.Option(help="JSONL file of contrastive pairs.")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A built-in set of pairs; for steermoe-lab its three behaviours.")
    ] = None,
    behaviour: Annotated[str | None, typer.Option(help="Name of the behaviour (with --pairs).")] = None,
    sides: Annotated[tuple[str, str], typer.Option(help="What side 1 and side 2 are (with --pairs).")] = (
        "shown",
        "not shown",
    ),
    safety: Annotated[bool, typer.Option(help="Reversing it lowers a safety behaviour (with --pairs).")] = False,
    activate: Annotated[int, typer.Option(help="Recommended number of experts to activate (with --pairs).")] = 5,
    deactivate: Annotated[int, typer.Option(help="Recommended number to deactivate (with --pairs).")] = 0,
    model_id: Annotated[str | None, typer.Option(help="Name for the registry; default: --model.")] = None,
    seed: Annotated[int, typer.Option(help="Order and choice of the recipe's pairs.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    engine_args: Annotated[str, typer.Option(help="JSON object of arguments for vllm.LLM.")] = "{}",
) -> None:
    """Count which experts the router selects on both sides of contrastive pairs, and rank them."""
    from vllm_steermoe_plugin.checkpoints import revision_of
    from vllm_steermoe_plugin.detect import SIDES, Behaviour
    from vllm_steermoe_plugin.detect import detect as run
    from vllm_steermoe_plugin.engine import start_engine
    from vllm_steermoe_plugin.pairs import read_pairs
    from vllm_steermoe_plugin.recipes import lab_recipe

    if (pairs is None) == (recipe is None):
        raise RequestError("give either --pairs FILE or --recipe NAME")
    if recipe is not None:
        pair_set, described = lab_recipe(model, recipe, seed)
    else:
        assert pairs is not None
        if behaviour is None:
            raise RequestError("--pairs needs --behaviour NAME")
        pair_set = read_pairs(pairs)
        described = Behaviour(behaviour, sides, safety, Recommended(activate=activate, deactivate=deactivate))
    engine = start_engine(model, {"count_groups": SIDES}, **_object(engine_args))
    ranking = run(engine, model_id or model, pair_set, described, revision_of(model))
    write_ranking(ranking, out, overwrite=overwrite)
    typer.echo(f"{out}: {described.name} of {ranking.card.model.id}, {len(pair_set.pairs)} pairs")
    for expert in ranking.experts()[:10]:
        typer.echo(
            f"  layer {expert.layer:3d}  expert {expert.expert:3d}  risk difference {expert.risk_difference:+.3f}"
        )


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"--engine-args is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("--engine-args must be a JSON object")
    return value
