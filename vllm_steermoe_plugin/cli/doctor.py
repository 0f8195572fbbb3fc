"""`steermoe doctor`: what is supported here, and whether vLLM still is as this package knows it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from expert_registry import Registry
from expert_registry.errors import EngineError


def doctor(
    model: Annotated[str | None, typer.Argument(help="A checkpoint folder, or steermoe-lab.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Check versions, vLLM's internals and, given a model, whether it can be steered. No weights are loaded."""
    report = examine(model)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        for key, value in report.items():
            typer.echo(f"{key:<16} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    if report["problems"]:
        raise typer.Exit(1)


def examine(model: str | None) -> dict[str, Any]:
    """What `steermoe doctor` reports; `problems` is empty if steering will work."""
    from vllm_steermoe_plugin import vllm_internals
    from vllm_steermoe_plugin.architectures import ARCHITECTURES
    from vllm_steermoe_plugin.checkpoints import names_of, resolve_checkpoint, shape_in
    from vllm_steermoe_plugin.engine import check_plugin_allowed
    from vllm_steermoe_plugin.versions import tool_versions

    problems: list[str] = []
    report: dict[str, Any] = {
        "versions": tool_versions(),
        "VLLM_PLUGINS": os.environ.get("VLLM_PLUGINS", "(unset: all plugins are loaded)"),
        "architectures": sorted(ARCHITECTURES),
        "internals": len(vllm_internals.LEDGER),
    }
    for check in (check_plugin_allowed, vllm_internals.check_ledger):
        try:
            check()
        except EngineError as error:
            problems.append(str(error))
    if model is not None:
        folder = Path(resolve_checkpoint(model))
        if folder.is_dir():
            shape = shape_in(folder)
            report["model"] = str(shape)
            report["layers_bound"] = len(shape.layers)
            report["behaviours"] = Registry.default().behaviours(names_of(str(folder), [model]))
        else:
            problems.append(f"{model} is no folder here; fetch its config.json first")
    report["problems"] = problems
    return report
