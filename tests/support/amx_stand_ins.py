"""Stand-ins in torch for the kernels that vLLM's quantised CPU experts need from a processor with AMX.

vLLM loads, checks, repacks and selects as always; only the products of the experts are computed here, from the values
that the stored weights stand for (activations are not quantised). They replace vLLM's for the whole process.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.support.quantise import AWQ_ORDER, FP4

EXPERTS = ("CPUExpertsFp8", "CPUExpertsInt8", "CPUExpertsInt4", "CPUExpertsMxfp4")
INT8, FP8, INT4, MXFP4 = 1, 2, 3, 4
"""Methods, as vLLM numbers them."""
_LIBRARY: list[Any] = []


def install() -> bool:
    """Put the stand-ins into place; false if the processor has the kernels, which are then left as they are."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    if torch.cpu._is_amx_tile_supported():
        return False
    for name in EXPERTS:
        getattr(cpu_moe, name)._supports_current_device = staticmethod(lambda: True)
    cpu_moe.fused_experts_cpu = fused_experts
    cpu_moe.convert_weight_packed_scale_zp = unpack_int4
    make: Any = torch.library.Library
    library = make("_C", "FRAGMENT")
    for name in ("convert_weight_packed", "convert_scale_packed"):
        library.define(f"{name}(Tensor weight) -> Tensor")
        library.impl(name, lambda weight: weight.clone(), "CPU")
    _LIBRARY.append(library)  # It is undone with the object.
    return True


def unpack_int4(
    weight: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, algorithm: int
) -> tuple[torch.Tensor, ...]:
    """GPTQ's (1) or AWQ's (0) words as `[E, out, in]` values, `[E, out, groups]` zero points and scales."""
    if algorithm == 1:
        values = _nibbles(weight).transpose(2, 3).flatten(1, 2)
        points = _nibbles(zeros).flatten(2) + 1
    else:
        order = [AWQ_ORDER.index(i) for i in range(len(AWQ_ORDER))]
        values = _nibbles(weight)[..., order].flatten(2)
        points = _nibbles(zeros)[..., order].flatten(2)
    return tuple(part.transpose(1, 2).contiguous() for part in (values, points, scales))


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    return ((words[..., None] >> torch.arange(0, 32, 4)) & 15).to(torch.int8)


def fused_experts(
    output: torch.Tensor,
    hidden: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    method: int,
    scale1: torch.Tensor,
    scale2: torch.Tensor,
    zero1: torch.Tensor | None,
    zero2: torch.Tensor | None,
    block: list[int] | None,
    bias1: torch.Tensor | None = None,
    bias2: torch.Tensor | None = None,
    alpha: float | None = None,
    limit: float | None = None,
    *_: Any,
) -> None:
    """What `torch.ops._C.fused_experts_cpu` computes, in float32, expert by expert."""
    x = hidden.float()
    total = torch.zeros_like(x)
    for expert in sorted(set(topk_ids.flatten().tolist())):
        up = x @ _values(method, w1, scale1, zero1, block, expert).T
        if bias1 is not None:
            up = up + bias1[expert].float()
        if alpha is None:
            gate, linear = up.chunk(2, dim=1)
            inner = torch.nn.functional.silu(gate) * linear
        else:  # GPT-OSS: gate and up alternate.
            gate, linear = up[:, ::2].clamp(max=limit), up[:, 1::2].clamp(-(limit or 0), limit)
            inner = gate * torch.sigmoid(alpha * gate) * (linear + 1)
        down = inner @ _values(method, w2, scale2, zero2, block, expert).T
        if bias2 is not None:
            down = down + bias2[expert].float()
        total += down * (topk_weights * (topk_ids == expert)).sum(1, keepdim=True)
    output.copy_(total)


def _values(
    method: int,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    block: list[int] | None,
    expert: int,
) -> torch.Tensor:
    """One expert's weight `[out, in]`."""
    w, s = weight[expert], scale[expert]
    if method == INT8:
        return w.float() * s.float().reshape(-1, 1)
    if method == FP8 and block is not None:
        spread = s.float().repeat_interleave(block[0], 0)[: w.shape[0]].repeat_interleave(block[1], 1)
        return w.float() * spread[:, : w.shape[1]]
    if method == INT4 and zero is not None:
        group = w.shape[1] // s.shape[1]
        return (w.float() - zero[expert].float().repeat_interleave(group, 1)) * s.float().repeat_interleave(group, 1)
    if method == MXFP4:
        codes = torch.stack([w & 15, w >> 4], dim=2).flatten(1).long()
        return FP4[codes & 7] * (1 - 2 * (codes >> 3)) * (s.float() - 127).exp2().repeat_interleave(32, 1)
    raise NotImplementedError(f"no stand-in for method {method}")
