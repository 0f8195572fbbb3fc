"""What can be steered of the model that an engine serves: one answer for the front end and for each worker."""

from __future__ import annotations

from typing import Any

from expert_registry.errors import ConfigurationError, UnsupportedFeatureError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.compat.variant_names import registered_elsewhere
from vllm_steermoe_plugin.models.architectures import shape_of
from vllm_steermoe_plugin.models.kv_connectors import SALTED, is_salted


def served_shape(vllm_config: Any) -> MoEShape:
    """The MoE shape of the model that vLLM builds for an engine.

    Args:
        vllm_config: vLLM's configuration of the engine.

    Raises:
        UnsupportedModelError: the model cannot be steered, or its config lacks what it should have.
        UnsupportedFeatureError: it could be in an engine that is configured otherwise.
        ConfigurationError: another plugin runs this architecture.
    """
    model = vllm_config.model_config
    other = registered_elsewhere(model.architecture)
    if other is not None:
        raise ConfigurationError(
            f"another plugin has registered its own {model.architecture} with vLLM (in {other}), which this one "
            "does not steer; leave that plugin out with VLLM_PLUGINS"
        )
    if vllm_config.is_mm_encoder_only:
        raise UnsupportedFeatureError(
            f"this {model.architecture} cannot be steered: the engine runs only its encoders (mm_encoder_only), not "
            "its language model; steer the engine that generates"
        )
    if model.runner_type == "pooling":
        raise UnsupportedFeatureError(
            f"this {model.architecture} cannot be steered: the engine pools (embeds, classifies, scores), and vLLM's "
            "pooling requests carry no steering"
        )
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None and not is_salted(transfer):
        raise UnsupportedFeatureError(
            f"this engine cannot be steered: {transfer.kv_connector}, as it is configured, may bring in a KV cache "
            f"that was computed under other steering; with {', '.join(sorted(SALTED))}, keeping blocks in memory "
            "or in files of its own, or without a KV connector, it can"
        )
    # What vLLM has then built is looked at once more (`worker/layers.py`).
    return shape_of(model.hf_config, model.architecture)
