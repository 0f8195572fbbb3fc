"""Tables of what is refused: one test runs all rows and shows those that came out otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from expert_registry.errors import SteerMoEError


def refusal(call: Callable[..., object], *arguments: object) -> SteerMoEError | None:
    """The error with which a call refuses its arguments; None if it takes them."""
    try:
        call(*arguments)
    except SteerMoEError as error:
        return error
    return None


def as_said(error: SteerMoEError | None, kind: type[SteerMoEError], words: str) -> bool:
    """Whether it is an error of that kind, in whose text the pattern is found."""
    return isinstance(error, kind) and re.search(words, str(error)) is not None


def not_refused(
    call: Callable[[Any], object], rows: Iterable[tuple[Any, type[SteerMoEError], str]]
) -> list[tuple[str, SteerMoEError | None]]:
    """Of rows (argument, kind, words), those that a call does not refuse with that error, and how it did."""
    results = ((value, refusal(call, value), kind, words) for value, kind, words in rows)
    return [(repr(value)[:100], error) for value, error, kind, words in results if not as_said(error, kind, words)]
