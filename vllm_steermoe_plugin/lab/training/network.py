"""The network of steermoe-lab: Qwen3-MoE as transformers writes it, with routers that obey rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from vllm_steermoe_plugin.device.rewrite import apply_rules, forcing
from vllm_steermoe_plugin.lab.text import END, PAD, SPECIAL_TOKENS
from vllm_steermoe_plugin.lab.training.planting import EXPERTS, LAYERS, TOP_K


def lab_config(vocabulary: int) -> Qwen3MoeConfig:
    """Small, but within what vLLM serves on a CPU (head size 32, widths divisible by 64)."""
    config: Any = Qwen3MoeConfig  # its fields are not all visible to mypy
    made: Qwen3MoeConfig = config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        moe_intermediate_size=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
    )
    return made


class RuledRouter(nn.Module):
    """Drop-in for the router of transformers that rewrites logits by `rules` before the top-k.

    `rules` is int8 signs `[B, E]` (one row per sequence), `[E]` (all alike) or None. `logits`
    keeps the raw router logits `[T, E]` of the last call and `chosen` the experts `[T, k]`.
    """

    def __init__(self, weight: nn.Parameter, top_k: int) -> None:
        super().__init__()
        self.weight = weight
        self.top_k = top_k
        self.rules: torch.Tensor | None = None
        self.logits = torch.empty(0)
        self.chosen = torch.empty(0, dtype=torch.long)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        logits = nn.functional.linear(hidden, self.weight)
        self.logits = logits
        if self.rules is not None:
            rules = forcing(self.rules)
            if rules.dim() == 2:
                rules = rules.repeat_interleave(len(logits) // len(rules), dim=0)
            logits = apply_rules(logits, rules, biases=False)
        weights, self.chosen = torch.softmax(logits, dim=-1, dtype=torch.float).topk(self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype)
        return logits, weights, self.chosen


def install_routers(model: Qwen3MoeForCausalLM) -> list[RuledRouter]:
    """Replace the router of every layer; parameters keep their names, so saving is unchanged."""
    routers = []
    for layer in model.model.layers:
        router = RuledRouter(layer.mlp.gate.weight, model.config.num_experts_per_tok)
        layer.mlp.gate = router
        routers.append(router)
    return routers


def set_rules(routers: list[RuledRouter], rules: torch.Tensor | None) -> None:
    """Give each layer its rules out of int8 `[L, B, E]` or `[L, E]`; None lifts them all."""
    for layer, router in enumerate(routers):
        router.rules = None if rules is None else rules[layer]


def empty_model(config: Qwen3MoeConfig) -> Qwen3MoeForCausalLM:
    """The architecture with the weights transformers starts from."""
    untyped: Any = Qwen3MoeForCausalLM
    model: Qwen3MoeForCausalLM = untyped(config)
    return model


def new_model(vocabulary: int) -> Qwen3MoeForCausalLM:
    """Untrained, float32. Router rows start small so that early routing is soft."""
    model = empty_model(lab_config(vocabulary))
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02 if "gate.weight" in name or "embed" in name else 0.05)
    return model


def load_model(folder: Path, dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    """A saved model for inference in `dtype`."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if not isinstance(loaded, Qwen3MoeForCausalLM):
        raise TypeError(f"{folder} holds a {type(loaded).__name__}, not a Qwen3MoeForCausalLM")
    model: Any = loaded
    model.eval()
    return loaded
