"""Engine configurations under which a token could run unsteered: refused."""

from __future__ import annotations

from typing import Any

from expert_registry.errors import UnsupportedFeatureError
from vllm_steermoe_plugin.settings import SWITCH_OFF, Settings

_EXACT = ("standard", "block")
"""Rejection samplings after which the answers are distributed as the steered model's."""


def refuse_unsupported(vllm_config: Any, settings: Settings) -> None:
    parallel = vllm_config.parallel_config
    speculation = vllm_config.speculative_config
    reasons = {
        "micro-batching (dual-batch overlap) splits the tokens of a step": parallel.use_ubatching,
        "kv_sharing_fast_prefill sends only some of a step's tokens through the last layers": (
            vllm_config.cache_config.kv_sharing_fast_prefill
        ),
        "a kernel of its own computes the gate and selects (--monokernel)": getattr(
            vllm_config.kernel_config, "monokernel", False
        ),
        "a kernel of its own computes the gate and selects (decode_backend latency_specialized)": (
            isinstance(vllm_config.additional_config, dict)
            and vllm_config.additional_config.get("decode_backend") == "latency_specialized"
        ),
        "prefill context parallelism splits a prompt's tokens over ranks": parallel.prefill_context_parallel_size > 1,
        "elastic expert parallelism starts workers later, of which nobody asks whether they steer": (
            parallel.enable_elastic_ep
        ),
        "adaptive verification decides on the GPU which token of a step belongs to which request": (
            speculation is not None and speculation.enable_adaptive_verification
        ),
        "its rejection sampling accepts draft tokens that the steered model would reject": (
            speculation is not None and speculation.rejection_sample_method not in _EXACT
        ),
        "counting under data parallelism: whoever counts asks one engine, which sees the requests of one rank": (
            settings.count_groups > 0 and parallel.data_parallel_size > 1
        ),
        "counting with a KV connector would miss the tokens that it brings in": (
            settings.count_groups > 0 and vllm_config.kv_transfer_config is not None
        ),
        "counting and enable_return_routed_experts need the same place": (
            settings.count_groups > 0 and vllm_config.aux_output_config.enabled
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedFeatureError(
                f"steering is not possible here: {reason}. Change that, or switch steering off with {SWITCH_OFF}"
            )
