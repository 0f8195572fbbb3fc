"""Progress on standard error, so that standard output stays clean."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")

LINE_EVERY = 60.0
"""Seconds between two lines of progress in a log."""


def track(items: Sequence[T], description: str, done: int = 0) -> Iterator[T]:
    """Iterate over `items` with a progress bar; where standard error is no terminal, with a line a minute.

    `done` items came before these, in an earlier run that this one goes on from; progress starts there.
    """
    console, total = Console(stderr=True), done + len(items)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total, completed=done)
            for item in items:
                yield item
                bar.advance(task)
        return
    said = time.monotonic()
    for number, item in enumerate(items, start=done):
        if time.monotonic() - said >= LINE_EVERY:
            said = time.monotonic()
            console.print(f"{description}: {number / total:.0%}", markup=False, highlight=False)
        yield item


@contextmanager
def byte_progress(total: int, description: str) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes; gives the function that moves it on."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<22}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda number: progress.advance(task, number)
