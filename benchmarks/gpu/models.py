"""Shapes of the six models of arXiv 2509.09660, and of others whose selection must be corrected."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_steermoe_plugin.device.router_kind import RouterKind

_PLAIN = RouterKind("softmax", renormalize=True)


@dataclass(frozen=True, slots=True)
class Model:
    """L MoE layers, E experts, K experts per token; whether its logits become log-probabilities; its router."""

    name: str
    layers: int
    experts: int
    top_k: int
    log_softmax: bool = False
    router: RouterKind = _PLAIN


MODELS = (
    Model("GPT-OSS-120B", 36, 128, 4),
    Model("GPT-OSS-20B", 24, 32, 4),
    Model("Mixtral-8x7B", 32, 8, 2),
    Model("OLMoE-1B-7B", 16, 64, 8),
    Model("Phi-3.5-MoE", 32, 16, 2, log_softmax=True),
    Model("Qwen3-30B-A3B", 48, 128, 8),
)

CORRECTED = (
    Model("DeepSeek-V3", 58, 256, 8, router=RouterKind("sigmoid", True, 8, 4, True, 2.5)),
    Model("Kimi-K2", 60, 384, 8, router=RouterKind("sigmoid", True, 1, 1, True, 2.827)),
    Model("GLM-4.5", 89, 160, 8, router=RouterKind("sigmoid", True, 1, 1, True, 2.5)),
    Model("MiniMax-M2", 62, 256, 8, router=RouterKind("sigmoid", True, 1, 1, True)),
)
"""By their published configurations."""
OTHER_ROUTERS = (
    Model("DeepSeek-V2", 59, 160, 6, router=RouterKind("softmax", False, 8, 3, False, 16.0)),
    Model("sqrt(softplus)", 3, 512, 10, router=RouterKind("sqrtsoftplus", True, 1, 1, True, 1.5)),
    Model("groups of 15", 2, 60, 4, router=RouterKind("sigmoid", True, 4, 2)),
    Model("few experts", 2, 8, 2, router=RouterKind("sigmoid")),
)
"""For what the others do not have: a softmax of groups, other scores, weights that are no shares, an E in between."""
