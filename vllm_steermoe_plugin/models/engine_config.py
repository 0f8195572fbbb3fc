"""Prepare an engine's configuration where vLLM asks the model's architecture to, before any process of it starts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from expert_registry.errors import SteerMoEError
from vllm_steermoe_plugin.compat.handshake import extension_beside
from vllm_steermoe_plugin.compat.symbols.registry import MODEL_CONFIG_CLASS, MODEL_CONFIG_HOOK, MODEL_CONFIGS
from vllm_steermoe_plugin.models.steerability import served_shape
from vllm_steermoe_plugin.settings import read_settings


def install_config_hook(architectures: Iterable[str]) -> None:
    """Have vLLM ask for `prepare` when it configures an engine for one of these; a second call does nothing.

    This is vLLM's own extension point for architectures; what it has for one already is derived from.
    """
    MODEL_CONFIG_HOOK.load()
    rows, plain = MODEL_CONFIGS.load(), MODEL_CONFIG_CLASS.load()
    for name in architectures:
        rows[name] = preparing(rows.get(name, plain))


def preparing(base: type) -> type:
    """`base`, a `VerifyAndUpdateConfig`, made to prepare the configuration as well."""
    if hasattr(base, "steermoe_prepares"):
        return base

    class SteerableConfig(base):  # type: ignore[misc]
        steermoe_prepares = True

        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            super().verify_and_update_config(vllm_config)
            prepare(vllm_config)

    return SteerableConfig


def prepare(vllm_config: Any) -> None:
    """Add the plugin's methods to the workers of an engine whose model can be steered; a user's own stay.

    What is wrong with the settings or the model is said by the front end, which reads both at start.
    """
    try:
        if not read_settings(vllm_config.additional_config).enabled:
            return
        served_shape(vllm_config)
    except SteerMoEError:
        return
    parallel = vllm_config.parallel_config
    parallel.worker_extension_cls = extension_beside(parallel.worker_extension_cls)
