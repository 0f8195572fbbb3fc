"""`steermoe registry pull` and `import`: published rankings, converted and stored in the user's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expert_registry import pull as pulling
from expert_registry.errors import RequestError
from expert_registry.hub import HubRepository
from expert_registry.places import user_folder
from expert_registry.pull_index import DEFAULT_INDEX, Pullable, PullIndex, load_index
from expert_registry.sharing import Stored
from vllm_steermoe_plugin.progress import byte_progress

AcceptLicense = Annotated[bool, typer.Option("--accept-license", help="You accept the licence that is shown.")]
Index = Annotated[Path, typer.Option(help="Index of what can be pulled.", show_default=False)]


def pull(
    model: Annotated[str, typer.Argument(help="Model, such as Qwen/Qwen3-30B-A3B.")],
    behaviour: Annotated[str | None, typer.Argument(help="Behaviour; default: all.")] = None,
    accept_license: AcceptLicense = False,
    source_url: Annotated[str | None, typer.Option(help="Fetch from this address instead (a mirror).")] = None,
    index: Index = DEFAULT_INDEX,
    hub: Annotated[
        str | None, typer.Option(help="A data-set repository of the Hugging Face hub: ORG/NAME[@REVISION].")
    ] = None,
) -> None:
    """Fetch published rankings of a model, check their hashes, convert and store them."""
    folder = user_folder()
    if hub is not None:
        if not accept_license:
            raise RequestError(
                "the licence of hub rankings stands in their cards and on the repository's page; "
                "say --accept-license if you accept it"
            )
        for stored in HubRepository.parse(hub).pull(model, behaviour, folder):
            _report(stored)
        return
    known = load_index(index)
    items = known.find(model, behaviour)
    _show_license(known, items, None if accept_license else _text(known, items, folder, source_url))
    with byte_progress(sum(item.size for item in items), "pull") as advance:
        done = pulling.pull(known, items, folder, accept_license=accept_license, base_url=source_url, advance=advance)
    for stored in done:
        _report(stored)


def import_files(
    directory: Annotated[Path, typer.Argument(help="Folder with files of a release, as they were published.")],
    accept_license: AcceptLicense = False,
    index: Index = DEFAULT_INDEX,
) -> None:
    """Convert published rankings from files that you have. No network is used."""
    known = load_index(index)
    if not accept_license and known.rankings:
        source = known.rankings[0].source
        _show_license(known, known.rankings, pulling.license_in(known, source, directory))
    for _, stored in pulling.import_folder(known, directory, user_folder(), accept_license=accept_license):
        _report(stored)


def _text(index: PullIndex, items: list[Pullable], folder: Path, base_url: str | None) -> bytes:
    return pulling.fetch_license(index, items[0].source, folder, base_url=base_url)


def _show_license(index: PullIndex, items: tuple[Pullable, ...] | list[Pullable], text: bytes | None) -> None:
    """Show the whole licence until it is accepted, and from then on one line."""
    for name in dict.fromkeys(item.source for item in items):
        source = index.sources[name]
        if text is not None:
            typer.echo(text.decode("utf-8", "replace"))
        typer.echo(f"{source.repository} at {source.revision}: {source.license.name}. {source.license.summary}")


def _report(stored: Stored) -> None:
    typer.echo(f"{'stored' if stored.new else 'there already'}: {stored.path}  sha256 {stored.sha256}")
