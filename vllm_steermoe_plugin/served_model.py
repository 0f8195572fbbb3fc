"""What can be steered of the model that an engine serves: one answer for the front end and for each worker."""

from __future__ import annotations

from typing import Any

from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.architectures import NotSteerable, shape_of
from vllm_steermoe_plugin.variant_names import registered_elsewhere

SALTED = frozenset({"LMCacheMPConnector", "MooncakeStoreConnector", "OffloadingConnector", "SimpleCPUOffloadConnector"})
"""vLLM's KV connectors that find what they keep by vLLM's block hashes or with the cache salt, and so by the steering
under which it was computed (but not by what is counted: beside counting, `binding.py` refuses them all). Others go by
the tokens alone, or take what another engine has computed, under whatever."""


def served_shape(vllm_config: Any) -> MoEShape:
    """The MoE shape of the model that vLLM builds for an engine.

    Args:
        vllm_config: vLLM's configuration of the engine.

    Raises:
        NotSteerable: the engine runs no language model that can be steered; the message says why.
        EngineError: the model's config lacks what it should have.
    """
    model = vllm_config.model_config
    other = registered_elsewhere(model.architecture)
    if other is not None:
        raise NotSteerable(
            f"another plugin has registered its own {model.architecture} with vLLM (in {other}), which this one "
            "does not steer; leave that plugin out with VLLM_PLUGINS"
        )
    if vllm_config.is_mm_encoder_only:
        raise NotSteerable(
            f"this {model.architecture} cannot be steered: the engine runs only its encoders (mm_encoder_only), not "
            "its language model; steer the engine that generates"
        )
    if model.runner_type == "pooling":
        raise NotSteerable(
            f"this {model.architecture} cannot be steered: the engine pools (embeds, classifies, scores), and vLLM's "
            "pooling requests carry no steering"
        )
    transfer = vllm_config.kv_transfer_config
    connector = transfer.kv_connector if transfer is not None else None
    if connector is not None and (connector not in SALTED or transfer.kv_connector_module_path is not None):
        raise NotSteerable(
            f"this engine cannot be steered: {connector} may bring in a KV cache that was computed under other "
            f"steering; with vLLM's {', '.join(sorted(SALTED))}, or without a KV connector, it can"
        )
    return shape_of(model.hf_config, model.architecture)
