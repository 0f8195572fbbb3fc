"""A comparison on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lm_eval_tasks.compare.comparison import Comparison
from lm_eval_tasks.compare.report import tables

WIDTH = 150
"""The least that the tables need."""


def print_comparison(comparison: Comparison) -> None:
    """The tables of the report."""
    console = Console()
    console = console if console.width >= WIDTH else Console(width=WIDTH)
    for title, head, rows in tables(comparison):
        table = Table(*head, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(escape(cell) for cell in row))
        console.print(table)
