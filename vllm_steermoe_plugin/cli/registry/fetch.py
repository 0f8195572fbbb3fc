"""`steermoe registry pull` and `import`: published rankings, converted and stored in the user's folder."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer

from expert_registry.errors import UsageError
from expert_registry.places import user_folder
from expert_registry.published import pull as pulling
from expert_registry.published.hub import HubRepository
from expert_registry.published.index import DEFAULT_INDEX, PullIndex, load_index
from expert_registry.sharing import Stored
from vllm_steermoe_plugin.progress_bar import byte_progress

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
            raise UsageError(
                "the licence of hub rankings stands in their cards and on the repository's page; "
                "say --accept-license if you accept it"
            )
        for stored in HubRepository.parse(hub).pull(model, behaviour, folder):
            _report(stored)
        return
    known = load_index(index)
    items = known.find(model, behaviour)
    sources = pulling.sources_of(items)
    texts = [] if accept_license else [pulling.fetch_license(known, s, folder, base_url=source_url) for s in sources]
    _show_licenses(known, sources, texts)
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
    if not accept_license:
        sources = pulling.sources_of(pulling.items_in(known, directory))
        _show_licenses(known, sources, [pulling.license_in(known, source, directory) for source in sources])
    for _, stored in pulling.import_folder(known, directory, user_folder(), accept_license=accept_license):
        _report(stored)


def _show_licenses(index: PullIndex, sources: list[str], texts: list[bytes]) -> None:
    """Show the whole licence of each source until they are accepted, and from then on (no `texts`) one line each."""
    for name, text in zip_longest(sources, texts):
        source = index.sources[name]
        if text is not None:
            typer.echo(text.decode("utf-8", "replace"))
        typer.echo(f"{source.repository} at {source.revision}: {source.license.name}. {source.license.summary}")


def _report(stored: Stored) -> None:
    typer.echo(f"{'stored' if stored.new else 'there already'}: {stored.path}  sha256 {stored.sha256}")
