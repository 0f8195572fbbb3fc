"""What happens in every vLLM process: variants by lazy strings, and the hooks of the front end and the core."""

from __future__ import annotations

from expert_registry.errors import UnsupportedFeatureError
from vllm_steermoe_plugin.compat.symbols.frontend import RUST_FRONT_END
from vllm_steermoe_plugin.compat.symbols.registry import BUILT_IN_MODELS, MODEL_REGISTRY
from vllm_steermoe_plugin.compat.variant_names import VARIANTS, registered_elsewhere, variant_name
from vllm_steermoe_plugin.compat.versions import check_version
from vllm_steermoe_plugin.core.request_check import install_core_check
from vllm_steermoe_plugin.frontend.hooks import install_front_end_hooks
from vllm_steermoe_plugin.models.architectures import ARCHITECTURES
from vllm_steermoe_plugin.models.engine_config import install_config_hook


def register_all() -> None:
    """See `vllm_steermoe_plugin.register`."""
    check_version()
    if RUST_FRONT_END.load():
        raise UnsupportedFeatureError(
            "vLLM's Rust front end (VLLM_USE_RUST_FRONTEND) passes by this plugin: no default would be applied "
            "and no request checked. Unset it, or leave the plugin out with VLLM_PLUGINS"
        )
    registry = MODEL_REGISTRY.load()
    # Rows of other releases than the installed one have nothing to derive from. Another plugin's class stays, since
    # requests without steering must find it; steering it is then refused.
    names = [name for name in ARCHITECTURES.keys() & BUILT_IN_MODELS.load().keys() if not registered_elsewhere(name)]
    for name in names:
        # A string, so that no model file is imported and CUDA stays uninitialised until a worker needs the class.
        registry.register_model(name, f"{VARIANTS}:{variant_name(name)}")
    install_config_hook(names)
    install_front_end_hooks()
    install_core_check()
