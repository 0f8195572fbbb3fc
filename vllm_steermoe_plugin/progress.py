"""Progress bars on standard error, so that standard output stays clean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track

T = TypeVar("T")


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate over `items` with a progress bar (none where standard error is not a terminal)."""
    console = Console(stderr=True)
    yield from rich_track(items, description=f"{description:<22}", console=console, disable=not console.is_terminal)
