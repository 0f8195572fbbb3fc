"""The JSON file in which a server keeps its loaded profiles, shared by the processes of that server.

It is only ever replaced as a whole. A process reads it again when it was replaced, and then works out only those
profiles that are new to it.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from expert_registry.card import Slug
from expert_registry.documents import Strict, parse_document
from expert_registry.errors import EngineError, FileError, PolicyError, SteerMoEError
from expert_registry.files import write_atomic
from expert_registry.places import model_key
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.admission.profiles.loaded import Loaded, LoadedProfile
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.resolve import Resolved, Source

MAX_STORE_BYTES = 64 << 20


class StoreError(EngineError):
    """The profile store cannot be read or written, or is another model's."""

    code = "STEERMOE-E306"


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


@dataclass(frozen=True, slots=True)
class _Seen:
    """One state of the file, and what it says or why it says nothing.

    The file stays open: its inode can then not be given to the file that replaces it, so that equal identities
    always mean the same content.
    """

    identity: tuple[int, ...]
    file: BinaryIO | None
    said: Loaded | StoreError


class ProfileFile:
    """Thread-safe; safe also between processes that share the file."""

    def __init__(self, path: Path, models: Sequence[str], shape: MoEShape) -> None:
        """Open the file, or make it.

        Args:
            path: of the file; folders are made.
            models: names of the served model.
            shape: of the served model.

        Raises:
            StoreError: it cannot be read or written, or was made for another model.
        """
        self._path = path
        self._models = tuple(models)
        self._shape = shape
        self._reading = threading.Lock()
        self._seen = _Seen((), None, StoreError("the profile store has not been read"))
        self._rows: dict[str, tuple[_Row, LoadedProfile]] = {}
        with self.locked():
            if not path.exists():
                self.write(Loaded({}))
        self.read()

    def has_changed(self) -> bool:
        """Whether `read` would have to read it anew; this costs one `stat`."""
        try:
            return _identity(self._path.stat()) != self._seen.identity
        except OSError:
            return False

    def read(self) -> Loaded:
        """What it says now. Unless it has changed, this costs one `stat`, whether or not it is damaged.

        Raises:
            StoreError: it cannot be read; nothing is then taken from what it said before.
        """
        try:
            identity = _identity(self._path.stat())
            seen = self._seen
            if identity != seen.identity:
                with self._reading:
                    seen = self._read_anew()
        except OSError as error:
            raise StoreError(f"the profile store cannot be read: {error.strerror}") from None
        if isinstance(seen.said, StoreError):
            # A copy: raising the same object again would lengthen its traceback for ever.
            raise copy.copy(seen.said)
        return seen.said

    def write(self, loaded: Loaded) -> None:
        """Replace it; call it while it is `locked`.

        Raises:
            PolicyError: it would be too large.
            StoreError: it cannot be written.
        """
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
        except FileError:
            raise StoreError("the profile store cannot be written; is there room, and may the server write?") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from changing it; by a lock beside it, since the file itself is replaced.

        Raises:
            StoreError: there can be no lock.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lock = self._path.with_name(self._path.name + ".lock").open("wb")
        except OSError as error:
            raise StoreError(f"the profile store cannot be locked: {error.strerror}") from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read_anew(self) -> _Seen:
        with ExitStack() as on_failure:
            file = on_failure.enter_context(self._path.open("rb"))
            identity = _identity(os.fstat(file.fileno()))
            if identity == self._seen.identity:  # Another thread has read it meanwhile.
                return self._seen
            text = file.read(MAX_STORE_BYTES + 1)
            on_failure.pop_all()
        said: Loaded | StoreError
        try:
            said = self._parse(text)
        except StoreError as error:
            said = error.with_traceback(None)
        if self._seen.file is not None:
            self._seen.file.close()
        self._seen = _Seen(identity, file, said)
        return self._seen

    def _parse(self, text: bytes) -> Loaded:
        if len(text) > MAX_STORE_BYTES:
            raise StoreError(f"the profile store is larger than {MAX_STORE_BYTES} bytes")
        try:
            document = parse_document(text, _Document, "the profile store")
            shape = MoEShape(document.architecture, document.layers, document.num_experts, document.top_k)
            rows = {name: (row, self._worked_out(name, row)) for name, row in document.profiles.items()}
        except SteerMoEError as error:
            raise StoreError(f"the profile store cannot be read: {error}") from None
        mine, theirs = ({model_key(name) for name in names} for names in (self._models, document.models))
        if shape != self._shape or not mine & theirs:
            raise StoreError(
                f"the profile store is for {', '.join(document.models)} ({shape}), not for {', '.join(self._models)} "
                f"({self._shape}); give this server a store of its own"
            )
        self._rows = rows
        return Loaded({name: profile for name, (_, profile) in rows.items()}, document.refreshed)

    def _worked_out(self, name: str, row: _Row) -> LoadedProfile:
        """As before if the row is; a large one takes a tenth of a second."""
        before = self._rows.get(name)
        return before[1] if before is not None and before[0] == row else _from_row(row)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _to_row(profile: LoadedProfile) -> _Row:
    resolved = profile.resolved
    return _Row(asked=profile.asked, experts=resolved.text, sources=resolved.sources, since=profile.since)


def _from_row(row: _Row) -> LoadedProfile:
    return LoadedProfile(Resolved(SteeringProfile.from_json(row.experts), row.sources), row.asked, row.since)
