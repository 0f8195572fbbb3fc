"""What several dummy configs have in common."""

from __future__ import annotations

from typing import Any

from tests.support.tiny import COMMON

DUMMY: dict[str, Any] = {k: v for k, v in COMMON.items() if k != "tie_word_embeddings"}
QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
DEEPSEEK: dict[str, Any] = {
    **DUMMY,
    "intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "n_group": 1,
    "topk_group": 1,
}
LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "head_dim": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
BAILING: dict[str, Any] = {
    "model_type": "bailing_moe",
    **DUMMY,
    **MOE,
    "intermediate_size": 32,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "rope_theta": 10000,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "norm_head": False,
}
ARIA_VISION: dict[str, Any] = {
    "model_type": "idefics3_vision",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
