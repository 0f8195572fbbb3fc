"""The profiles that an operator has loaded into a server, by name.

Those of the settings stay as they are; others come and go while serving. They live in memory, or in one JSON file
that every front-end process of a server reads again as soon as it was replaced, so that all of them always agree.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

from expert_registry.card import Slug
from expert_registry.documents import Strict, parse_document
from expert_registry.errors import (
    EngineError,
    PolicyError,
    RankingFormatError,
    SteerMoEError,
    UnknownProfileError,
    one_of,
)
from expert_registry.files import write_atomic
from expert_registry.places import model_key
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.profile import SteeringProfile
from vllm_steermoe_plugin.resolve import Resolved, Source

MAX_PROFILES = 256
MAX_STORE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class LoadedProfile:
    """A profile under a name. Its experts are those that were found when it was loaded, whatever the registry says.

    Attributes:
        resolved: the checked profile and its sources.
        asked: the request text that it was loaded from; None for an explicit expert list.
        since: when it was loaded, in ISO 8601, UTC.
        fixed: whether it stands in the settings.
    """

    resolved: Resolved
    asked: str | None
    since: str
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Loaded:
    """All profiles of one moment, and how often the operator has asked for rankings to be looked up anew."""

    profiles: Mapping[str, LoadedProfile]
    refreshed: int = 0

    def get(self, name: str) -> LoadedProfile:
        """The profile of that name.

        Raises:
            UnknownProfileError: there is none; names those that there are.
        """
        found = self.profiles.get(name)
        if found is None:
            raise UnknownProfileError(one_of(name, self.profiles, "loaded profile"))
        return found


class _Row(Strict):
    asked: str | None
    experts: str
    sources: tuple[Source, ...]
    since: str


class _Document(Strict):
    """The file."""

    format_version: Literal[1] = 1
    models: tuple[str, ...]
    architecture: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    refreshed: int = 0
    profiles: dict[Slug, _Row]


class ProfileStore:
    """Thread-safe; safe also between processes that share a file.

    Attributes:
        fixed: the profiles of the settings, by name; set them before the store is used.
    """

    def __init__(self, path: Path | None, models: Sequence[str], shape: MoEShape) -> None:
        """Open the file, or make it.

        Args:
            path: None to keep the profiles in memory.
            models: names of the served model.
            shape: of the served model.

        Raises:
            EngineError: it cannot be read or written, or was made for another model.
        """
        self.fixed: Mapping[str, LoadedProfile] = {}
        self._path = path
        self._models = tuple(models)
        self._shape = shape
        self._changing, self._reading = threading.Lock(), threading.Lock()
        self._loaded = Loaded({})
        self._file: BinaryIO | None = None
        self._identity: tuple[int, ...] = ()
        if path is not None:
            with self._exclusive():
                if not path.exists():
                    self._write(self._loaded)
            self.current()

    def current(self) -> Loaded:
        """The profiles of now. With a file that has not changed, this costs one `stat`.

        Raises:
            EngineError: the file cannot be read; nothing is then taken from what it said before.
        """
        loaded = self._loaded
        if self._path is not None:
            with self._reading:
                loaded = self._current_of(self._path)
        return replace(loaded, profiles={**loaded.profiles, **self.fixed}) if self.fixed else loaded

    def put(self, name: str, profile: LoadedProfile, check: Callable[[], None] = lambda: None) -> bool:
        """Load a profile; whether it replaced another of that name.

        Args:
            name: of the profile.
            profile: what it is.
            check: called while nobody else can change the store; what it raises keeps the profile out.

        Raises:
            PolicyError: it stands in the settings, or there are too many.
            EngineError: the file cannot be written.
        """
        with self._change(name) as profiles:
            replaced = name in profiles
            if not replaced and len(profiles) >= MAX_PROFILES:
                raise PolicyError(f"{len(profiles)} profiles are loaded, and no more can be; drop one")
            check()
            profiles[name] = profile
        return replaced

    def drop(self, name: str) -> LoadedProfile:
        """Drop a profile and return it.

        Raises:
            UnknownProfileError: there is none of that name.
            PolicyError: it stands in the settings.
            EngineError: the file cannot be written.
        """
        with self._change(name) as profiles:
            return profiles.pop(name, None) or Loaded({**profiles, **self.fixed}).get(name)

    def refresh(self) -> None:
        """Have every process that shares this store look rankings up anew.

        Raises:
            EngineError: the file cannot be written.
        """
        with self._changing, self._exclusive():
            before = self._stored()
            self._write(replace(before, refreshed=before.refreshed + 1))

    @contextmanager
    def _change(self, name: str) -> Iterator[dict[str, LoadedProfile]]:
        if name in self.fixed:
            raise PolicyError(f"profile {name!r} stands in the settings of this server; it is changed there")
        with self._changing, self._exclusive():
            before = self._stored()
            profiles = dict(before.profiles)
            yield profiles
            self._write(replace(before, profiles=profiles))

    def _stored(self) -> Loaded:
        """Without the profiles of the settings."""
        if self._path is None:
            return self._loaded
        with self._reading:
            return self._current_of(self._path)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Keep other processes from changing the file; a lock beside it, since the file itself is replaced."""
        if self._path is None:
            yield
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._path.with_name(self._path.name + ".lock").open("wb")
        except OSError as error:
            raise EngineError(f"the profile store cannot be locked: {error.strerror}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _current_of(self, path: Path) -> Loaded:
        try:
            if _identity(path.stat()) == self._identity:
                return self._loaded
            with ExitStack() as on_failure:
                file = on_failure.enter_context(path.open("rb"))
                identity = _identity(os.fstat(file.fileno()))
                loaded = self._parse(file.read(MAX_STORE_BYTES + 1))
                on_failure.pop_all()
        except OSError as error:
            raise EngineError(f"the profile store cannot be read: {error.strerror}") from None
        # The file stays open: its inode can then not be given to the file that replaces it, so that equal
        # identities always mean the same content.
        if self._file is not None:
            self._file.close()
        self._file, self._identity, self._loaded = file, identity, loaded
        return loaded

    def _parse(self, text: bytes) -> Loaded:
        if len(text) > MAX_STORE_BYTES:
            raise EngineError(f"the profile store is larger than {MAX_STORE_BYTES} bytes")
        try:
            document = parse_document(text, _Document, "the profile store")
            shape = MoEShape(document.architecture, document.layers, document.num_experts, document.top_k)
            loaded = Loaded({name: _from_row(row) for name, row in document.profiles.items()}, document.refreshed)
        except SteerMoEError as error:
            raise EngineError(f"the profile store cannot be read: {error}") from None
        mine, theirs = ({model_key(name) for name in names} for names in (self._models, document.models))
        if shape != self._shape or not mine & theirs:
            raise EngineError(
                f"the profile store is for {', '.join(document.models)} ({shape}), not for {', '.join(self._models)} "
                f"({self._shape}); give this server a store of its own"
            )
        return loaded

    def _write(self, loaded: Loaded) -> None:
        if self._path is None:
            self._loaded = loaded
            return
        document = _Document(
            models=self._models,
            architecture=self._shape.architecture,
            layers=self._shape.layers,
            num_experts=self._shape.num_experts,
            top_k=self._shape.top_k,
            refreshed=loaded.refreshed,
            profiles={name: _to_row(profile) for name, profile in loaded.profiles.items()},
        )
        text = json.dumps(document.model_dump(mode="json"), indent=1, sort_keys=True).encode()
        if len(text) > MAX_STORE_BYTES:
            raise PolicyError(f"the profile store would be larger than {MAX_STORE_BYTES} bytes; drop a profile")
        try:
            write_atomic(self._path, text + b"\n", overwrite=True)
        except RankingFormatError:
            raise EngineError("the profile store cannot be written; is there room, and may the server write?") from None


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _to_row(profile: LoadedProfile) -> _Row:
    resolved = profile.resolved
    return _Row(asked=profile.asked, experts=resolved.profile.to_json(), sources=resolved.sources, since=profile.since)


def _from_row(row: _Row) -> LoadedProfile:
    return LoadedProfile(Resolved(SteeringProfile.from_json(row.experts), row.sources), row.asked, row.since)
