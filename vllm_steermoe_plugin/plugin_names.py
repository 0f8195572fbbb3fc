"""VLLM_PLUGINS, vLLM's allow-list: let this plugin's HTTP routes in and change nothing else.

Unset, it means all plugins but no HTTP routes; set, only those that it names, of every kind.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable

from expert_registry.errors import EngineError
from vllm_steermoe_plugin.engine import ENTRY_POINT
from vllm_steermoe_plugin.vllm_internals import ENDPOINT_GROUP, PLUGIN_GROUPS


def _installed(group: str) -> Iterable[str]:
    return importlib.metadata.entry_points(group=group).names


def names_with_endpoints(allowed: str | None, installed: Callable[[str], Iterable[str]] = _installed) -> str:
    """The value of VLLM_PLUGINS that loads what `allowed` does and the routes of this plugin.

    Args:
        allowed: its value; None if it is not set.
        installed: gives the names of the installed plugins of an entry-point group.

    Raises:
        EngineError: naming all plugins would let in the routes of another one.
    """
    if allowed is not None:
        return allowed
    names = {ENTRY_POINT, *(name for group in PLUGIN_GROUPS for name in installed(group))}
    others = sorted(names & set(installed(ENDPOINT_GROUP)) - {ENTRY_POINT})
    if others:
        raise EngineError(
            f"plugin {others[0]!r} has HTTP routes under the name of its other parts, so letting ours in by name would "
            "let them in too; set VLLM_PLUGINS to the plugins that you want"
        )
    return ",".join(sorted(names))
