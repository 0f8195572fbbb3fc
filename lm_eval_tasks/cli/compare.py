"""`steermoe compare`: paired differences between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Files of `steermoe eval`, or lm-eval's results_*.json with --log_samples beside them."),
    ],
    baseline: Annotated[
        str | None, typer.Option(help="Profile to compare with; default: the first that is not steered.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; may be given several times.")] = None,
    margin: Annotated[float, typer.Option(help="What a control may lose; 0.03 is three points.")] = 0.03,
    out: Annotated[Path | None, typer.Option(help="Folder for the report: Markdown, HTML, JSON, plot.")] = None,
    plot: Annotated[bool, typer.Option(help="Write the plot (needs matplotlib).")] = True,
    other_versions: Annotated[bool, typer.Option(help="Allow runs made with other versions of the tools.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Compare steered with unsteered runs, example by example; refuses runs that do not pair."""
    from lm_eval_tasks.cli.show import print_comparison
    from lm_eval_tasks.compare.comparison import compare as run_comparison
    from lm_eval_tasks.compare.lm_eval_files import read_any_run
    from lm_eval_tasks.compare.pairing import merge_runs
    from lm_eval_tasks.compare.report import write_report
    from vllm_steermoe_plugin.cli.inputs import check_writable, need

    if out is not None:
        check_writable(out / "report.json")
        if plot:
            need("matplotlib", "plot")
    merged = merge_runs([read_any_run(path) for path in runs], task or (), other_versions)
    comparison = run_comparison(merged, baseline, margin)
    written = [] if out is None else write_report(comparison, out, plots=plot)
    if as_json:
        typer.echo(json.dumps(comparison.to_dict(), indent=1))
        return
    print_comparison(comparison)
    for path in written:
        typer.echo(str(path))
