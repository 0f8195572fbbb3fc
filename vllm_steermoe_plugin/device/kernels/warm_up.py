"""Compile the kernels that a model can need, before any CUDA graph is captured."""

from __future__ import annotations

import itertools

import torch

from vllm_steermoe_plugin.device.kernels.counting import count
from vllm_steermoe_plugin.device.kernels.reselecting import choose_tile as choose_selection_tile
from vllm_steermoe_plugin.device.kernels.reselecting import launch as launch_selection
from vllm_steermoe_plugin.device.kernels.rewriting import DTYPES, launch
from vllm_steermoe_plugin.device.kernels.tiles import SMALL_STEP, choose_tile
from vllm_steermoe_plugin.device.router_kind import RouterKind

_STEPS = (1, SMALL_STEP + 1)
"""T of a small step and of a large one."""
_ID_DTYPES = (torch.int32, torch.int64)
"""Of the experts that a router selected."""
_COUNTED_DTYPES = (*_ID_DTYPES, torch.int16)
"""Likewise, and of those that a kernel which selects by itself hands over."""


def warm_up_gate(
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    log_softmax: bool = False,
    bfloat16: bool = False,
    forces: bool = True,
) -> None:
    """Run the rewrite on a token that is not steered, in all forms that a gate's logits can need.

    Which dtype a router's logits have depends on the model, its quantisation and the GPU (a gate may return
    float32 in a bfloat16 model), so all three are compiled. Triton keeps what it compiled on disk.
    """
    num_experts, device = rules.shape[2], rules.device
    for dtype in DTYPES:
        logits = torch.zeros((1, num_experts), dtype=dtype, device=device)
        for num_tokens in _STEPS:
            launch(
                logits,
                rules,
                token_slots,
                active,
                0,
                choose_tile(num_experts, num_tokens),
                log_softmax,
                bfloat16,
                forces,
            )


def warm_up_selection(
    rules: torch.Tensor,
    token_slots: torch.Tensor,
    active: torch.Tensor,
    top_k: int,
    kind: RouterKind,
    bias: torch.Tensor | None,
) -> None:
    """Run the correction of a selection, and the biases before it, on a token that is not steered.

    `bias` is the router's, or None.
    """
    warm_up_gate(rules, token_slots, active, forces=False)
    num_experts, device = rules.shape[2], rules.device
    for dtype, id_dtype in itertools.product(DTYPES, _ID_DTYPES):
        logits = torch.zeros((1, num_experts), dtype=dtype, device=device)
        ids = torch.zeros((1, top_k), dtype=id_dtype, device=device)
        weights = torch.zeros((1, top_k), device=device)
        for num_tokens in _STEPS:
            tile = choose_selection_tile(num_experts, num_tokens, kind)
            launch_selection(weights, ids, logits, bias, rules, token_slots, active, 0, kind, tile)


def warm_up_counting(counters: torch.Tensor, token_groups: torch.Tensor, top_k: int) -> None:
    """Count the selection of a token that is in no group, if there are groups."""
    if counters.shape[1] > 1:
        for dtype in _COUNTED_DTYPES:
            count(torch.zeros((1, top_k), dtype=dtype, device=counters.device), counters, token_groups, 0)
