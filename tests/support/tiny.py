"""Tiny random checkpoints of the steerable architectures, written by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}


def _olmoe() -> Any:
    # OLMoE has no grouped heads and derives the head size.
    common = {k: v for k, v in COMMON.items() if k != "head_dim"} | {"num_key_value_heads": 2}
    return transformers.OlmoeConfig(**common, intermediate_size=64, num_experts=8, num_experts_per_tok=2)


def _mixtral() -> Any:
    return transformers.MixtralConfig(**COMMON, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2)


def _qwen3() -> Any:
    # A dense layer in the middle: layer indices and rows of the rule table then differ.
    return transformers.Qwen3MoeConfig(
        **COMMON,
        intermediate_size=64,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )


def _gpt_oss() -> Any:
    return transformers.GptOssConfig(
        **COMMON,
        intermediate_size=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=128,
    )


def _phi() -> Any:
    # Biases as in the real checkpoint; vLLM's class always has them.
    biases = {"attention_bias": True, "lm_head_bias": True}
    return transformers.PhimoeConfig(
        **COMMON, **biases, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2
    )


def _granite() -> Any:
    common = {k: v for k, v in COMMON.items() if k != "head_dim"}
    return transformers.GraniteMoeConfig(**common, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2)


def _granite_shared() -> Any:
    common = {k: v for k, v in COMMON.items() if k != "head_dim"}
    return transformers.GraniteMoeSharedConfig(
        **common, intermediate_size=64, shared_intermediate_size=64, num_local_experts=8, num_experts_per_tok=2
    )


def _qwen2() -> Any:
    common = {k: v for k, v in COMMON.items() if k != "head_dim"}
    return transformers.Qwen2MoeConfig(
        **common,
        intermediate_size=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        decoder_sparse_step=2,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "OlmoeForCausalLM": _olmoe,
    "MixtralForCausalLM": _mixtral,
    "Qwen3MoeForCausalLM": _qwen3,
    "GptOssForCausalLM": _gpt_oss,
    "PhiMoEForCausalLM": _phi,
    "GraniteMoeForCausalLM": _granite,
    "GraniteMoeSharedForCausalLM": _granite_shared,
    "Qwen2MoeForCausalLM": _qwen2,
}


def make_checkpoint(architecture: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random checkpoint of `architecture` to `folder` (once) and return the folder."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Random routers of the default scale are nearly flat; spread them, so that tokens have preferences.
            if name.endswith(("gate.weight", "router.weight")):
                parameter.normal_(std=1.0)
            # Likewise experts: at the default scale, which of them a token gets hardly shows in the logits.
            elif "experts" in name and "bias" not in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # The real Phi-3.5-MoE says PhiMoEForCausalLM; transformers writes PhimoeForCausalLM.
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_DUMMY: dict[str, Any] = {k: v for k, v in COMMON.items() if k != "tie_word_embeddings"}
_MOE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}
_LINEAR_ATTENTION: dict[str, Any] = {
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
_DEEPSEEK: dict[str, Any] = {
    **_DUMMY,
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
_QWEN3_5: dict[str, Any] = {**_DUMMY, **_MOE, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 32}

_BAILING: dict[str, Any] = {
    "model_type": "bailing_moe",
    **_DUMMY,
    **_MOE,
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
_LATENT_ATTENTION: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "head_dim": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}
_GEMMA: dict[str, Any] = {
    "model_type": "gemma4_text",
    **_DUMMY,
    "intermediate_size": 32,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "hidden_size_per_layer_input": 0,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 64,
    "tie_word_embeddings": True,
}
_INTERNVL: dict[str, Any] = {
    "model_type": "internvl",
    "text_config": {"model_type": "qwen3_moe", **_DUMMY, **_MOE, "intermediate_size": 32},
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [28, 28],
        "patch_size": [14, 14],
    },
    "image_token_id": 3,
}
_QWEN3_5_VL: dict[str, Any] = {
    "model_type": "qwen3_5_moe",
    "text_config": {"model_type": "qwen3_5_moe_text", **_QWEN3_5},
    "vision_config": {"model_type": "qwen3_5_moe", **_QWEN_VISION},
}

DUMMIES: dict[str, dict[str, Any]] = {
    "BailingMoeForCausalLM": _BAILING,
    "BailingMoeV2ForCausalLM": _BAILING,
    "Cohere2MoeForCausalLM": {
        "model_type": "cohere2_moe",
        **_DUMMY,
        "intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "DbrxForCausalLM": {
        "model_type": "dbrx",
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "n_heads": 2,
        "n_layers": 2,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 1, "rope_theta": 10000},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "DeepseekForCausalLM": {
        "model_type": "deepseek",
        **_DEEPSEEK,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
    },
    "DeepseekV2ForCausalLM": {"model_type": "deepseek_v2", **_DEEPSEEK, **_LATENT_ATTENTION},
    # Their usual configs say otherwise, and are refused.
    "DeepseekV3ForCausalLM": {
        "model_type": "deepseek_v3",
        **_DEEPSEEK,
        **_LATENT_ATTENTION,
        "scoring_func": "softmax",
        "topk_method": "greedy",
    },
    "MistralLarge3ForCausalLM": {
        "model_type": "deepseek_v3",
        **_DEEPSEEK,
        **_LATENT_ATTENTION,
        "scoring_func": "softmax",
        "topk_method": None,
    },
    "Gemma4ForCausalLM": _GEMMA,
    "Gemma4ForConditionalGeneration": {
        "model_type": "gemma4",
        "text_config": _GEMMA,
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        "audio_config": None,
    },
    "GraniteMoeHybridForCausalLM": {
        "model_type": "granitemoehybrid",
        **_DUMMY,
        "intermediate_size": 32,
        "shared_intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "position_embedding_type": "rope",
    },
    "GraniteMoeSWAForCausalLM": {
        "model_type": "granitemoe_swa",
        **_DUMMY,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "JambaForCausalLM": {
        "model_type": "jamba",
        **_DUMMY,
        "num_hidden_layers": 4,
        "intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "Qwen3NextForCausalLM": {
        "model_type": "qwen3_next",
        **_DUMMY,
        **_MOE,
        **_LINEAR_ATTENTION,
        "intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [0],
    },
    "Qwen3_5MoeForCausalLM": {"model_type": "qwen3_5_moe_text", **_QWEN3_5},
    "Qwen3VLMoeForConditionalGeneration": {
        "model_type": "qwen3_vl_moe",
        "text_config": {"model_type": "qwen3_vl_moe_text", **_DUMMY, **_MOE, "intermediate_size": 32},
        "vision_config": {"model_type": "qwen3_vl_moe", **_QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
    "InternS1ForConditionalGeneration": _INTERNVL,
    "InternVLForConditionalGeneration": _INTERNVL,
    "K2HorizonForCausalLM": {
        "model_type": "k2_horizon",
        **_DUMMY,
        **_MOE,
        "intermediate_size": 32,
        "moe_gate_bias": False,
        "mova_num_experts": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
        "rope_head_dim": 32,
        "query_key_norm": False,
        "attention_bias": False,
        "attention_gate_func": None,
        "layernorm_num_groups": 1,
        "tie_word_embeddings": False,
        "router_score_func": "softmax",
        "router_scaling_factor": 1.0,
        "num_shared_experts": 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
    },
    "Step3TextForCausalLM": {
        "model_type": "step3_text",
        **{k: v for k, v in _DUMMY.items() if k != "num_key_value_heads"},
        "intermediate_size": 32,
        "num_attention_groups": 1,
        "moe_num_experts": 8,
        "moe_top_k": 2,
        "moe_intermediate_size": 32,
        "moe_layers_enum": "1,2",
        "share_expert_dim": 32,
        "share_q_dim": 64,
        "max_position_embedding": 256,
        "norm_expert_weight": False,
        "num_hidden_layers": 3,
    },
    "InternS2PreviewForConditionalGeneration": _QWEN3_5_VL,
    "Qwen3_5MoeForConditionalGeneration": _QWEN3_5_VL,
}
"""Configs alone: the engine runs them on weights that vLLM draws (`load_format="dummy"`)."""


BARE_MODEL_TYPES = ("bailing_moe", "deepseek", "k2_horizon")
"""Model types whose config class comes with the checkpoint; `write_config` puts a bare one in its place."""


def write_config(architecture: str, folder: Path, **changes: Any) -> Path:
    """Write the config.json of a dummy model to `folder` and return the folder."""
    for model_type in BARE_MODEL_TYPES:
        bare = type("BareConfig", (transformers.PretrainedConfig,), {"model_type": model_type})
        transformers.AutoConfig.register(model_type, bare, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [architecture], **DUMMIES[architecture], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
