"""A lock file pins rankings by sha256, so that a later run steers with the same bytes or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from expert_registry.card import Sha256, Version
from expert_registry.documents import Strict, read_document, write_document
from expert_registry.errors import naming

LOCK_VARIABLE = "STEERMOE_LOCK"
"""Names the lock file that every look-up of the process obeys."""
MAX_LOCK_BYTES = 4 << 20


class Pin(Strict):
    """One locked ranking."""

    version: Version
    sha256: Sha256


class Lock(Strict):
    """The only rankings that may be used, by `model-key/behaviour`."""

    format_version: Literal[1] = 1
    rankings: Annotated[dict[str, Pin], Field(max_length=20_000)]

    def refusal(self, key: str, behaviour: str, version: int, sha256: str | None = None) -> str | None:
        """Why a ranking is not the locked one; None if it is (so far as its hash is known yet)."""
        pin = self.rankings.get(f"{key}/{behaviour}")
        if pin is None:
            return "it is not in the lock file"
        if pin.version != version:
            return f"the lock file pins version {pin.version}"
        if sha256 is not None and pin.sha256 != sha256:
            return f"its sha256 is {sha256}, but the lock file pins {pin.sha256}"
        return None


def read_lock(path: Path) -> Lock:
    """Read a lock file.

    Raises:
        FileError: it is missing or too large.
        RankingFormatError: it is damaged.
    """
    with naming(path):
        return read_document(path, Lock, MAX_LOCK_BYTES)


def write_lock(path: Path, pins: Mapping[str, Pin]) -> None:
    """Write a lock file atomically; an older one is replaced."""
    write_document(path, Lock(rankings=dict(pins)))


def lock_from_environment() -> Lock | None:
    """The lock file that $STEERMOE_LOCK names; None if it is not set.

    Raises:
        FileError, RankingFormatError: it names a file that cannot be read. Going on without would not be locked.
    """
    named = os.environ.get(LOCK_VARIABLE)
    return read_lock(Path(named)) if named else None
