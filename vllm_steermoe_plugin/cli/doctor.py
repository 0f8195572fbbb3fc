"""`steermoe doctor`: what is supported here and why not, whether vLLM is as this package knows it, and a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Annotated, Any

import typer

from expert_registry import Registry
from expert_registry.errors import ConfigurationError, EngineError, UnsupportedModelError
from vllm_steermoe_plugin.device.router_kind import RouterKind

ROUTERS = (
    RouterKind("softmax"),
    RouterKind("softmax", bias=True),
    RouterKind("softmax", groups=8, kept=3),
    RouterKind("softmax", each_group=True),
    RouterKind("sigmoid"),
    RouterKind("sigmoid", bias=True),
    RouterKind("sigmoid", bias=True, groups=8, kept=4),
    RouterKind("sqrtsoftplus", bias=True),
)
"""Kinds of routers, beside the models' own; numbers of groups are examples."""


def doctor(
    model: Annotated[str | None, typer.Argument(help="A checkpoint folder, a hub id, or steermoe-lab.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    kernels: Annotated[
        bool | None,
        typer.Option(
            "--kernels/--no-kernels",
            help="Build MODEL without its weights, to say what its routers do, how they are steered and which kernels "
            "vLLM would use here.",
            show_default="on",
        ),
    ] = None,
) -> None:
    """Check versions, vLLM's internals and, given a model, whether it can be steered. No weights are loaded.

    Without a model, list the architectures that can be steered and those that cannot, with the reason. Exit code 1
    if something keeps steering from working.
    """
    report = examine(model, kernels=kernels)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        print_report(report)
    if report["problems"]:
        raise typer.Exit(1)


def examine(model: str | None, *, kernels: bool | None = None) -> dict[str, Any]:
    """What `steermoe doctor` reports; `problems` is empty if steering will work."""
    from vllm_steermoe_plugin.compat.ledger import LEDGER, WRAPPED, check_ledger
    from vllm_steermoe_plugin.compat.plugin_allowlist import VARIABLE, allow_list, check_plugin_allowed
    from vllm_steermoe_plugin.compat.versions import tested, tool_versions
    from vllm_steermoe_plugin.models.architectures import ARCHITECTURES, condition_of
    from vllm_steermoe_plugin.models.unsupported import REFUSED
    from vllm_steermoe_plugin.worker.router_kind import OWN_SELECTIONS

    problems: list[str] = []
    report: dict[str, Any] = {
        "versions": tool_versions(),
        "tested": tested(),
        VARIABLE: "(unset: all plugins are loaded)" if (allowed := allow_list()) is None else allowed,
        "internals": len(LEDGER),
        "wrapped": len(WRAPPED),
    }
    checks: list[Callable[[], None]] = [check_plugin_allowed, check_ledger, lambda: examine_model(model, report)]
    if model is not None if kernels is None else kernels:
        checks.append(lambda: examine_kernels(model, report))
    for check in checks:
        try:
            check()
        except EngineError as error:
            problems.append(f"[{error.code}] {error}")
    kinds = (*ROUTERS, *OWN_SELECTIONS.values())
    report["routers"] = {str(kind): "gate" if kind.orders_logits else "selection" for kind in kinds}
    report["architectures"] = {
        name: {"language_model": row.language, "condition": condition_of(name), "run_in_tests": row.ran}
        for name, row in ARCHITECTURES.items()
    }
    report["refused"] = REFUSED
    report["problems"] = problems
    return report


def examine_model(model: str | None, report: dict[str, Any]) -> None:
    """Add to the report what is known of a model from its config alone; without a model, only the runner.

    Raises:
        UnsupportedModelError: vLLM cannot read its config, or it cannot be steered. What was known by then is in the
            report.
        ConfigurationError: see `runner`.
    """
    from vllm_steermoe_plugin.compat.symbols.config import MODEL_CONFIG
    from vllm_steermoe_plugin.models.architectures import shape_of
    from vllm_steermoe_plugin.models.checkpoints import names_of, resolve_checkpoint

    if model is None:
        report["runner"] = runner(None)
        return
    place = resolve_checkpoint(model)
    try:
        config = MODEL_CONFIG.load()(model=place)
    except (ValueError, OSError) as error:
        why = " ".join(str(error).split())[:500]
        raise UnsupportedModelError(f"vLLM cannot read the config of {model}: {why}") from None
    report["model"] = model
    report["runs_as"] = config.architecture
    report["runner"] = runner(config)
    shape = shape_of(config.hf_config, config.architecture)
    report["shape"] = str(shape)
    report["layers_bound"] = len(shape.layers)
    report["layers"] = list(shape.layers)
    report["behaviours"] = Registry.default().behaviours(names_of(place, [model]))


def examine_kernels(model: str | None, report: dict[str, Any]) -> None:
    """Add what vLLM would choose here for each kind of MoE layer (`worker.kernels`).

    Raises:
        ConfigurationError: no model was named.
        UnsupportedModelError: vLLM cannot build it here.
    """
    from vllm_steermoe_plugin.models.checkpoints import resolve_checkpoint

    if model is None:
        raise ConfigurationError("--kernels needs a MODEL, which is then built without its weights")
    command = [sys.executable, "-m", "vllm_steermoe_plugin.worker.kernels", resolve_checkpoint(model)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UnsupportedModelError(f"vLLM cannot build {model} here, so its kernels are not known: {why}")
    found = json.loads(done.stdout.splitlines()[-1])
    report["kernels"] = found["rows"]
    if found["obstacle"] is not None and "shape" in report:
        raise UnsupportedModelError(found["obstacle"])


def runner(model_config: Any) -> str:
    """Which model runner vLLM would use here, and why.

    Args:
        model_config: vLLM's; None for what holds without a model.

    Raises:
        ConfigurationError: vLLM refuses to say, as where its environment asks for a runner that cannot run here.
    """
    from vllm_steermoe_plugin.compat.symbols.config import HAS_TRITON, V2_MISSING, VLLM_CONFIG

    make = VLLM_CONFIG.load()
    try:
        config = make() if model_config is None else make(model_config=model_config)
        is_v2 = config.use_v2_model_runner
    except ValueError as error:
        raise ConfigurationError(f"vLLM does not say which model runner it would use: {error}") from None
    if is_v2 and not HAS_TRITON.load():
        raise ConfigurationError("Model Runner V2 requires Triton, which is not installed; no worker would start")
    name = "V2, by the model's ModelState" if is_v2 else "V1, by wrapping two of its methods"
    asked = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if asked is not None:
        return f"{name} (VLLM_USE_V2_MODEL_RUNNER={asked})"
    if is_v2:
        return f"{name} (vLLM's default here)"
    if not HAS_TRITON.load():
        return f"{name} (V2 needs Triton, which is not installed)"
    missing = V2_MISSING.load()(config)
    return f"{name} (V2 does not support {', '.join(missing) or 'this'})"


def print_report(report: dict[str, Any]) -> None:
    """The report for people; the long lists only where no model was asked about."""
    for key, value in report.items():
        if key in ("architectures", "refused", "routers"):
            continue
        if key == "kernels":
            for row in value:
                layers = ", ".join(map(str, row["layers"]))
                inside = ", which selects experts by itself (cannot be counted)" if row["selects_inside"] else ""
                for name, text in (
                    ("router", f"layers {layers}: {row['router']}; {row['steered']}"),
                    ("kernels", f"gate by {' or '.join(row['gate']) or 'no GateLinear'}; {row['experts']}{inside}"),
                ):
                    typer.echo(textwrap.fill(f"{name:<16} {text}", 110, subsequent_indent=" " * 17))
            continue
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        if isinstance(value, dict):
            text = ", ".join(f"{name} {version}" for name, version in value.items())
        typer.echo(f"{key:<16} {text}")
    if "model" in report or report["problems"]:
        return
    typer.echo("\nRouters, and where they are steered:")
    for name, seam in report["routers"].items():
        typer.echo(f"  {name}: {seam}")
    typer.echo("\nCan be steered (* is run in the tests, on CPU):")
    for name, row in report["architectures"].items():
        notes = [f"if {row['condition']}"] if row["condition"] else []
        notes += [f"language model: {row['language_model']}"] if row["language_model"] else []
        typer.echo(f"  {name}{'*' if row['run_in_tests'] else ''}{': ' if notes else ''}{'; '.join(notes)}")
    reasons: dict[str, list[str]] = {}
    for name, reason in report["refused"].items():
        reasons.setdefault(reason, []).append(name)
    typer.echo("\nCannot be steered, because")
    for reason, names in reasons.items():
        typer.echo(f"  {reason}:")
        typer.echo(textwrap.fill(", ".join(names), 110, initial_indent="    ", subsequent_indent="    "))
