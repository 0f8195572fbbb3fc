"""Put rankings into registry folders. A version that is there is never replaced by another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from expert_registry.errors import RankingFormatError
from expert_registry.files import read_bounded, write_atomic
from expert_registry.format import content_hash, dump_ranking, parse_ranking, read_bytes, write_bytes, write_ranking
from expert_registry.places import Entry, place_of
from expert_registry.ranking import Ranking

LICENSE_FILE = "LICENSE"
MAX_LICENSE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """A ranking that is in a registry folder now."""

    path: Path
    sha256: str
    new: bool
    """False: the very same file was there already."""


def publish(ranking: Ranking, folder: Path, *, overwrite: bool = False) -> Path:
    """Store a ranking in a registry folder at the place that its ranking card specifies, and return the path.

    Raises:
        RankingFormatError: that version exists (unless `overwrite`), or the counts are impossible.
    """
    path = place_of(folder, ranking.card)
    write_ranking(ranking, path, overwrite=overwrite)
    return path


def store(data: bytes, folder: Path, name: str) -> Stored:
    """Store the bytes of a ranking file as they are; the same bytes twice are no error.

    Args:
        data: of the file.
        folder: a registry folder.
        name: of where the bytes came from, for the errors.

    Raises:
        RankingFormatError: they are no ranking, or another one is there under the same version.
    """
    path = place_of(folder, parse_ranking(data, name).card)
    digest = content_hash(data)
    try:
        write_bytes(data, path)
    except RankingFormatError:
        if path.is_file() and content_hash(read_bytes(path)) == digest:
            return Stored(path, digest, new=False)
        raise
    return Stored(path, digest, new=True)


def store_converted(ranking: Ranking, license_text: bytes, folder: Path) -> Stored:
    """Store a ranking that was converted from a release, with the release's licence beside it."""
    stored = store(dump_ranking(ranking), folder, f"the converted {ranking.card.behaviour} of {ranking.card.model.id}")
    write_atomic(stored.path.parent / LICENSE_FILE, license_text, overwrite=True)
    return stored


def share(entry: Entry, folder: Path, *, converted: bool = False) -> Stored:
    """Copy a ranking, with its licence file if it has one, to another registry folder.

    Raises:
        RankingFormatError: another ranking is there under the same version; or this one was converted from
            somebody else's release, whose licence governs what may be passed on, and `converted` is not given.
    """
    data = entry.read()
    ranking = parse_ranking(data, str(entry.path))
    if ranking.card.source is not None and not converted:
        raise RankingFormatError(
            f"{entry.name} was converted from {ranking.card.source.repository} and is not yours to publish without "
            f"its licence ({ranking.card.license[:200]}); say so explicitly to publish it"
        )
    stored = store(data, folder, entry.name)
    license_file = entry.path.parent / LICENSE_FILE
    if license_file.is_file():
        text = read_bounded(license_file, MAX_LICENSE_BYTES, inside=entry.folder)
        write_atomic(stored.path.parent / LICENSE_FILE, text, overwrite=True)
    return stored
