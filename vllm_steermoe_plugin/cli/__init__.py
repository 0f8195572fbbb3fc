"""The `steermoe` command. Each file here is one sub-command; heavy imports wait until it runs."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from expert_registry.errors import ConfigurationError, SteerMoEError
from vllm_steermoe_plugin.cli.attribute import attribute
from vllm_steermoe_plugin.cli.convert import convert
from vllm_steermoe_plugin.cli.detect import detect
from vllm_steermoe_plugin.cli.doctor import doctor
from vllm_steermoe_plugin.cli.plot import plot
from vllm_steermoe_plugin.cli.profiles import profiles
from vllm_steermoe_plugin.cli.registry import registry
from vllm_steermoe_plugin.cli.serve import serve
from vllm_steermoe_plugin.compat.versions import DISTRIBUTION

COMMANDS = "steermoe.commands"
"""Entry points of sub-commands that live in packages above this one."""


class _Commands(TyperGroup):
    """The commands below, and those of installed entry points, which are loaded when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        return [*super().list_commands(ctx), *sorted(importlib.metadata.entry_points(group=COMMANDS).names)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None.

        Raises:
            ConfigurationError: what it needs is not installed.
        """
        own = super().get_command(ctx, cmd_name)
        found = importlib.metadata.entry_points(group=COMMANDS, name=cmd_name)
        if own is not None or not found:
            return own
        try:
            function = next(iter(found)).load()
        except ImportError as error:
            why = f"`steermoe {cmd_name}` cannot be loaded: {error}; is the extra [eval] there?"
            raise ConfigurationError(why) from None
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        single.command(cmd_name)(function)
        return typer.main.get_command(single)


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)
app.command()(attribute)
app.command()(convert)
app.command()(detect)
app.command()(doctor)
app.command()(plot)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(serve)
app.add_typer(profiles, name="profiles")
app.add_typer(registry, name="registry")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(importlib.metadata.version(DISTRIBUTION))
        raise typer.Exit


@app.callback()
def steermoe(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Detect, rank, serve and measure steered mixture-of-experts models."""


def main() -> None:
    """Entry point: the project's own errors become one line on standard error and exit status 1."""
    try:
        app()
    except SteerMoEError as error:
        text = f"steermoe: error [{error.code}]: {error}"
        Console(stderr=True).print(text, style="red", markup=False, highlight=False)
        sys.exit(1)
