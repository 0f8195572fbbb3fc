"""Names of the variant classes."""

from __future__ import annotations

import re

from vllm_steermoe_plugin.compat.symbols.registry import MODEL_REGISTRY, PACKAGE
from vllm_steermoe_plugin.compat.versions import vllm_version

VARIANTS = "vllm_steermoe_plugin.worker.variants"
"""The module of the variant classes."""

_PREFIX = "Steerable"


def variant_name(architecture: str) -> str:
    """Attribute of `worker/variants.py` that holds the variant of an architecture.

    vLLM remembers on disk what it learned of a lazily named class, under this name and the
    hash of `worker/variants.py`. The version in the name keeps it from using what it learned of
    another vLLM's class.
    """
    return f"{_PREFIX}{architecture}_vllm_{re.sub(r'[^0-9A-Za-z]', '_', vllm_version())}"


def architecture_of(name: str) -> str | None:
    """The inverse; None if `name` is no variant of the installed vLLM."""
    match = re.match(rf"^{_PREFIX}(\w+?)_vllm_", name)
    return match[1] if match and variant_name(match[1]) == name else None


def registered_elsewhere(architecture: str) -> str | None:
    """The module of the class that vLLM would build, if it is neither vLLM's own nor a variant; else None."""
    registered = MODEL_REGISTRY.load().models.get(architecture)
    if registered is None:
        return None
    # Registered by a string or as a class.
    module: str = getattr(registered, "module_name", None) or registered.model_cls.__module__
    return None if module == VARIANTS or module.startswith(PACKAGE) else module
