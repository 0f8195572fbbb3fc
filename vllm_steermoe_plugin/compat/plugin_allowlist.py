"""VLLM_PLUGINS, vLLM's allow-list: does it let this plugin in, and its HTTP routes?

Unset, it means all plugins but no HTTP routes; set, only those that it names, of every kind.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterable

from expert_registry.errors import ConfigurationError
from vllm_steermoe_plugin.compat.symbols.registry import ENDPOINT_GROUP, PLUGIN_GROUPS

ENTRY_POINT = "steermoe"
"""Name of this plugin in the groups of entry points."""
VARIABLE = "VLLM_PLUGINS"


def allow_list() -> str | None:
    """The value of VLLM_PLUGINS; None if it is not set."""
    return os.environ.get(VARIABLE)


def names_this_plugin(allowed: str | None) -> bool:
    """Whether an allow-list is set and names this plugin."""
    return allowed is not None and ENTRY_POINT in allowed.split(",")


def check_plugin_allowed() -> None:
    """Raise ConfigurationError if vLLM will not load this plugin; what is asked for would then run unsteered."""
    allowed = allow_list()
    if allowed is not None and not names_this_plugin(allowed):
        raise ConfigurationError(
            f"steering is asked for, but {VARIABLE}={allowed!r} keeps vLLM from loading the plugin; "
            f"add {ENTRY_POINT!r} to it or unset it"
        )


def check_routes_allowed() -> None:
    """Raise ConfigurationError if vLLM will not load this plugin's HTTP routes."""
    if not names_this_plugin(allow_list()):
        raise ConfigurationError(
            f"setting 'manage' adds HTTP routes, which vLLM loads only if {VARIABLE} names them: set "
            f"{VARIABLE}={ENTRY_POINT} (and other plugins that you use), or start with `steermoe serve`, which does"
        )
    if ENTRY_POINT not in _installed(ENDPOINT_GROUP):
        raise ConfigurationError(
            "setting 'manage': this installation of the package does not declare its HTTP routes; install it again"
        )


def _installed(group: str) -> Iterable[str]:
    return importlib.metadata.entry_points(group=group).names


def names_with_endpoints(allowed: str | None, installed: Callable[[str], Iterable[str]] = _installed) -> str:
    """The value of VLLM_PLUGINS that loads what `allowed` does and the routes of this plugin.

    Args:
        allowed: its value; None if it is not set.
        installed: gives the names of the installed plugins of an entry-point group.

    Raises:
        ConfigurationError: naming all plugins would let in the routes of another one.
    """
    if allowed is not None:
        return allowed
    names = {ENTRY_POINT, *(name for group in PLUGIN_GROUPS for name in installed(group))}
    others = sorted(names & set(installed(ENDPOINT_GROUP)) - {ENTRY_POINT})
    if others:
        raise ConfigurationError(
            f"plugin {others[0]!r} has HTTP routes under the name of its other parts, so letting ours in by name would "
            "let them in too; set VLLM_PLUGINS to the plugins that you want"
        )
    return ",".join(sorted(names))
