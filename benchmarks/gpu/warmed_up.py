"""Is everything compiled when a model is bound? Needs Triton, and a GPU or what stands in for its driver."""

from __future__ import annotations

import itertools

import torch

from benchmarks.gpu.outcome import Outcome
from benchmarks.gpu.selections import ID_DTYPES
from vllm_steermoe_plugin.device.kernels.counting import count, count_kernel
from vllm_steermoe_plugin.device.kernels.reselecting import reselect, reselect_kernel
from vllm_steermoe_plugin.device.kernels.rewriting import DTYPES, rewrite, rewrite_kernel
from vllm_steermoe_plugin.device.kernels.tiles import SMALL_STEP
from vllm_steermoe_plugin.device.kernels.warm_up import warm_up_counting, warm_up_gate, warm_up_selection
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.device.step_buffers import StepBuffers

LAYERS, SLOTS, GROUPS = 6, 9, 3
WIDE = 2048
"""T of a step that is not small."""
LENGTHS = (1, 2, 8, 16, 500, SMALL_STEP, SMALL_STEP + 1, WIDE)
ROUTER = RouterKind("sigmoid", True, 4, 2, True, 2.5)
KERNELS = (rewrite_kernel, reselect_kernel, count_kernel)


def check_warm_up(device: torch.device) -> Outcome:
    """After the warm-up, steps of all lengths in all dtypes and layers compile nothing: a capture never has to."""
    name = "everything is compiled before a capture"
    for experts, top_k, groups, bfloat16 in ((96, 4, GROUPS, False), (128, 8, 0, True)):
        buffers = StepBuffers(SLOTS, LAYERS, experts, WIDE, counting=groups > 0, device=device)
        counters = torch.zeros((LAYERS, groups + 1, experts), dtype=torch.int64, device=device)
        before = compiled_kernels()
        bias = torch.zeros(experts, device=device)
        warm_up_gate(buffers.rules, buffers.token_slots, buffers.active, bfloat16=bfloat16)
        warm_up_selection(buffers.rules, buffers.token_slots, buffers.active, top_k, ROUTER, bias)
        warm_up_counting(counters, buffers.token_groups, top_k)
        warm = compiled_kernels()
        if warm == before:
            return Outcome(name, "the warm-up compiled nothing")
        for dtype, tokens, row in itertools.product(DTYPES, LENGTHS, (0, 1, LAYERS - 1)):
            logits = torch.zeros((tokens, experts), dtype=dtype, device=device)
            rewrite(logits, buffers.rules, buffers.token_slots, buffers.active, row, bfloat16=bfloat16)
            rewrite(logits, buffers.rules, buffers.token_slots, buffers.active, row, forces=False)
            # A rank's share of a step may begin anywhere.
            for slots, id_dtype in itertools.product((buffers.token_slots, buffers.token_slots[1:]), ID_DTYPES):
                chosen = torch.zeros((tokens, top_k), device=device), torch.zeros((tokens, top_k), device=device)
                if tokens <= len(slots):
                    reselect(
                        chosen[0],
                        chosen[1].to(id_dtype),
                        logits,
                        bias,
                        buffers.rules,
                        slots,
                        buffers.active,
                        row,
                        ROUTER,
                    )
        if groups:
            for dtype, tokens in itertools.product(ID_DTYPES, (1, 16, WIDE)):
                ids = torch.zeros((tokens, top_k), dtype=dtype, device=device)
                for row in (0, 1, LAYERS - 1):
                    count(ids, counters, buffers.token_groups, row)
        if compiled_kernels() != warm:
            return Outcome(name, f"{compiled_kernels() - warm} more kernels were compiled for {experts} experts")
    return Outcome(name)


def compiled_kernels() -> int:
    """Kernels in memory, of all devices."""
    caches = (cache[0] for kernel in KERNELS for cache in kernel.device_caches.values())
    return sum(len(cache) for cache in caches)
