"""`steermoe registry`: look at rankings, check, compare, fetch, weigh and share them."""

from __future__ import annotations

import typer

from vllm_steermoe_plugin.cli.registry.checks import diff, verify
from vllm_steermoe_plugin.cli.registry.fetch import import_files, pull
from vllm_steermoe_plugin.cli.registry.listing import list_rankings
from vllm_steermoe_plugin.cli.registry.share import add, export, lock, publish
from vllm_steermoe_plugin.cli.registry.show import show
from vllm_steermoe_plugin.cli.registry.weigh import weigh

registry = typer.Typer(no_args_is_help=True, help="Rankings, by model and behaviour.")
registry.command("list")(list_rankings)
registry.command()(show)
registry.command()(verify)
registry.command()(diff)
registry.command()(pull)
registry.command("import")(import_files)
registry.command()(add)
registry.command()(export)
registry.command()(publish)
registry.command()(lock)
registry.command()(weigh)
