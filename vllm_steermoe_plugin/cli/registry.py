"""`steermoe registry`: what rankings there are, and what is in one."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from expert_registry import Registry
from expert_registry.errors import RequestError

registry = typer.Typer(no_args_is_help=True, help="Rankings, by model and behaviour.")

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@registry.command("list")
def list_rankings(as_json: Json = False) -> None:
    """List all rankings."""
    rows: list[dict[str, Any]] = []
    for entry in Registry.default().entries():
        card = entry.card()
        rows.append(
            {
                "model": card.model.id,
                "behaviour": card.behaviour,
                "version": card.version,
                "num_experts": card.num_experts,
                "top_k": card.top_k,
                "pairs": card.data.pairs,
                "license": card.license,
                "path": str(entry.path),
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table("model", "behaviour", "version", "experts", "top-k", "pairs", "license")
    for row in rows:
        columns = ("model", "behaviour", "version", "num_experts", "top_k", "pairs", "license")
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


@registry.command()
def show(
    model: Annotated[str, typer.Argument(help="Model name.")],
    behaviour: Annotated[str, typer.Argument(help="Behaviour, or behaviour@version.")],
    top: Annotated[int, typer.Option(help="How many experts.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """Show a ranking's card, hash and top experts."""
    name, _, version = behaviour.partition("@")
    if version and not version.isdigit():
        raise RequestError(f"{behaviour!r}: a version is a number, got {version!r}")
    found = Registry.default().find([model], name, version=int(version) if version else None)
    experts = [[e.layer, e.expert, e.risk_difference] for e in found.ranking.experts()[:top]]
    if as_json:
        fields = found.ranking.card.model_dump(mode="json")
        tokens = found.ranking.counts.tokens.tolist()
        answer = {
            "card": fields,
            "sha256": found.sha256,
            "path": str(found.entry.path),
            "tokens": tokens,
            "experts": experts,
        }
        typer.echo(json.dumps({**answer, "trace": list(found.trace)}, indent=1))
        return
    card = found.ranking.card
    typer.echo(f"{found.entry.name}  sha256 {found.sha256}")
    typer.echo(f"  {found.ranking.shape}")
    typer.echo(f"  side 1 {card.sides[0]}; side 2 {card.sides[1]}; {card.data.pairs} pairs ({card.data.name})")
    typer.echo(f"  recommended: activate {card.recommended.activate}, deactivate {card.recommended.deactivate}")
    for line in found.trace:
        typer.echo(f"  {line}")
    for layer, expert, difference in experts:
        typer.echo(f"  layer {layer:3d}  expert {expert:3d}  risk difference {difference:+.3f}")
