"""Expert load balancing (EPLB): rules and counts speak of the checkpoint's experts, whatever vLLM has moved where."""

from __future__ import annotations

import math

import pytest
import torch
from vllm.distributed.eplb.eplb_state import EplbLayerState
from vllm.model_executor.layers.fused_moe.router import base_router

from tests.support.top_k_router import TopK
from vllm_steermoe_plugin.device.ops import count_, rewrite_

EXPERTS, TOP_K = 6, 2
PHYSICAL = torch.tensor([3, 7, 0, 5, 1, 6])
"""Place of each logical expert among eight physical ones; two hold replicas."""


def test_the_rewrite_and_the_counts_come_before_vllm_maps_experts_to_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        base_router, "eplb_map_to_physical_and_record", lambda topk_ids, **others: PHYSICAL[topk_ids.long()].int()
    )
    state = EplbLayerState(
        expert_load_view=torch.zeros(8),
        logical_to_physical_map=PHYSICAL[:, None],
        logical_replica_count=torch.ones(EXPERTS),
        should_record_tensor=torch.tensor(False),
        num_unpadded_tokens_tensors=[torch.tensor(4)],
    )
    router = TopK(TOP_K, EXPERTS, eplb_state=state)
    counters = torch.zeros((1, 2, EXPERTS), dtype=torch.int64)
    groups = torch.ones(4, dtype=torch.int32)
    router.set_capture_fn(lambda ids: count_(ids, counters, groups, 0))
    logits = torch.arange(EXPERTS).float().repeat(4, 1)
    rules = torch.zeros((2, 1, EXPERTS), dtype=torch.float16)
    rules[1, 0, 0], rules[1, 0, EXPERTS - 1] = math.inf, -math.inf
    rewrite_(logits, rules, torch.ones(4, dtype=torch.int32), torch.full((1,), 3, dtype=torch.uint8), 0)
    _, places = router.select_experts(torch.zeros(4, 8), logits)
    # Logical expert 0 was activated and 5 deactivated, so 0 and 4 are chosen, wherever they are.
    assert places.sort(dim=1).values.tolist() == [sorted([int(PHYSICAL[0]), int(PHYSICAL[4])])] * 4
    assert counters[0, 1].tolist() == [4, 0, 0, 0, 4, 0]
