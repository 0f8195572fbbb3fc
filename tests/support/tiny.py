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
DERIVED_HEADS: dict[str, Any] = {k: v for k, v in COMMON.items() if k != "head_dim"}
"""Of models that derive the size of a head."""


def _olmoe() -> Any:
    # OLMoE has no grouped heads and derives the head size.
    common = DERIVED_HEADS | {"num_key_value_heads": 2}
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
    return transformers.GraniteMoeConfig(
        **DERIVED_HEADS, intermediate_size=64, num_local_experts=8, num_experts_per_tok=2
    )


def _granite_shared() -> Any:
    return transformers.GraniteMoeSharedConfig(
        **DERIVED_HEADS, intermediate_size=64, shared_intermediate_size=64, num_local_experts=8, num_experts_per_tok=2
    )


def _qwen2() -> Any:
    return transformers.Qwen2MoeConfig(
        **DERIVED_HEADS,
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


def widen(config: Any, width: int) -> Any:
    """The config, with this many hidden channels, in experts too."""
    for name in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        if hasattr(config, name):
            setattr(config, name, width)
    return config


def make_checkpoint(architecture: str, folder: Path, dtype: torch.dtype = torch.float32, width: int = 64) -> Path:
    """Write a random checkpoint of `architecture` to `folder` (once) and return the folder."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(widen(CONFIGS[architecture](), width), dtype=dtype)
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
