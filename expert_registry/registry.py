"""Find the ranking for a model and a behaviour, and say why each candidate was taken or not.

A registry is a list of folders. Each holds `MODEL/BEHAVIOUR/vN.safetensors`, where MODEL is
the model's id in lower case with `/` written as `--`. Earlier folders win for equal versions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from expert_registry.card import RankingCard
from expert_registry.errors import RankingFormatError, UnknownRankingError, one_of
from expert_registry.format import SUFFIX, content_hash, parse_ranking, read_bytes, read_card, write_ranking
from expert_registry.ranking import Ranking
from expert_registry.shape import MoEShape

BUNDLED = Path(__file__).parent / "rankings"
USER_FOLDER_VARIABLE = "STEERMOE_REGISTRY"
_VERSION = re.compile(r"v([1-9][0-9]{0,5})")


def model_key(model: str) -> str:
    """The folder name of a model id: case does not matter, `/` becomes `--`."""
    return model.strip().strip("/").lower().replace("/", "--")


def user_folder() -> Path:
    """Where the user's own rankings live: $STEERMOE_REGISTRY or ~/.local/share/steermoe/rankings."""
    named = os.environ.get(USER_FOLDER_VARIABLE)
    return Path(named) if named else Path.home() / ".local" / "share" / "steermoe" / "rankings"


@dataclass(frozen=True, slots=True)
class Entry:
    """One ranking file that a registry knows, before it is read."""

    model_key: str
    behaviour: str
    version: int
    path: Path

    @property
    def name(self) -> str:
        return f"{self.model_key}/{self.behaviour}@{self.version}"

    def card(self) -> RankingCard:
        return read_card(self.path)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A ranking with its place and the sha256 of its file."""

    entry: Entry
    ranking: Ranking
    sha256: str
    trace: tuple[str, ...]
    """One line per candidate: accepted or rejected, and why."""


@dataclass(frozen=True, slots=True)
class Registry:
    """Rankings in a list of folders."""

    folders: tuple[Path, ...]

    @classmethod
    def default(cls) -> Registry:
        """The user's folder, then the rankings that ship with the package."""
        return cls((user_folder(), BUNDLED))

    def entries(self) -> Iterator[Entry]:
        """All rankings, by model, behaviour and version; a version shadowed by an earlier folder is left out."""
        seen: dict[tuple[str, str, int], Path] = {}
        for folder in self.folders:
            for path in folder.glob(f"*/*/v*{SUFFIX}"):
                match = _VERSION.fullmatch(path.stem)
                if match:
                    seen.setdefault((path.parts[-3], path.parts[-2], int(match[1])), path)
        for key in sorted(seen):
            yield Entry(*key, seen[key])

    def behaviours(self, models: Iterable[str]) -> list[str]:
        """Behaviours that have a ranking under any of the names `models`."""
        keys = {model_key(model) for model in models}
        return sorted({entry.behaviour for entry in self.entries() if entry.model_key in keys})

    def find(
        self,
        models: Sequence[str],
        behaviour: str,
        *,
        version: int | None = None,
        shape: MoEShape | None = None,
    ) -> Found:
        """The newest ranking (or that of `version`) of `behaviour` for a model.

        Args:
            models: the names under which the model is known, the most telling first.
            behaviour: such as `faithfulness`.
            version: exactly this one; None for the newest.
            shape: the served model's; rankings of another shape are rejected.

        Raises:
            UnknownRankingError: nothing fits; the message lists what exists and each rejection.
            RankingFormatError: the file that fits is damaged.
        """
        entries = list(self.entries())
        keys = list(dict.fromkeys(model_key(model) for model in models))
        of_model = [entry for entry in entries if entry.model_key in keys]
        if not of_model:
            known = {entry.model_key for entry in entries}
            raise UnknownRankingError(
                f"no ranking for the model: {one_of(keys[0] if keys else '', known, 'model')} "
                f"(looked up as {', '.join(keys)}); make one with `steermoe detect`"
            )
        of_behaviour = [entry for entry in of_model if entry.behaviour == behaviour]
        if not of_behaviour:
            known = {entry.behaviour for entry in of_model}
            raise UnknownRankingError(f"model {of_model[0].model_key}: {one_of(behaviour, known, 'behaviour')}")
        trace: list[str] = []
        for entry in sorted(of_behaviour, key=lambda e: (keys.index(e.model_key), -e.version)):
            if version is not None and entry.version != version:
                trace.append(f"{entry.name}: rejected, version {version} was asked for")
                continue
            data = read_bytes(entry.path)
            ranking = parse_ranking(data, str(entry.path))
            self._check_place(entry, ranking)
            if shape is not None and ranking.shape != shape:
                trace.append(f"{entry.name}: rejected, it is for {ranking.shape}")
                continue
            trace.append(f"{entry.name}: accepted ({entry.path})")
            return Found(entry, ranking, content_hash(data), tuple(trace))
        asked = f"{behaviour}@{version}" if version is not None else behaviour
        fit = f" that fits {shape}" if shape is not None else ""
        raise UnknownRankingError(f"no ranking {asked}{fit}: " + "; ".join(trace))

    @staticmethod
    def _check_place(entry: Entry, ranking: Ranking) -> None:
        card = ranking.card
        inside = (model_key(card.model.id), card.behaviour, card.version)
        if inside != (entry.model_key, entry.behaviour, entry.version):
            raise RankingFormatError(
                f"{entry.path} says of itself that it is {inside[0]}/{inside[1]}@{inside[2]}; it is in the wrong place"
            )


def publish(ranking: Ranking, folder: Path, *, overwrite: bool = False) -> Path:
    """Store a ranking in a registry folder at the place that its card names, and return the path.

    Raises:
        RankingFormatError: that version exists (unless `overwrite`), or the counts are impossible.
    """
    card = ranking.card
    path = folder / model_key(card.model.id) / card.behaviour / f"v{card.version}{SUFFIX}"
    write_ranking(ranking, path, overwrite=overwrite)
    return path
