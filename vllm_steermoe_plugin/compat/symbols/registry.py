"""vLLM's model registry and plugin groups."""

from __future__ import annotations

from vllm_steermoe_plugin.compat.internal import Internal

PACKAGE = "vllm."
MODELS_PACKAGE = "vllm.model_executor.models"
MODEL_REGISTRY = Internal(
    "vllm.model_executor.models.registry:ModelRegistry",
    "register the variants by lazy strings, and see what other plugins registered",
    reads=("models", "register_model"),
)
LAZY_MODEL = Internal(
    "vllm.model_executor.models.registry:_LazyRegisteredModel", "see who registered it", reads=("module_name",)
)
REGISTERED_MODEL = Internal(
    "vllm.model_executor.models.registry:_RegisteredModel", "see who registered it", reads=("model_cls",)
)
BUILT_IN_MODELS = Internal(
    "vllm.model_executor.models.registry:_VLLM_MODELS",
    "find the classes to derive variants from (architecture -> module below MODELS_PACKAGE or full, class)",
)
PLUGIN_GROUPS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
"""Entry-point groups of which vLLM loads everything unless VLLM_PLUGINS says otherwise."""
ENDPOINT_GROUP = "vllm.endpoint_plugins"
"""The group of which it loads only what VLLM_PLUGINS names."""
MODEL_CONFIGS = Internal(
    "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
    "be asked when an engine is configured, before its processes start (architecture -> class; ours derive from those "
    "that are there)",
)
MODEL_CONFIG_HOOK = Internal(
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config",
    "derive from where an architecture has none",
    ("vllm_config",),
)
MODEL_CONFIG_CLASS = Internal(
    "vllm.model_executor.models.config:VerifyAndUpdateConfig", "derive from where an architecture has none"
)
