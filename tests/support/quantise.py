"""Turns a tiny checkpoint into a quantised one, and into one of the values that are stored there.

`quantise(source, folder, scheme)` writes what the format puts on disk; `dequantised(source, folder, scheme)` writes the
same values in bfloat16, for a reference without quantisation. Every scale is a power of two, so that bfloat16 holds
these values exactly: the two are one model, and only its activations are rounded otherwise. Sizes must be multiples of
the scheme's group.
"""

from __future__ import annotations

import json
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import _disable_current_modes

Tensors = dict[str, torch.Tensor]
EXPERTS = r"\.experts\.\d+\.\w+\.weight$"
"""One expert's projection `[out, in]`, as OLMoE, Mixtral, Qwen and DeepSeek checkpoints name it."""
GPT_OSS_EXPERTS = r"\.experts\.(gate_up|down)_proj$"
"""All experts of a layer `[E, in, out]`, as GPT-OSS has them."""
ALL_BUT_EXPERTS = ("lm_head", r"re:^(?!.*\.experts).*")
"""What compressed-tensors then leaves as it is."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
FP8_MAX, FP4_MAX_EXPONENT = 448.0, 2


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is stored.

    Attributes:
        encode: of a weight, to what is stored of it by suffix, and the values that this stands for.
        config: what config.json says of it.
        weights: the names of those that are stored so.
        levels: to how many, either way, a kernel rounds inputs of these weights, token by token; 0 if it does not.
    """

    encode: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
    config: dict[str, Any]
    weights: str = EXPERTS
    levels: int = 0


def quantise(source: Path, folder: Path, scheme: Scheme) -> Path:
    """Write the quantised checkpoint of `source` to `folder` and return the folder."""
    return _rewrite(source, folder, scheme, stored=True)


def dequantised(source: Path, folder: Path, scheme: Scheme) -> Path:
    """Write the values that `quantise` stores to `folder`, unquantised, and return the folder."""
    return _rewrite(source, folder, scheme, stored=False)


def _rewrite(source: Path, folder: Path, scheme: Scheme, stored: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".json" and "index" not in file.name:
            shutil.copy(file, folder)
    tensors: Tensors = {}
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not re.search(scheme.weights, name):
                tensors[name] = tensor.bfloat16()
                continue
            parts, values = scheme.encode(tensor.float())
            base = name.removesuffix(".weight")
            tensors |= {base + suffix: part for suffix, part in parts.items()} if stored else {name: values.bfloat16()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if stored:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme.config}))
    return folder


def _power_of_two(scales: torch.Tensor) -> torch.Tensor:
    """The next larger ones."""
    return scales.log2().ceil().exp2()


@contextmanager
def inputs_rounded(model: torch.nn.Module, scheme: Scheme) -> Iterator[None]:
    """For `Roundings`: the inputs of what `scheme` quantises are off by half a level, up or down by chance.

    Modules that read the same input, as the projections of attention, read the same error.
    """

    def perturb(args: tuple[torch.Tensor, ...], name: str) -> tuple[torch.Tensor, ...]:
        x, *rest = args
        with _disable_current_modes():
            chance = torch.Generator().manual_seed(zlib.crc32(name.rpartition(".")[0].encode()))
            signs = torch.randint(0, 2, x.shape, generator=chance) * 2 - 1
            return (x + signs * x.abs().amax(-1, keepdim=True) / (2 * scheme.levels), *rest)

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: perturb(args, name))
        for name, module in model.named_modules()
        if scheme.levels and re.search(scheme.weights, f"{name}.weight")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# Integers of four bits, `group` inputs to a scale.


