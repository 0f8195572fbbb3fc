"""The base of every error that this project raises on purpose, and those that several files raise.

One base, so that a caller can catch the project's errors and nothing else. A
message names what was asked, what exists, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SteerMoEError(ValueError):
    """Base of all errors of the three packages."""


class FileError(SteerMoEError, OSError):
    """A file cannot be read or written."""


class RankingFormatError(SteerMoEError):
    """A ranking file is damaged, hostile or of an unknown format version."""


class UnknownRankingError(SteerMoEError):
    """No ranking fits the model, behaviour or version that was asked for."""


class ProfileError(SteerMoEError):
    """A set of experts cannot be applied to a model: shape, range, conflict or cap."""


class RequestError(SteerMoEError):
    """The text by which a request names its steering cannot be read."""


class UnknownProfileError(SteerMoEError):
    """No profile is loaded under the name that was asked for."""


class PolicyError(SteerMoEError):
    """The operator does not allow what a request asks for."""


class EngineError(SteerMoEError):
    """The running engine cannot steer, or vLLM is not as this package knows it."""


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
