"""The profiles that an operator has loaded into a server, by name.

Those of the settings stay as they are; others come and go while serving. They live in memory, or in one file that
every front-end process of a server reads again as soon as it was replaced, so that all of them always agree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

from expert_registry.errors import PolicyError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.admission.profiles.file import ProfileFile, StoreError
from vllm_steermoe_plugin.admission.profiles.loaded import Loaded, LoadedProfile

MAX_PROFILES = 256


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
            StoreError: it cannot be read or written, or was made for another model.
        """
        self.fixed: Mapping[str, LoadedProfile] = {}
        self._changing = threading.Lock()
        self._loaded = Loaded({})
        """What was last read, or all there is without a file."""
        self._file = ProfileFile(path, models, shape) if path is not None else None
        self._stored()

    def current(self) -> Loaded:
        """The profiles of now. With a file that has not changed, this costs one `stat`.

        Raises:
            StoreError: the file cannot be read; nothing is then taken from what it said before.
        """
        loaded = self._stored()
        return replace(loaded, profiles={**loaded.profiles, **self.fixed}) if self.fixed else loaded

    def get(self, name: str) -> LoadedProfile:
        """The profile of that name; those of the settings whatever has become of the file.

        Raises:
            UnknownProfileError: there is none.
            StoreError: it is none of the settings, and the file cannot be read.
        """
        return self.fixed.get(name) or self.current().get(name)

    def refreshed(self) -> int:
        """How often the operator has had rankings looked up anew, as far as is known while the file cannot be read."""
        try:
            return self._stored().refreshed
        except StoreError:
            return self._loaded.refreshed

    def has_changed(self) -> bool:
        """Whether there is a file that must be read anew, which may take a while."""
        return self._file is not None and self._file.has_changed()

    def put(self, name: str, profile: LoadedProfile, check: Callable[[], None] = lambda: None) -> bool:
        """Load a profile; whether it replaced another of that name.

        Args:
            name: of the profile.
            profile: what it is.
            check: called while nobody else can change the store; what it raises keeps the profile out.

        Raises:
            PolicyError: it stands in the settings, or there are too many.
            StoreError: the file cannot be written.
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
            StoreError: the file cannot be written.
        """
        with self._change(name) as profiles:
            return profiles.pop(name, None) or Loaded({**profiles, **self.fixed}).get(name)

    def refresh(self) -> None:
        """Have every process that shares this store look rankings up anew.

        Raises:
            StoreError: the file cannot be written.
        """
        with self._exclusive():
            before = self._stored()
            self._write(replace(before, refreshed=before.refreshed + 1))

    @contextmanager
    def _change(self, name: str) -> Iterator[dict[str, LoadedProfile]]:
        if name in self.fixed:
            raise PolicyError(f"profile {name!r} stands in the settings of this server; it is changed there")
        with self._exclusive():
            before = self._stored()
            profiles = dict(before.profiles)
            yield profiles
            self._write(replace(before, profiles=profiles))

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._changing, self._file.locked() if self._file is not None else nullcontext():
            yield

    def _stored(self) -> Loaded:
        """Without the profiles of the settings."""
        if self._file is not None:
            self._loaded = self._file.read()
        return self._loaded

    def _write(self, loaded: Loaded) -> None:
        if self._file is not None:
            self._file.write(loaded)
        else:
            self._loaded = loaded
