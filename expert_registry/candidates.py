"""Why a candidate is not the ranking that was asked for."""

from __future__ import annotations

from dataclasses import dataclass

from expert_registry.errors import RankingFormatError
from expert_registry.lock import Lock
from expert_registry.places import Entry, model_key
from expert_registry.ranking import Ranking
from expert_registry.shape import MoEShape
from expert_registry.status import read_status


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a look-up demands; None demands nothing."""

    version: int | None
    shape: MoEShape | None
    revision: str | None
    sha256: str | None
    lock: Lock | None

    def rejection_reason(self, entry: Entry) -> str | None:
        """What speaks against a file before it is read; None if nothing does."""
        if self.version is not None and entry.version != self.version:
            return f"version {self.version} was asked for"
        withdrawn = read_status(entry.folder, entry.model_key, entry.behaviour).withdrawn.get(str(entry.version))
        if withdrawn is not None:
            instead = f"; use {entry.behaviour}@{withdrawn.use}" if withdrawn.use is not None else ""
            return f"it was withdrawn: {withdrawn.reason}{instead}"
        return self.lock.refusal(entry.model_key, entry.behaviour, entry.version) if self.lock else None


def objection(wanted: Wanted, entry: Entry, ranking: Ranking, sha256: str) -> str | None:
    """What speaks against a ranking that was read; None if nothing does."""
    if wanted.shape is not None and ranking.shape != wanted.shape:
        return f"it is for {ranking.shape}: {'; '.join(ranking.shape.differences(wanted.shape))}"
    counted = ranking.card.model.revision
    if wanted.revision is not None and counted and counted != wanted.revision:
        return f"it was counted on revision {counted[:80]}, not {wanted.revision[:80]}"
    if wanted.sha256 is not None and sha256 != wanted.sha256:
        return f"its sha256 is {sha256}, not {wanted.sha256[:64]}"
    return wanted.lock.refusal(entry.model_key, entry.behaviour, entry.version, sha256) if wanted.lock else None


def check_place(entry: Entry, ranking: Ranking) -> None:
    """Raise RankingFormatError if a file says of itself that it is another ranking than its place says."""
    card = ranking.card
    inside = (model_key(card.model.id), card.behaviour, card.version)
    if inside != (entry.model_key, entry.behaviour, entry.version):
        raise RankingFormatError(
            f"{entry.path} says of itself that it is {inside[0]}/{inside[1]}@{inside[2]}; it is in the wrong place"
        )
