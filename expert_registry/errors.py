"""The base of every error that this project raises on purpose, and those that several files raise.

One base, so that a caller can catch the project's errors and nothing else. A message names what was asked, what
exists, and what to do. `code` is stable across releases, and no other class has it:

    STEERMOE-E100  SteerMoEError            the base
    STEERMOE-E101  RequestError             a request is malformed
    STEERMOE-E102  PolicyError              the operator's settings forbid the request
    STEERMOE-E103  ProfileError             experts cannot be applied to the model
    STEERMOE-E104  UnknownProfileError      no loaded profile has the name
    STEERMOE-E105  UnknownRankingError      no ranking fits
    STEERMOE-E106  TooLargeError            an HTTP body is too large
    STEERMOE-E107  FileError                a file cannot be read or written
    STEERMOE-E201  RankingFormatError       a ranking file is damaged
    STEERMOE-E202  PickleRefusedError       a released pickle holds something else than a table
    STEERMOE-E203  DownloadError            a download failed
    STEERMOE-E300  EngineError              the running engine cannot steer
    STEERMOE-E301  CompatibilityError       vLLM is of another version or was changed
    STEERMOE-E302  UnsupportedModelError    the model cannot be steered
    STEERMOE-E303  UnsupportedFeatureError  the engine's configuration rules steering out
    STEERMOE-E304  ConfigurationError       a setting, key, plugin or package is wrong or missing
    STEERMOE-E305  DefaultError             the default steering cannot be applied any more
    STEERMOE-E306  StoreError               the profile store cannot be used
    STEERMOE-E400  UsageError               an option or a file of the command line is wrong
    STEERMOE-E401  PairsError               pairs of texts cannot be read or counted
    STEERMOE-E402  DataError                a data set cannot be read
    STEERMOE-E403  ResumeError              a checkpoint file of a detection does not fit
    STEERMOE-E501  ComparisonError          runs of an evaluation do not pair
    STEERMOE-E502  JudgeError               a judge model cannot be used
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar


class SteerMoEError(ValueError):
    """Base of all errors of the three packages.

    Attributes:
        code: of the class, see above.
        paths: folders and files of this machine that the message may name.
    """

    code: ClassVar[str] = "STEERMOE-E100"

    def __init__(self, message: str = "", *, paths: Iterable[Path] = ()) -> None:
        super().__init__(message)
        self.paths = tuple(paths)

    @property
    def public(self) -> str:
        """The message for callers of a server: of `paths`, only the last component is left."""
        text = str(self)
        for path in sorted(self.paths, key=lambda path: len(path.parts), reverse=True):
            if path.is_absolute() and path.name:
                text = text.replace(str(path), path.name)
        return text


@contextmanager
def naming(*paths: Path) -> Iterator[None]:
    """Mark errors that leave the block as naming these paths, so that `public` shortens them."""
    try:
        yield
    except SteerMoEError as error:
        error.paths += paths
        raise


class FileError(SteerMoEError, OSError):
    """A file cannot be read or written."""

    code = "STEERMOE-E107"


class RankingFormatError(SteerMoEError):
    """A ranking file is damaged, hostile or of an unknown format version."""

    code = "STEERMOE-E201"


class UnknownRankingError(SteerMoEError):
    """No ranking fits the model, behaviour or version that was asked for."""

    code = "STEERMOE-E105"


class ProfileError(SteerMoEError):
    """A set of experts cannot be applied to a model: shape, range, conflict or cap."""

    code = "STEERMOE-E103"


class RequestError(SteerMoEError):
    """A request is malformed: over HTTP, status 400."""

    code = "STEERMOE-E101"


class UsageError(SteerMoEError):
    """An option of a command, or a file that it names, cannot be used."""

    code = "STEERMOE-E400"


class UnknownProfileError(SteerMoEError):
    """No profile is loaded under the name that was asked for."""

    code = "STEERMOE-E104"


class PolicyError(SteerMoEError):
    """The operator does not allow what a request asks for."""

    code = "STEERMOE-E102"


class EngineError(SteerMoEError):
    """The running engine cannot steer or count; raised itself where a worker or a count is inconsistent."""

    code = "STEERMOE-E300"


class CompatibilityError(EngineError):
    """vLLM is not as this package knows it: another version, or what it uses has moved or changed."""

    code = "STEERMOE-E301"


class UnsupportedModelError(EngineError):
    """The model cannot be steered, or its config cannot be read; vLLM serves it, and refuses requests to steer."""

    code = "STEERMOE-E302"


class UnsupportedFeatureError(EngineError):
    """The engine is configured in a way that rules steering or counting out."""

    code = "STEERMOE-E303"


class ConfigurationError(EngineError):
    """A setting, key, plugin or optional package is wrong or missing."""

    code = "STEERMOE-E304"


_SHOWN = 80
"""Characters of a caller's text that an error repeats."""
_LISTED = 40
"""Known names that an error lists."""


def one_of(asked: str, known: Iterable[str], what: str) -> str:
    """Text that says that `asked` is no known `what`, names those that are, and suggests the nearest."""
    names = sorted(known)
    asked = asked if len(asked) <= _SHOWN else asked[:_SHOWN] + "..."
    nearest = get_close_matches(asked, names, n=1)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    listed = ", ".join(names[:_LISTED]) + more if names else "none"
    return f"unknown {what} {asked!r}{hint}; known: {listed}"
