"""The registry and the rankings that a sub-command is about."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expert_registry import Registry
from expert_registry.behaviours import parse_reference
from expert_registry.errors import UsageError
from expert_registry.format import content_hash, parse_ranking, read_bytes
from expert_registry.places import model_key
from expert_registry.ranking import Ranking
from expert_registry.registry import Found
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.models.checkpoints import names_of, resolve_checkpoint, shape_in

Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
Locked = Annotated[Path | None, typer.Option("--locked", help="Lock file; default: $STEERMOE_LOCK, if set.")]


def find(
    model: str,
    reference: str,
    registry: Registry,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    sha256: str | None = None,
) -> Found:
    """The ranking of a model given by hub id, folder or alias; for a folder, of exactly its shape."""
    behaviour, version = parse_reference(reference)
    folder = Path(resolve_checkpoint(model))
    has_config = (folder / "config.json").is_file()
    return registry.find(
        names_of(model),
        behaviour,
        version=version,
        shape=shape_in(folder) if has_config else None,
        base_model=base_model,
        revision=revision,
        sha256=sha256,
    )


def open_ranking(text: str, registry: Registry) -> tuple[str, Ranking, str]:
    """A ranking by its file or by `MODEL/BEHAVIOUR[@VERSION]`: a name for it, the ranking, its sha256."""
    path = Path(text)
    if path.is_file():
        data = read_bytes(path)
        return text, parse_ranking(data, text), content_hash(data)
    model, _, reference = text.rpartition("/")
    found = find(model, reference, registry)
    return found.entry.name, found.ranking, found.sha256


def shape_of_model(model: str, registry: Registry) -> MoEShape:
    """The shape of a model given by hub id, folder or alias: by its config, else by its rankings.

    Raises:
        UsageError: neither is there, or its rankings are not of one shape.
        UnsupportedModelError, FileError, RankingFormatError: a config or a ranking cannot be used.
    """
    folder = Path(resolve_checkpoint(model))
    if (folder / "config.json").is_file():
        return shape_in(folder)
    keys = {model_key(name) for name in names_of(model)}
    entries = [entry for entry in registry.entries() if entry.model_key in keys]
    shapes = {parse_ranking(entry.read(), str(entry.path)).shape for entry in entries}
    if len(shapes) != 1:
        raise UsageError(
            f"model {model!r:.80}: no config.json in such a folder, and {len(shapes)} shapes in its {len(entries)} "
            "rankings; name the checkpoint's folder"
        )
    return shapes.pop()
