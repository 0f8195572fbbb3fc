"""Tables of what is refused: one test runs all rows and shows those that came out otherwise."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from expert_registry.errors import SteerMoEError


def refusal(call: Callable[..., object], *arguments: object) -> Exception | None:
    """The error with which a call refuses its arguments; None if it takes them."""
    try:
        call(*arguments)
    except SteerMoEError as error:
        return error
    return None


def as_said(error: Exception | None, kind: type[Exception], words: str) -> bool:
    """Whether it is an error of that kind, in whose text the pattern is found."""
    return isinstance(error, kind) and re.search(words, str(error)) is not None


def not_refused(
    call: Callable[[Any], object], rows: Iterable[tuple[Any, ...]], kind: type[Exception] = SteerMoEError
) -> list[tuple[str, Exception | None]]:
    """Of the rows (value, kind of error unless it is that of all, words), those that a call does not refuse so."""
    wrong = []
    for value, *mine, words in rows:
        error = refusal(call, value)
        if not as_said(error, mine[0] if mine else kind, words):
            wrong.append((f"{value!r:.100}", error))
    return wrong
