"""What happens in every vLLM process: variants by lazy strings, and the front-end hook."""

from __future__ import annotations

from vllm_steermoe_plugin import vllm_internals as vllm
from vllm_steermoe_plugin.architectures import ARCHITECTURES
from vllm_steermoe_plugin.engine_hooks import install_front_end_hooks
from vllm_steermoe_plugin.variant_names import variant_name


def register_all() -> None:
    """See `vllm_steermoe_plugin.register`."""
    vllm.check_version()
    registry = vllm.MODEL_REGISTRY.load()
    # Rows of other releases than the installed one have nothing to derive from.
    for name in ARCHITECTURES.keys() & vllm.BUILT_IN_MODELS.load().keys():
        # A string, so that no model file is imported and CUDA stays uninitialised until a worker needs the class.
        registry.register_model(name, f"vllm_steermoe_plugin.variants:{variant_name(name)}")
    install_front_end_hooks()
