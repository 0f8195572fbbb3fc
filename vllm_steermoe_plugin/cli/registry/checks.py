"""`steermoe registry verify` and `diff`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from expert_registry import Registry
from expert_registry.candidates import check_place
from expert_registry.compare import compare_rankings
from expert_registry.errors import FileError, RankingFormatError
from expert_registry.format import content_hash, parse_ranking
from expert_registry.places import Entry, model_key
from expert_registry.status import read_status
from vllm_steermoe_plugin.cli.registry.opening import Json, Locked, open_ranking
from vllm_steermoe_plugin.progress_bar import track


def verify(
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    behaviour: Annotated[str | None, typer.Argument(help="Only this behaviour.")] = None,
    locked: Locked = None,
    as_json: Json = False,
) -> None:
    """Read every ranking in full and check it, its place and, with a lock file, its hash. Status 1 if one is bad."""
    registry = Registry.default(locked)
    entries = [
        entry
        for entry in registry.entries()
        if (model is None or entry.model_key == model_key(model)) and behaviour in (None, entry.behaviour)
    ]
    rows = [_check(entry, registry) for entry in track(entries, "verify")]
    found = {row["name"].partition("@")[0] for row in rows}
    if registry.lock is not None and model is None:
        missing = sorted(set(registry.lock.rankings) - found)
        rows += [{"name": name, "path": "", "sha256": "", "problem": "locked, but not there"} for name in missing]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        for row in rows:
            typer.echo(
                f"{'BAD ' if row['problem'] else 'good'}  {row['name']}  {row['sha256']}  {row['problem']}".rstrip()
            )
    if any(row["problem"] for row in rows):
        raise typer.Exit(1)


def _check(entry: Entry, registry: Registry) -> dict[str, str]:
    digest, problem = "", ""
    try:
        data = entry.read()
        digest = content_hash(data)
        check_place(entry, parse_ranking(data, str(entry.path)))
        read_status(entry.folder, entry.model_key, entry.behaviour)
    except (FileError, RankingFormatError) as error:
        problem = str(error)
    pinned = registry.lock.rankings.get(f"{entry.model_key}/{entry.behaviour}") if registry.lock else None
    if not problem and pinned is not None and pinned.version == entry.version and pinned.sha256 != digest:
        problem = f"the lock file pins sha256 {pinned.sha256}"
    return {"name": entry.name, "path": str(entry.path), "sha256": digest, "problem": problem}


def diff(
    first: Annotated[str, typer.Argument(help="MODEL/BEHAVIOUR[@VERSION] or a ranking file.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    top: Annotated[int, typer.Option(help="Compare the first so many experts of each.", min=1)] = 50,
    as_json: Json = False,
) -> None:
    """Say in what two rankings differ: cards, weights, risk differences, and how many of the top experts they share."""
    registry = Registry.default()
    (name_1, one, hash_1), (name_2, two, hash_2) = (open_ranking(text, registry) for text in (first, second))
    compared = compare_rankings(one, two, top=top)
    if as_json:
        names = {"first": name_1, "second": name_2, "identical": hash_1 == hash_2}
        typer.echo(json.dumps({**names, **compared.as_dict()}, indent=1))
        return
    typer.echo(f"- {name_1}  {hash_1}\n+ {name_2}  {hash_2}")
    if hash_1 == hash_2:
        typer.echo("identical")
        return
    for field, (old, new) in compared.card.items():
        typer.echo(f"{field}\n  - {json.dumps(old)}\n  + {json.dumps(new)}")
    if compared.weights is not None:
        old_weights, new_weights = (weights or "none" for weights in compared.weights)
        typer.echo(f"the rankings' own weights\n  - {old_weights}\n  + {new_weights}")
    if compared.largest_change is None:
        typer.echo("the shapes differ, so their experts cannot be compared")
        return
    layer, expert, before, after = compared.largest_change
    typer.echo(f"{compared.shared} of the first {compared.top} experts are the same")
    typer.echo(f"largest change: layer {layer}, expert {expert}: risk difference {before:+.4f} -> {after:+.4f}")
