"""Start vLLM in this process with what detection and evaluation need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_steermoe_plugin.compat.plugin_allowlist import check_plugin_allowed
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import resolve_checkpoint
from vllm_steermoe_plugin.settings import KEY

if TYPE_CHECKING:
    from vllm import LLM

LAB_OPTIONS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "enforce_eager": True,
    # Without an explicit size vLLM claims gigabytes for a model of a few megabytes and starts ten times slower.
    "kv_cache_memory_bytes": 256 << 20,
    "gpu_memory_utilization": 0.2,
}
"""Engine options that fit steermoe-lab on any machine."""


def engine_options(model: str, settings: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Arguments for `vllm.LLM`: the caller's, with the plugin's settings added.

    Args:
        model: a hub id, a folder, or `steermoe-lab`.
        settings: the `steermoe` section of `additional_config`.
        options: any argument of `vllm.LLM`.
    """
    defaults = LAB_OPTIONS if model == lab_checkpoint.NAME else {}
    additional = dict(options.pop("additional_config", None) or {})
    additional[KEY] = {**additional.get(KEY, {}), **(settings or {})}
    return {
        "model": resolve_checkpoint(model),
        **defaults,
        **options,
        "additional_config": additional,
    }


def start_engine(model: str, settings: dict[str, Any] | None = None, **options: Any) -> LLM:
    """Start an engine; see `engine_options`.

    Raises:
        ConfigurationError: vLLM will not load the plugin.
    """
    check_plugin_allowed()
    from vllm import LLM

    return LLM(**engine_options(model, settings, **options))
