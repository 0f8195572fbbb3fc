"""`steermoe registry list`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from expert_registry import Registry
from expert_registry.errors import FileError, RankingFormatError
from expert_registry.places import Entry
from expert_registry.published.index import load_index
from expert_registry.status import read_status
from vllm_steermoe_plugin.cli.registry.opening import Json

_COLUMNS = ("model", "behaviour", "version", "num_experts", "top_k", "pairs", "license", "status")


def list_rankings(
    as_json: Json = False,
    pullable: Annotated[bool, typer.Option("--pullable", help="List what `pull` can fetch instead.")] = False,
) -> None:
    """List all rankings; damaged and withdrawn ones are marked."""
    rows = _pullable() if pullable else [_row(entry) for entry in Registry.default().entries()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    columns = [column for column in _COLUMNS if any(row.get(column) not in (None, "") for row in rows)]
    table = Table(*columns)
    for row in rows:
        # Of a licence only its name: what it says is for `show`.
        texts = {column: str(row.get(column, "")) for column in columns}
        texts["license"] = texts.get("license", "").partition(":")[0]
        table.add_row(*(texts[column] for column in columns))
    Console().print(table)


def _row(entry: Entry) -> dict[str, Any]:
    row: dict[str, Any] = {"model": entry.model_key, "behaviour": entry.behaviour, "version": entry.version}
    try:
        card = entry.card()
        withdrawn = read_status(entry.folder, entry.model_key, entry.behaviour).withdrawn.get(str(entry.version))
    except (FileError, RankingFormatError) as error:
        return {**row, "path": str(entry.path), "status": f"damaged: {error}"}
    return {
        "model": card.model.id,
        "behaviour": card.behaviour,
        "version": card.version,
        "num_experts": card.num_experts,
        "top_k": card.top_k,
        "pairs": card.data.pairs,
        "license": card.license,
        "path": str(entry.path),
        "status": f"withdrawn: {withdrawn.reason}" if withdrawn else "",
    }


def _pullable() -> list[dict[str, Any]]:
    index = load_index()
    return [
        {
            "model": item.model,
            "behaviour": item.behaviour,
            "version": item.version,
            "num_experts": index.models[item.model].num_experts,
            "top_k": index.models[item.model].top_k,
            "license": index.sources[item.source].license.name,
            "repository": index.sources[item.source].repository,
            "revision": index.sources[item.source].revision,
            "sha256": item.sha256,
        }
        for item in index.rankings
    ]
