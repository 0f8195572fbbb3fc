"""Progress on standard error, so that standard output stays clean."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.progress import track as rich_track

T = TypeVar("T")

LINE_EVERY = 60.0
"""Seconds between two lines of progress in a log."""


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Iterate over `items` with a progress bar; where standard error is no terminal, with a line a minute."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from rich_track(items, description=f"{description:<22}", console=console)
        return
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said >= LINE_EVERY:
            said = time.monotonic()
            console.print(f"{description}: {done / len(items):.0%}", markup=False, highlight=False)
        yield item


@contextmanager
def byte_progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes; gives the function that moves it on."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<22}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda number: progress.advance(task, number)
