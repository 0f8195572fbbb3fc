"""Versions of the tools that a result depends on."""

from __future__ import annotations

import importlib.metadata

from vllm_steermoe_plugin.compat.ledger import vllm_version

DISTRIBUTION = "vllm-steermoe-plugin"


def tool_versions() -> dict[str, str]:
    """Name -> version, of this package and of what computes the numbers. Nothing is imported."""
    versions = {DISTRIBUTION: importlib.metadata.version(DISTRIBUTION), "vllm": vllm_version()}
    for name in ("torch", "transformers", "lm-eval"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
