"""Shapes of the six models of arXiv 2509.09660."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """L MoE layers, E experts, K experts per token; whether its logits become log-probabilities."""

    name: str
    layers: int
    experts: int
    top_k: int
    log_softmax: bool = False


MODELS = (
    Model("GPT-OSS-120B", 36, 128, 4),
    Model("GPT-OSS-20B", 24, 32, 4),
    Model("Mixtral-8x7B", 32, 8, 2),
    Model("OLMoE-1B-7B", 16, 64, 8),
    Model("Phi-3.5-MoE", 32, 16, 2, log_softmax=True),
    Model("Qwen3-30B-A3B", 48, 128, 8),
)
