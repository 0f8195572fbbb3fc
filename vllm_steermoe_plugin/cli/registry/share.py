"""`steermoe registry add`, `export`, `publish` and `lock`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from expert_registry import Registry
from expert_registry.errors import UnknownRankingError, UsageError
from expert_registry.format import content_hash, read_bytes, write_bytes
from expert_registry.lock import Pin, write_lock
from expert_registry.places import default_folders, model_key, user_folder
from expert_registry.sharing import share, store
from expert_registry.weights import own_weights
from vllm_steermoe_plugin.cli.registry.opening import Json, find, open_ranking
from vllm_steermoe_plugin.progress_bar import track

LOCK_FILE = Path("steermoe.lock")


def add(
    files: Annotated[list[Path], typer.Argument(help="Ranking files.")],
    folder: Annotated[Path | None, typer.Option(help="Registry folder; default: your own.")] = None,
) -> None:
    """Put ranking files into a registry folder, at the place that their cards name."""
    for file in files:
        stored = store(read_bytes(file), folder or user_folder(), str(file))
        typer.echo(f"{'stored' if stored.new else 'there already'}: {stored.path}  sha256 {stored.sha256}")


def export(
    model: Annotated[str, typer.Argument(help="Model name.")],
    behaviour: Annotated[str, typer.Argument(help="Behaviour or behaviour@version.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors for the ranking itself, .json to read.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write one ranking to a file: the same bytes, or as JSON with every expert and its risk difference."""
    found = find(model, behaviour, Registry.default())
    if out.suffix == ".json":
        weights = own_weights(found.ranking)
        value = {
            "card": found.ranking.card.model_dump(mode="json"),
            "sha256": found.sha256,
            "tokens": found.ranking.counts.tokens.tolist(),
            "weights": asdict(weights) if weights else None,
            "experts": [[e.layer, e.expert, e.risk_difference] for e in found.ranking.experts()],
        }
        data = (json.dumps(value) + "\n").encode()
    elif out.suffix == ".safetensors":
        data = found.entry.read()
    else:
        raise UsageError(f"{out}: export writes .safetensors or .json, not {out.suffix or 'a file without suffix'!r}")
    write_bytes(data, out, overwrite=overwrite)
    typer.echo(f"{out}: {found.entry.name}, {len(data)} bytes, sha256 {content_hash(data)}")


def publish(
    directory: Annotated[Path, typer.Argument(help="Registry folder to publish in, such as a clone of a data set.")],
    model: Annotated[str | None, typer.Argument(help="Only this model.")] = None,
    behaviour: Annotated[str | None, typer.Argument(help="Only this behaviour.")] = None,
    include_converted: Annotated[
        bool, typer.Option(help="Also what was converted from releases under their own licence.")
    ] = False,
) -> None:
    """Copy your own rankings to another registry folder. A version that is there is never replaced."""
    own = Registry((user_folder(),))
    entries = [
        entry
        for entry in own.entries()
        if (model is None or entry.model_key == model_key(model)) and behaviour in (None, entry.behaviour)
    ]
    if not entries:
        raise UnknownRankingError(f"nothing to publish: {user_folder()} has no such ranking")
    if model is None and not include_converted:
        for entry in [entry for entry in entries if entry.card().source is not None]:
            entries.remove(entry)
            typer.echo(f"left out: {entry.name}, converted from a release under its own licence (--include-converted)")
    for entry in track(entries, "publish"):
        stored = share(entry, directory, converted=include_converted)
        typer.echo(f"{'published' if stored.new else 'there already'}: {stored.path}  sha256 {stored.sha256}")


def lock(
    rankings: Annotated[
        list[str] | None, typer.Argument(help="MODEL/BEHAVIOUR[@VERSION]; default: the newest of everything.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Lock file to write.")] = LOCK_FILE,
    as_json: Json = False,
) -> None:
    """Pin rankings by sha256. With the file, `--locked` or $STEERMOE_LOCK refuses anything else."""
    # Without the lock that may be set: it is about to be written anew.
    registry = Registry(default_folders())
    names = rankings or list(dict.fromkeys(f"{e.model_key}/{e.behaviour}" for e in registry.entries()))
    pins: dict[str, Pin] = {}
    for name in track(names, "lock"):
        entry_name, ranking, sha256 = open_ranking(name, registry)
        key = entry_name.partition("@")[0]
        if "/" not in key or Path(name).is_file():
            raise UsageError(f"{name}: only what is in a registry can be locked; use `steermoe registry add`")
        pins[key] = Pin(version=ranking.card.version, sha256=sha256)
    write_lock(out, pins)
    if as_json:
        typer.echo(json.dumps({key: pin.model_dump() for key, pin in pins.items()}, indent=1))
    else:
        typer.echo(f"{out}: {len(pins)} rankings")
