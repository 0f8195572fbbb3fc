"""Router logits and rules, drawn by hypothesis."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from vllm_steermoe_plugin.device.rewrite import forcing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def routed(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[T, E]` in some dtype, with ties and extremes, and rules `[T, E]`."""
    experts = draw(st.integers(1, 12))
    tokens = draw(st.integers(1, 4))
    dtype = draw(st.sampled_from(DTYPES))
    scale = draw(st.sampled_from([1e-6, 1.0, 30.0, 3000.0]))
    value = st.floats(-1, 1, width=32) | st.sampled_from([0.0, 1.0, -1.0])
    rows = draw(st.lists(st.lists(value, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    rule = st.lists(st.sampled_from([-1, 0, 1]), min_size=experts, max_size=experts)
    rules = draw(st.lists(rule, min_size=tokens, max_size=tokens))
    return (torch.tensor(rows) * scale).to(dtype), forcing(torch.tensor(rules))
