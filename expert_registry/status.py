"""`MODEL/BEHAVIOUR/status.json`: versions that were withdrawn, and behaviours that moved.

{"withdrawn": {"2": {"reason": "counted on the wrong template", "use": 3}}}
{"renamed": {"model": "org/new-name", "behaviour": "terse", "reason": "..."}}
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from expert_registry.card import Name, Slug, Text, Version
from expert_registry.documents import Strict, read_document

STATUS_FILE = "status.json"
MAX_STATUS_BYTES = 1 << 16


class Withdrawn(Strict):
    """Why a version must not be used any more, and which one to use instead."""

    reason: Text
    use: Version | None = None


class Renamed(Strict):
    """Where the rankings of a behaviour are now."""

    behaviour: Slug
    model: Name | None = None
    """None: the same model."""
    reason: Text = ""


class Status(Strict):
    """What a registry folder says about one behaviour of one model."""

    format_version: Literal[1] = 1
    withdrawn: dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}$")], Withdrawn] = Field(default_factory=dict)
    renamed: Renamed | None = None


def read_status(folder: Path, key: str, behaviour: str) -> Status:
    """The status file of a place in a registry folder; an empty status if there is none.

    Raises:
        FileError: it cannot be read, is too large or a link out of the folder.
        RankingFormatError: it is damaged.
    """
    path = folder / key / behaviour / STATUS_FILE
    return read_document(path, Status, MAX_STATUS_BYTES, inside=folder) if path.exists() else Status()
