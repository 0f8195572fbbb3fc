"""Compile the kernels that a model can need, before any CUDA graph is captured."""

from __future__ import annotations

import torch

from vllm_steermoe_plugin.device.kernels.counting import count
from vllm_steermoe_plugin.device.kernels.rewriting import DTYPES, launch
from vllm_steermoe_plugin.device.kernels.tiles import SMALL_STEP, choose_tile

_ID_DTYPES = (torch.int32, torch.int64)
"""Of the experts that a router selected."""


def warm_up(
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    counters: torch.Tensor,
    token_groups: torch.Tensor,
    top_k: int,
    log_softmax: bool = False,
) -> None:
    """Run each kernel once on a token that is neither steered nor counted.

    Which dtype a router's logits have depends on the model, its quantisation and the GPU (a gate may return
    float32 in a bfloat16 model), so all three are compiled. Triton keeps what it compiled on disk.
    """
    num_experts, device = rules.shape[2], rules.device
    for dtype in DTYPES:
        logits = torch.zeros((1, num_experts), dtype=dtype, device=device)
        for num_tokens in (1, SMALL_STEP + 1):
            launch(logits, rules, token_slots, 0, choose_tile(num_experts, num_tokens), log_softmax)
    if counters.shape[1] > 1:
        for dtype in _ID_DTYPES:
            count(torch.zeros((1, top_k), dtype=dtype, device=device), counters, token_groups, 0)
