"""The Triton kernels, compiled for GPUs that are not here. Run by `test_kernels.py` in a process of its own."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu.models import CORRECTED, MODELS, OTHER_ROUTERS, Model
from vllm_steermoe_plugin.device.kernels import reselecting
from vllm_steermoe_plugin.device.kernels.counting import count_kernel
from vllm_steermoe_plugin.device.kernels.rewriting import constants, rewrite_kernel
from vllm_steermoe_plugin.device.kernels.tiles import SMALL_STEP, choose_tile

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
STEERING = {"rules": "*fp16", "token_slots": "*i32", "active": "*u8", "num_tokens": "i32", "row": "i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def nightly(*values: Any) -> list[Any]:
    """Sizes and GPUs that are compiled for each night only."""
    return [pytest.param(value, marks=pytest.mark.nightly) for value in values]


def compiled(kernel: Any, types: dict[str, str], values: dict[str, Any], warps: int, capability: int) -> Any:
    """`kernel` for an NVIDIA GPU, with parameters of these types or values; pointers are aligned to 16 bytes."""
    names = kernel.arg_names
    assert set(types) | set(values) == set(names)
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


def compiled_rewrite(experts: int, tokens: int, dtype: torch.dtype, capability: int = 90) -> Any:
    tile = choose_tile(experts, tokens)
    logits = torch.empty((tokens, experts), dtype=dtype, device="meta")
    rules = torch.empty((65, 48, experts), dtype=torch.float16, device="meta")
    values = constants(logits, rules, torch.empty(tokens, dtype=torch.int32, device="meta"), tile)
    types = STEERING | {"logits": f"*{NAMES[dtype]}"}
    return compiled(rewrite_kernel, types, values, tile.warps, capability)


def compiled_reselect(
    model: Model,
    dtype: torch.dtype = torch.float32,
    capability: int = 90,
    id_dtype: torch.dtype = torch.int32,
    tokens: int = 1,
) -> Any:
    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, rules = meta(64, model.experts, dtype=dtype), meta(65, 48, model.experts, dtype=torch.float16)
    weights, ids = (meta(64, model.top_k, dtype=of) for of in (torch.float32, id_dtype))
    slots = meta(64, dtype=torch.int32)
    types = {"weights": "*fp32", "ids": {torch.int32: "*i32", torch.int64: "*i64"}[id_dtype], "bias": "*fp32"}
    types |= STEERING | {"logits": f"*{NAMES[dtype]}"}
    tile = reselecting.choose_tile(model.experts, tokens, model.router)
    values = reselecting.constants(weights, ids, logits, rules, slots, model.router, tile)
    return compiled(reselecting.reselect_kernel, types, values, tile.warps, capability)


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers, bytes of stack (spills) and bytes of shared memory, as the assembler counted them."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text)} | {
        "SHARED": kernel.metadata.shared
    }


@pytest.mark.parametrize("experts", [*nightly(8, 16, 32, 64), 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=NAMES.get)
def test_a_decode_step_takes_no_shared_memory(experts: int, dtype: torch.dtype, tmp_path: Path) -> None:
    kernel = compiled_rewrite(experts, 1, dtype)
    used = resources(kernel, tmp_path)
    assert used["SHARED"] == used["STACK"] == 0 and used["REG"] <= 40
    # A warp's four logits a thread in one access each way.
    width = {torch.bfloat16: "v2", torch.float32: "v4"}[dtype]
    assert kernel.asm["ptx"].count(f"st.global.{width}.b32") == kernel.asm["ptx"].count("st.global") == 1


@pytest.mark.parametrize("experts", [*nightly(8, 60, 1024), 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=NAMES.get)
def test_a_large_step_does_not_spill(experts: int, dtype: torch.dtype, tmp_path: Path) -> None:
    used = resources(compiled_rewrite(experts, SMALL_STEP + 1, dtype), tmp_path)
    assert used["STACK"] == 0 and used["REG"] <= (64 if experts < 1024 else 128)


@pytest.mark.parametrize("capability", [*nightly(80, 89, 100, 120), 90])
def test_other_gpus_take_the_kernels(capability: int) -> None:
    assert compiled_rewrite(128, 1, torch.bfloat16, capability).asm["cubin"]


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    """The interpreter's stand-in for rounding (benchmarks/gpu/interpreter.py) assumes it."""
    assert re.search(r"cvt\.rn\.bf16", compiled_rewrite(128, 1, torch.bfloat16).asm["ptx"])


SHAPES = {"E=128": MODELS[-1], "E=256 G=8": CORRECTED[0], "E=384": CORRECTED[1], "E=512": OTHER_ROUTERS[1]}
REGISTERS = {"E=128": 48, "E=256 G=8": 80, "E=384": 128, "E=512": 128}


@pytest.mark.parametrize("shape", ["E=256 G=8", *nightly("E=128", "E=384", "E=512")])
@pytest.mark.parametrize("dtype", [torch.float32, *nightly(torch.bfloat16, torch.float16)], ids=NAMES.get)
@pytest.mark.parametrize("tokens", [1, SMALL_STEP + 1])
def test_a_correction_stays_in_the_registers_of_a_warp(
    shape: str, dtype: torch.dtype, tokens: int, tmp_path: Path
) -> None:
    """But for K ids and weights a token, and for one flag."""
    model = SHAPES[shape]
    kernel = compiled_reselect(model, dtype, tokens=tokens)
    used = resources(kernel, tmp_path)
    # In rows of 512, two registers may go to the stack.
    assert used["STACK"] <= (8 if model.experts > 256 else 0)
    assert used["SHARED"] <= 512 and used["REG"] <= REGISTERS[shape]
    # Of integers a warp's maximum is one instruction, and a round has two.
    assert kernel.asm["ptx"].count("redux.sync.max.s32") in (2, 2 * model.top_k)


@pytest.mark.nightly
@pytest.mark.parametrize("capability", [80, 86, 89, 100, 120])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_gpus_take_the_correction(shape: str, capability: int, tmp_path: Path) -> None:
    for tokens in (1, SMALL_STEP + 1):
        used = resources(compiled_reselect(SHAPES[shape], torch.bfloat16, capability, torch.int64, tokens), tmp_path)
        assert used["STACK"] == 0 and used["SHARED"] <= 1024


@pytest.mark.parametrize("ids", ["*i32", "*i64"])
def test_counting_is_one_atomic_addition_without_a_reply(ids: str, tmp_path: Path) -> None:
    types = {"topk_ids": ids, "counters": "*i64", "token_groups": "*i32", "num_tokens": "i32", "row": "i32"}
    strides = {"TOKEN_STRIDE": 8, "CHOICE_STRIDE": 1, "LAYER_STRIDE": 8 * 128, "GROUP_STRIDE": 128}
    values = {**strides, "TOKEN_GROUP_STRIDE": 2, "NUM_EXPERTS": 128, "TOP_K": 8, "BLOCK": 128}
    kernel = compiled(count_kernel, types, values, 4, 90)
    assert len(re.findall(r"(atom|red)\.\S*global\S*add", kernel.asm["ptx"])) == 1
    assert resources(kernel, tmp_path)["STACK"] == 0
