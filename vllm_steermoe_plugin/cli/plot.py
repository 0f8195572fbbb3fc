"""`steermoe plot`: a ranking as a heat map."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expert_registry import read_ranking


def plot(
    rankings: Annotated[list[Path], typer.Argument(help="Ranking files, one panel each.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("ranking.png"),
) -> None:
    """Draw risk differences, layer by expert."""
    from vllm_steermoe_plugin.heatmap import draw_heatmaps

    draw_heatmaps([read_ranking(path) for path in rankings], out)
    typer.echo(str(out))
