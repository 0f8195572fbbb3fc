"""`steermoe registry show`: what is in a ranking, and why it is the one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from expert_registry import Registry
from expert_registry.weights import own_weights
from vllm_steermoe_plugin.cli.registry.opening import Json, Locked, find


def show(
    model: Annotated[str, typer.Argument(help="Hub id, checkpoint folder or served name.")],
    behaviour: Annotated[str, typer.Argument(help="Behaviour, behaviour@version or behaviour@latest.")],
    top: Annotated[int, typer.Option(help="How many experts.", min=1)] = 20,
    base_model: Annotated[str | None, typer.Option(help="Of which MODEL is a fine-tune.")] = None,
    revision: Annotated[str | None, typer.Option(help="Only a ranking counted on this checkpoint revision.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Only the file with this hash.")] = None,
    locked: Locked = None,
    as_json: Json = False,
) -> None:
    """Show a ranking card, its hash and the top experts."""
    registry = Registry.default(locked)
    found = find(model, behaviour, registry, base_model=base_model, revision=revision, sha256=sha256)
    experts = [[e.layer, e.expert, e.risk_difference] for e in found.ranking.experts()[:top]]
    card, weights = found.ranking.card, own_weights(found.ranking)
    if as_json:
        answer = {
            "card": card.model_dump(mode="json"),
            "sha256": found.sha256,
            "path": str(found.entry.path),
            "tokens": found.ranking.counts.tokens.tolist(),
            "weights": asdict(weights) if weights else None,
            "experts": experts,
        }
        typer.echo(json.dumps({**answer, "trace": list(found.trace)}, indent=1))
        return
    typer.echo(f"{found.entry.name}  sha256 {found.sha256}")
    typer.echo(f"  {found.ranking.shape}")
    typer.echo(f"  positive: {card.sides[0]}; negative: {card.sides[1]}; {card.data.pairs} pairs ({card.data.name})")
    typer.echo(f"  recommended: {card.recommended}")
    if card.recommended_reverse is not None:
        typer.echo(f"  reversed: {card.recommended_reverse}")
    if weights is not None:
        typer.echo(f"  weights: {weights}")
    typer.echo(f"  licence: {card.license}")
    if card.source is not None:
        typer.echo(f"  converted from {card.source.repository} at {card.source.revision}: {card.source.path}")
    for line in found.trace:
        typer.echo(f"  {line}")
    for layer, expert, difference in experts:
        typer.echo(f"  layer {layer:3d}  expert {expert:3d}  risk difference {difference:+.3f}")
