"""Where rankings lie: `FOLDER/MODEL/BEHAVIOUR/vN.safetensors`, and which folders there are.

MODEL is the model's id in lower case with `/` written as `--`. No name leads out of its folder: what is not
a plain name is not looked up, and a link that leaves the folder is not read.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from expert_registry.card import RankingCard
from expert_registry.errors import FileError, RankingFormatError
from expert_registry.files import is_folder
from expert_registry.format import SUFFIX, read_bytes, read_card

BUNDLED = Path(__file__).parent / "rankings"
USER_FOLDER_VARIABLE = "STEERMOE_REGISTRY"
PROJECT_FOLDER = Path(".steermoe") / "rankings"
"""Relative to the working directory."""

_VERSION = re.compile(r"v([1-9][0-9]{0,5})" + re.escape(SUFFIX))
_KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,399}")
_BEHAVIOUR = re.compile(r"[a-z][a-z0-9_-]{0,63}")


def model_key(model: str) -> str:
    """The folder name of a model id: case does not matter, `/` becomes `--`."""
    return model.strip().strip("/").lower().replace("/", "--")


def user_folder() -> Path:
    """Where the user's own rankings live: $STEERMOE_REGISTRY or ~/.local/share/steermoe/rankings.

    Raises:
        RankingFormatError: neither is known, as in a container whose user has no home folder.
    """
    named = os.environ.get(USER_FOLDER_VARIABLE)
    if named:
        return Path(named)
    try:
        return Path.home() / ".local" / "share" / "steermoe" / "rankings"
    except RuntimeError:
        raise RankingFormatError(
            f"there is no home folder for rankings; set {USER_FOLDER_VARIABLE} to a folder"
        ) from None


def default_folders() -> tuple[Path, ...]:
    """The project's folder if there is one, the user's, and the rankings that ship with the package."""
    # Absolute, so that a later change of the working directory does not swap it.
    project = PROJECT_FOLDER.absolute()
    folders = [project] if is_folder(project) else []
    # Whoever steers nothing need not have a home.
    with suppress(RankingFormatError):
        folders.append(user_folder())
    return (*folders, BUNDLED)


@dataclass(frozen=True, slots=True)
class Entry:
    """One ranking file that a registry knows, before it is read."""

    model_key: str
    behaviour: str
    version: int
    path: Path
    folder: Path
    """The registry folder that it lies in."""

    @property
    def name(self) -> str:
        return f"{self.model_key}/{self.behaviour}@{self.version}"

    def card(self) -> RankingCard:
        return read_card(self.path, inside=self.folder)

    def read(self) -> bytes:
        return read_bytes(self.path, inside=self.folder)


def place_of(folder: Path, card: RankingCard) -> Path:
    """Where a ranking belongs in a registry folder."""
    return folder / model_key(card.model.id) / card.behaviour / f"v{card.version}{SUFFIX}"


def is_key(key: str) -> bool:
    """Whether a model key can be the name of a folder."""
    return _KEY.fullmatch(key) is not None


def models_in(folder: Path) -> list[str]:
    """Model keys that have a place in a registry folder."""
    return [name for name in _names(folder) if is_key(name)]


def behaviours_in(folder: Path, key: str) -> list[str]:
    """Behaviours that have a place under a model."""
    return [name for name in _names(folder / key) if _BEHAVIOUR.fullmatch(name)] if is_key(key) else []


def versions_in(folder: Path, key: str, behaviour: str) -> list[Entry]:
    """The rankings of a behaviour, oldest first. Both names must have come from above or be checked."""
    if not (is_key(key) and _BEHAVIOUR.fullmatch(behaviour)):
        return []
    place = folder / key / behaviour
    matches = [match for name in _names(place) if (match := _VERSION.fullmatch(name))]
    entries = [Entry(key, behaviour, int(match[1]), place / match[0], folder) for match in matches]
    return sorted(entries, key=lambda entry: entry.version)


def _names(folder: Path) -> list[str]:
    """Sorted names in a folder; none if it is not there or is a file."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise FileError(f"cannot read the registry folder {folder}: {error.strerror}") from None