def _int4(weight: torch.Tensor, group: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Symmetric: values 0..15 around 8 `[out, in]`, scales `[out, in / group]`, and what they stand for."""
    grouped = weight.reshape(len(weight), -1, group)
    scales = _power_of_two(grouped.abs().amax(2) / 7).to(dtype)
    levels = (grouped / scales.float()[..., None]).round().clamp(-8, 7)
    return (levels.flatten(1) + 8).int(), scales, (levels * scales.float()[..., None]).flatten(1)


def _pack(levels: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight values of four bits along the last dimension into an int32; `order[i]` goes to the i-th lowest bits."""
    eights = levels.reshape(len(levels), -1, 8)[..., list(order)].long()
    word = (eights << torch.arange(0, 32, 4)).sum(2)
    return torch.where(word >= 1 << 31, word - (1 << 32), word).int()


def packed(group: int = 64) -> Scheme:
    """compressed-tensors, W4A16 ("pack-quantized")."""

    def encode(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        levels, scales, values = _int4(weight, group, torch.bfloat16)
        shape = torch.tensor(weight.shape)
        return {".weight_packed": _pack(levels), ".weight_scale": scales, ".weight_shape": shape}, values

    weights = _arguments(4, "int", "group", group_size=group)
    return Scheme(encode, _compressed_tensors("pack-quantized", weights, None))


def gptq(group: int = 64) -> Scheme:
    """AutoGPTQ: packed along the inputs; a zero point is stored as one less than it is."""

    def encode(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        levels, scales, values = _int4(weight, group, torch.float16)
        zeros = torch.full(scales.T.shape, 7)
        which = torch.arange(weight.shape[1], dtype=torch.int32) // group
        parts = {".qweight": _pack(levels).T, ".qzeros": _pack(zeros), ".scales": scales.T, ".g_idx": which}
        return parts, values

    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": True}
    return Scheme(encode, config | {"lm_head": False, "checkpoint_format": "gptq"})


def awq(group: int = 64) -> Scheme:
    """AutoAWQ ("gemm"): packed along the outputs, interleaved, with zero points. Everything but experts is left out."""

    def encode(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        levels, scales, values = _int4(weight, group, torch.float16)
        zeros = torch.full(scales.T.shape, 8)
        return {
            ".qweight": _pack(levels.T, AWQ_ORDER),
            ".qzeros": _pack(zeros, AWQ_ORDER),
            ".scales": scales.T,
        }, values

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Scheme(encode, config | {"modules_to_not_convert": ["gate", "self_attn", "lm_head"]})


# Eight bits.


def int8(weights: str = EXPERTS, ignore: tuple[str, ...] = ALL_BUT_EXPERTS, levels: int = 0) -> Scheme:
    """compressed-tensors, W8A8: a scale for each output, activations by token.

    A quarter of the range: on processors without VNNI, oneDNN adds two products in 16 bits, which the whole would
    saturate; and what is stored then differs from its source by more than roundings do.
    """

    def encode(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scales = _power_of_two(weight.abs().amax(1, keepdim=True) / 31)
        stored = (weight / scales).round()
        return {".weight": stored.to(torch.int8), ".weight_scale": scales}, stored * scales

    activations = _arguments(8, "int", "token", dynamic=True)
    arguments = _arguments(8, "int", "channel")
    return Scheme(encode, _compressed_tensors("int-quantized", arguments, activations, ignore), weights, levels)


def int8_beside_experts(*, gate: bool = False) -> Scheme:
    """The same beside experts, and for the gate (where the model hands it the configuration)."""
    names = r"(self_attn|mlp|shared_experts)\.\w+_proj" + (r"|\.gate" if gate else "")
    ignore = ("lm_head", r"re:.*\.experts.*", "re:.*conv.*", r"re:.*\.feed_forward\.w.*")
    return int8(rf"({names})\.weight$", ignore, levels=127)


def fp8(block: int = 128) -> Scheme:
    """DeepSeek's FP8: a scale for each square block. Everything but experts is left out."""

    def encode(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        blocks = weight.reshape(len(weight) // block, block, -1, block)
        scales = _power_of_two(blocks.abs().amax((1, 3)) / FP8_MAX)
        levels = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        values = (levels.float() * scales[:, None, :, None]).flatten(2).flatten(0, 1)
        return {".weight": levels.flatten(2).flatten(0, 1), ".weight_scale_inv": scales}, values

    names = [f"model.layers.{layer}.{name}" for layer in range(16) for name in NOT_EXPERTS]
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    return Scheme(encode, config | {"modules_to_not_convert": ["lm_head", *names]})


NOT_EXPERTS = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")),
    *(
        f"mlp.{where}{name}"
        for where in ("", "shared_experts.")
        for name in ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
    ),
    *("mlp.gate", "block_sparse_moe.gate"),
)


def mxfp4() -> Scheme:
    """GPT-OSS: blocks of 32 inputs with a power of two as scale; `[E, in, out]` becomes `[E, out, in / 32, 16]`."""

    def encode(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        blocks = weight.transpose(1, 2).reshape(len(weight), weight.shape[2], -1, 32)
        largest = blocks.abs().amax(3).clamp_min(2.0**-100)
        exponents = (largest.log2().floor() - FP4_MAX_EXPONENT).clamp(-127, 127)
        scaled = blocks / exponents.exp2()[..., None]
        nearest = (scaled.abs()[..., None] - FP4).abs().argmin(-1)
        codes = nearest + 8 * (scaled < 0)
        values = FP4[nearest] * scaled.sign() * exponents.exp2()[..., None]
        return {
            "_blocks": (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8),
            "_scales": (exponents + 127).to(torch.uint8),
        }, values.flatten(2).transpose(1, 2)

    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return Scheme(encode, {"quant_method": "mxfp4", "modules_to_not_convert": kept}, GPT_OSS_EXPERTS)


# What compressed-tensors says in config.json.


def _arguments(bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False} | more


def _compressed_tensors(
    layout: str,
    weights: dict[str, Any],
    activations: dict[str, Any] | None,
    ignore: tuple[str, ...] = ALL_BUT_EXPERTS,
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    ignored = {"ignore": list(ignore), "kv_cache_scheme": None, "quantization_status": "compressed"}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}} | ignored
