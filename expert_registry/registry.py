"""Find the ranking for a model and a behaviour, and say why each candidate was taken or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from expert_registry.behaviours import canonical
from expert_registry.candidates import Wanted, check_place, objection
from expert_registry.errors import UnknownRankingError, naming, one_of
from expert_registry.format import content_hash, parse_ranking
from expert_registry.lock import Lock, lock_from_environment, read_lock
from expert_registry.places import (
    USER_FOLDER_VARIABLE,
    Entry,
    behaviours_in,
    default_folders,
    model_key,
    models_in,
    user_folder,
    versions_in,
)
from expert_registry.published.index import DEFAULT_INDEX, load_index
from expert_registry.ranking import Ranking
from expert_registry.shape import MoEShape
from expert_registry.sharing import publish
from expert_registry.status import read_status

__all__ = ["USER_FOLDER_VARIABLE", "Entry", "Found", "Registry", "model_key", "publish", "user_folder"]


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
    """Rankings in a list of folders, of which earlier ones win for equal versions.

    Attributes:
        folders: registry folders; those that do not exist are empty.
        lock: if given, nothing but what it pins is found.
    """

    folders: tuple[Path, ...]
    lock: Lock | None = None

    @classmethod
    def default(cls, lock: Path | None = None) -> Registry:
        """The project's folder, the user's, and the rankings that ship with the package.

        Args:
            lock: a lock file to obey; by default the one that $STEERMOE_LOCK names, if any.

        Raises:
            FileError, RankingFormatError: the lock file cannot be read.
        """
        return cls(default_folders(), read_lock(lock) if lock is not None else lock_from_environment())

    def entries(self) -> Iterator[Entry]:
        """All rankings, by model, behaviour and version; a version shadowed by an earlier folder is left out."""
        for key in sorted({key for folder in self.folders for key in models_in(folder)}):
            for behaviour in self._behaviours(key):
                versions = {entry.version: entry for entry in reversed(list(self._versions(key, behaviour)))}
                yield from (versions[number] for number in sorted(versions))

    def behaviours(self, models: Iterable[str]) -> list[str]:
        """Behaviours that have a ranking under any of the names `models`."""
        keys = {model_key(model) for model in models}
        return sorted({b for key in keys for b in self._behaviours(key) if any(self._versions(key, b))})

    def find(
        self,
        models: Sequence[str],
        behaviour: str,
        *,
        version: int | None = None,
        shape: MoEShape | None = None,
        base_model: str | None = None,
        revision: str | None = None,
        sha256: str | None = None,
    ) -> Found:
        """The newest ranking (or that of `version`) of `behaviour` for a model.

        Args:
            models: the names under which the model is known, the most telling first.
            behaviour: such as `faithfulness`, or an alias.
            version: exactly this one; None for the newest that was not withdrawn.
            shape: the served model's; rankings of another shape are rejected.
            base_model: of which the model is a fine-tune, and whose rankings may be used as well.
            revision: the served checkpoint's; rankings of another one are rejected.
            sha256: exactly the file with this hash.

        Raises:
            UnknownRankingError: nothing fits; the message lists what exists and each rejection.
            FileError, RankingFormatError: the file that fits cannot be read.
        """
        wanted = Wanted(version, shape, revision, sha256, self.lock)
        with naming(*self.folders, DEFAULT_INDEX):
            return self._find(models, behaviour, base_model, wanted)

    def _find(self, models: Sequence[str], behaviour: str, base_model: str | None, wanted: Wanted) -> Found:
        keys = list(dict.fromkeys(model_key(model) for model in models))
        base = model_key(base_model) if base_model else None
        trace: list[str] = []
        seen: dict[tuple[str, str, int], Entry] = {}
        for entry in self._candidates([*keys, base] if base and base not in keys else keys, behaviour, trace):
            first = seen.setdefault((entry.model_key, entry.behaviour, entry.version), entry)
            if first is not entry:
                trace.append(f"{entry.name}: rejected, {entry.path} is shadowed by {first.path}")
                continue
            reason = wanted.rejection_reason(entry)
            if reason is None:
                data = entry.read()
                ranking, digest = parse_ranking(data, str(entry.path)), content_hash(data)
                check_place(entry, ranking)
                reason = objection(wanted, entry, ranking, digest)
            if reason is not None:
                trace.append(f"{entry.name}: rejected, {reason}")
                continue
            of = "" if entry.model_key in keys else ", of the base model that was named"
            revision_is = ranking.card.model.revision[:80] or "unknown"
            trace.append(
                f"{entry.name}: accepted ({entry.path}){of}, {ranking.shape}, revision {revision_is}, sha256 {digest}"
            )
            return Found(entry, ranking, digest, tuple(trace))
        asked = f"{behaviour}@{wanted.version}" if wanted.version is not None else behaviour
        fit = f" that fits {wanted.shape}" if wanted.shape is not None else ""
        raise UnknownRankingError(f"no ranking {asked}{fit}: " + "; ".join(trace))

    def next_version(self, model: str, behaviour: str) -> int:
        """The version that a new ranking of `behaviour` for `model` gets: one more than any there is, or 1."""
        return max((entry.version for entry in self._versions(model_key(model), behaviour)), default=0) + 1

    def _behaviours(self, key: str) -> list[str]:
        return sorted({name for folder in self.folders for name in behaviours_in(folder, key)})

    def _versions(self, key: str, behaviour: str) -> Iterator[Entry]:
        return (entry for folder in self.folders for entry in versions_in(folder, key, behaviour))

    def _candidates(self, keys: Sequence[str], behaviour: str, trace: list[str]) -> list[Entry]:
        """What may be meant, the most likely first; renames are followed and go into the trace.

        Raises:
            UnknownRankingError: the model or the behaviour has no place in any folder.
        """
        there = {key: self._behaviours(key) for key in keys}
        if not any(there.values()):
            raise UnknownRankingError(self._unknown_model(keys, behaviour))
        waiting = [(key, canonical(behaviour, names)) for key, names in there.items()]
        places: list[tuple[str, str]] = []
        while waiting:
            place = waiting.pop(0)
            if place in places or place[1] not in self._behaviours(place[0]):
                continue
            places.append(place)
            for folder in self.folders:
                renamed = read_status(folder, *place).renamed
                if renamed is not None:
                    target = (model_key(renamed.model) if renamed.model else place[0], renamed.behaviour)
                    trace.append(
                        f"{'/'.join(place)}: renamed to {'/'.join(target)}: {renamed.reason or 'no reason given'}"
                    )
                    waiting.insert(0, target)
        if not places:
            known = {name for names in there.values() for name in names}
            key = next(key for key, names in there.items() if names)
            raise UnknownRankingError(f"model {key}: {one_of(behaviour, known, 'behaviour')}")
        found = [(rank, -entry.version, entry) for rank, place in enumerate(places) for entry in self._versions(*place)]
        # Stable: of equal versions, those of earlier folders come first.
        return [entry for *_, entry in sorted(found, key=lambda item: item[:2])]

    def _unknown_model(self, keys: Sequence[str], behaviour: str) -> str:
        known = {entry.model_key for entry in self.entries()}
        pullable = {model_key(item.model): item for item in load_index(DEFAULT_INDEX).rankings}
        item = next((pullable[key] for key in keys if key in pullable), None)
        remedy = (
            f"fetch the published one with `steermoe registry pull {item.model} {canonical(behaviour, ())[:64]}`"
            if item
            else "make one with `steermoe detect`"
        )
        asked = keys[0] if keys else ""
        return (
            f"no ranking for the model: {one_of(asked, known, 'model')} "
            f"(looked up as {', '.join(key[:200] for key in keys)}); {remedy}"
        )
