"""`steermoe serve`: `vllm serve` with a model name resolved and the operator's settings written for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from expert_registry.errors import UsageError
from vllm_steermoe_plugin.cli.additional_config import with_settings
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import resolve_checkpoint
from vllm_steermoe_plugin.settings import KEY, read_settings


def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, folder, or steermoe-lab.")],
    default: Annotated[str | None, typer.Option(help="Steering expression for requests without one.")] = None,
    allow_override: Annotated[
        bool, typer.Option(help="Allow requests to override the default (including with `none`).")
    ] = True,
    allow_reverse: Annotated[
        bool, typer.Option(help="Allow requests to steer away from a behaviour (`:reverse`).")
    ] = False,
    allow_experts: Annotated[
        bool, typer.Option(help="Allow requests to list experts or change their numbers.")
    ] = False,
    max_strength: Annotated[float, typer.Option(help="Largest strength of biases that a request may name.")] = 2.0,
    base_model: Annotated[
        str | None, typer.Option(help="Base model whose rankings to use for a fine-tuned MODEL.")
    ] = None,
    locked: Annotated[Path | None, typer.Option(help="Only use rankings pinned in this lock file.")] = None,
    profile: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="A profile that requests use as @NAME.")
    ] = None,
    manage: Annotated[
        str | None,
        typer.Option(metavar="env:NAME|file:PATH", help="Source of the admin API key."),
    ] = None,
    profile_store: Annotated[Path | None, typer.Option(help="File that stores profiles loaded over HTTP.")] = None,
    external_routing: Annotated[
        bool, typer.Option("--external-routing", help="Use MoE kernels that leave the selection to vLLM's router.")
    ] = False,
) -> None:
    """Serve a model over HTTP. All other options are passed to `vllm serve`."""
    from vllm_steermoe_plugin.compat.plugin_allowlist import (
        VARIABLE,
        allow_list,
        check_plugin_allowed,
        names_with_endpoints,
    )

    check_plugin_allowed()
    given = {
        "default": default,
        "allow_override": allow_override,
        "allow_reverse": allow_reverse,
        "allow_experts": allow_experts,
        "max_strength": max_strength,
        "base_model": base_model,
        "lock": str(locked.absolute()) if locked else None,
        "profiles": profiles_of(profile or []),
        "manage": manage,
        "profile_store": str(profile_store.absolute()) if profile_store else None,
        "external_routing": external_routing,
    }
    changed = read_settings({KEY: given}).model_dump(exclude_defaults=True)
    if manage is not None:
        os.environ[VARIABLE] = names_with_endpoints(allow_list())
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        *with_settings([*serve_arguments(model), *context.args], changed),
    ]
    os.execv(sys.executable, command)


def profiles_of(options: list[str]) -> dict[str, str]:
    """Name -> request text, from options such as `terse=digits:reverse`.

    Raises:
        UsageError: one is not `NAME=TEXT`, or a name stands twice.
    """
    profiles: dict[str, str] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals or name in profiles:
            raise UsageError(f"--profile {option!r:.80}: write NAME=TEXT, each name once")
        profiles[name] = text
    return profiles


def serve_arguments(model: str) -> list[str]:
    """Arguments of `vllm serve` for a model."""
    from vllm_steermoe_plugin.engine import LAB_OPTIONS

    arguments = [resolve_checkpoint(model), "--served-model-name", model]
    if model == lab_checkpoint.NAME:
        for key, value in LAB_OPTIONS.items():
            flag = f"--{key.replace('_', '-')}"
            arguments += [flag] if value is True else [flag, str(value)]
    return arguments
