"""`steermoe plot`: rankings as figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expert_registry import read_ranking
from expert_registry.errors import UsageError, one_of

_KINDS = ("depth", "experts", "heatmap", "overlap")


def plot(
    rankings: Annotated[list[Path], typer.Argument(help="Ranking files, one panel each; two for overlap.")],
    out: Annotated[Path, typer.Option(help="PNG, SVG or PDF file to write.")] = Path("ranking.png"),
    kind: Annotated[
        str,
        typer.Option(
            help="heatmap: layer by expert. experts: the top ones with intervals. depth: experts by layer. "
            "overlap: of the top experts of two rankings."
        ),
    ] = "heatmap",
    top: Annotated[int, typer.Option(min=1, max=100_000, help="How many experts (not for heatmap).")] = 30,
) -> None:
    """Plot a ranking (heatmap, top experts, depth, overlap)."""
    from vllm_steermoe_plugin.cli.inputs import check_writable, need

    need("matplotlib", "plot")
    from vllm_steermoe_plugin.views.figures import draw_depth, draw_experts, draw_heatmaps, draw_overlap

    if kind not in _KINDS:
        raise UsageError(one_of(kind, _KINDS, "kind of figure"))
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--out {out} must end in .png, .svg or .pdf")
    check_writable(out)
    read = [read_ranking(path) for path in rankings]
    if kind == "overlap":
        if len(read) != 2:
            raise UsageError(f"overlap is of two rankings, got {len(read)}")
        draw_overlap(read[0], read[1], out, top)
    elif kind == "experts":
        draw_experts(read, out, top)
    elif kind == "depth":
        draw_depth(read, out, top)
    else:
        draw_heatmaps(read, out)
    typer.echo(str(out))
