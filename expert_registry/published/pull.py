"""Fetch or read published rankings, check them against the index, convert and store them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from expert_registry.errors import PolicyError, UnknownRankingError
from expert_registry.files import read_bounded
from expert_registry.published.download import DownloadError, download
from expert_registry.published.index import Pullable, PullIndex
from expert_registry.published.released_table import read_released_table
from expert_registry.ranking import Ranking
from expert_registry.sharing import Stored, store_converted

_UNFINISHED = ".unfinished"
"""In a registry folder; no model has such a name."""


def fetch_license(index: PullIndex, source: str, folder: Path, *, base_url: str | None = None) -> bytes:
    """The text of a source's licence.

    Raises:
        DownloadError: see `download`.
    """
    terms = index.sources[source].license
    return _fetch(index, source, terms.path, terms.size, terms.sha256, folder, base_url, lambda _: None)


def pull(
    index: PullIndex,
    items: Sequence[Pullable],
    folder: Path,
    *,
    accept_license: bool,
    base_url: str | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Stored]:
    """Fetch published rankings and store them, each with its licence.

    Args:
        index: says where they are and what their hashes are.
        items: rankings of it.
        folder: the registry folder to store them in.
        accept_license: whether the user has accepted the licence of their sources.
        base_url: fetch from there instead of from the source's own address; the hashes must be the same.
        advance: is called with numbers of bytes that came in; in all, the sum of `item.size`.

    Raises:
        PolicyError: the licence has not been accepted.
        DownloadError, PickleRefusedError, RankingFormatError: see those who raise them.
    """
    _check_accepted(index, items, accept_license)
    texts = {source: fetch_license(index, source, folder, base_url=base_url) for source in sources_of(items)}
    stored = []
    for item in items:
        data = _fetch(index, item.source, item.path, item.size, item.sha256, folder, base_url, advance)
        stored.append(store_converted(convert(index, item, data), texts[item.source], folder))
    return stored


def import_folder(
    index: PullIndex, directory: Path, folder: Path, *, accept_license: bool
) -> list[tuple[Pullable, Stored]]:
    """Like `pull`, from files that the user has; those that the index does not know are left alone.

    Raises:
        UnknownRankingError: no file of the index is there.
        DownloadError: a file has the name but not the hash of one of the index.
        PolicyError, PickleRefusedError, RankingFormatError: as for `pull`.
    """
    items = items_in(index, directory)
    _check_accepted(index, items, accept_license)
    texts = {source: license_in(index, source, directory) for source in sources_of(items)}
    result = []
    for item in items:
        data = _read(directory, item.path, item.size, item.sha256)
        result.append((item, store_converted(convert(index, item, data), texts[item.source], folder)))
    return result


def items_in(index: PullIndex, directory: Path) -> list[Pullable]:
    """The rankings of the index whose files the user has.

    Raises:
        UnknownRankingError: there is none.
    """
    items = [item for item in index.rankings if (directory / Path(item.path).name).exists()]
    if not items:
        raise UnknownRankingError(
            f"{directory} holds no file of the index; it should hold files such as "
            f"{Path(index.rankings[0].path).name if index.rankings else '(the index is empty)'}"
        )
    return items


def license_in(index: PullIndex, source: str, directory: Path) -> bytes:
    """The text of a source's licence from the user's files.

    Raises:
        FileError: it is not there.
        DownloadError: it is another text.
    """
    terms = index.sources[source].license
    return _read(directory, terms.path, terms.size, terms.sha256)


def convert(index: PullIndex, item: Pullable, data: bytes) -> Ranking:
    """A published table as a ranking; equal bytes give equal rankings everywhere.

    Raises:
        PickleRefusedError, RankingFormatError: see `read_released_table`.
    """
    return Ranking(read_released_table(data, index.models[item.model].shape), index.card(item))


def sources_of(items: Iterable[Pullable]) -> list[str]:
    """The sources of some rankings, each once."""
    return list(dict.fromkeys(item.source for item in items))


def _check_accepted(index: PullIndex, items: Sequence[Pullable], accepted: bool) -> None:
    if accepted:
        return
    sources = [index.sources[name] for name in sources_of(items)]
    terms = " ".join(f"{s.repository} is under the {s.license.name}: {s.license.summary}" for s in sources)
    raise PolicyError(f"{terms} Nothing was stored. If you accept the licence, say so with --accept-license")


def _read(directory: Path, path: str, size: int, sha256: str) -> bytes:
    file = directory / Path(path).name
    data = read_bounded(file, size)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DownloadError(f"{file} is not the published file: its sha256 is {found}, the index says {sha256}")
    return data


def _fetch(
    index: PullIndex,
    source: str,
    path: str,
    size: int,
    sha256: str,
    folder: Path,
    base_url: str | None,
    advance: Callable[[int], None],
) -> bytes:
    base = base_url if base_url is not None else index.sources[source].base_url
    url = base.rstrip("/") + "/" + quote(path)
    return download(url, folder / _UNFINISHED / sha256, size=size, sha256=sha256, advance=advance)
