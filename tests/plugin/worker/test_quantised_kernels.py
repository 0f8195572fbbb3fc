"""Formats and kernels that no CPU runs: what the plugin would find there, by vLLM's own classes."""

from __future__ import annotations

import ast
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from expert_registry.errors import UnsupportedFeatureError
from expert_registry.shape import MoEShape
from tests.support.top_k_router import TopK
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.worker.gate import SteeredGateLinear
from vllm_steermoe_plugin.worker.layers import MoELayer, refuse_monolithic
from vllm_steermoe_plugin.worker.loaded import check_loaded

pytestmark = pytest.mark.engine

_LAYERS = "vllm.model_executor.layers"
_EXPERTS = f"{_LAYERS}.fused_moe.experts"
_METHODS = f"{_LAYERS}.quantization"
SHAPE = MoEShape("OlmoeForCausalLM", (4,), 6, 2)

KERNELS = {
    "unquantised on SM90": ("triton_moe:TritonExperts", False, True),
    "unquantised on SM100": ("trtllm_bf16_moe:TrtLlmBf16ExpertsMonolithic", True, True),
    "FP8 per tensor on SM90": ("flashinfer_cutlass_moe:FlashInferExperts", False, True),
    "FP8 on SM100": ("trtllm_fp8_moe:TrtLlmFp8ExpertsMonolithic", True, True),
    "FP8 on SM100, routed as it does not": ("trtllm_fp8_moe:TrtLlmFp8ExpertsModular", False, True),
    "FP8 by deep_gemm": ("triton_deep_gemm_moe:TritonOrDeepGemmExperts", False, True),
    "FP8 by channel": ("triton_cutlass_moe:TritonOrCutlassExperts", False, True),
    "int4 by marlin": ("marlin_moe:MarlinExperts", False, True),
    "int4 by 32 on SM100": ("trtllm_mxint4_moe:TrtLlmMxint4ExpertsMonolithic", True, True),
    "NVFP4 on SM100": ("trtllm_nvfp4_moe:TrtLlmNvFp4ExpertsMonolithic", True, True),
    "NVFP4 on SM100, routed as it does not": ("trtllm_nvfp4_moe:TrtLlmNvFp4ExpertsModular", False, True),
    "MXFP4 on SM90": ("gpt_oss_triton_kernels_moe:OAITritonMxfp4ExpertsMonolithic", True, False),
    "MXFP4 by triton_unfused": ("gpt_oss_triton_kernels_moe:UnfusedOAITritonExperts", False, True),
    "MXFP4 on SM100": ("trtllm_mxfp4_moe:TrtLlmMxfp4ExpertsMonolithic", True, True),
}
"""What vLLM chooses, whether it selects experts by itself, and whether it can be asked which."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "FP8 per tensor": (
        "fp8:Fp8Config",
        {"quant_method": "fp8", "activation_scheme": "static", "modules_to_not_convert": ["model.layers.4.mlp.gate"]},
    ),
    "FP8 of ModelOpt": (
        "modelopt:ModelOptFp8Config",
        {"quantization": {"quant_algo": "FP8", "exclude_modules": ["model.layers.*.mlp.gate"]}},
    ),
    "NVFP4": (
        "modelopt:ModelOptNvFp4Config",
        {
            "quantization": {
                "quant_algo": "NVFP4",
                "group_size": 16,
                "kv_cache_quant_algo": None,
                "exclude_modules": ["model.layers.*.mlp.gate"],
            }
        },
    ),
    "MXFP4": ("mxfp4:Mxfp4Config", {}),
}
"""Formats whose config.json leaves the gate out."""


class Method(FusedMoEMethodBase):
    """A method of vLLM for a layer's experts that has chosen a kernel; loaded, it also holds one."""

    def __init__(self, experts: Any, *, loaded: bool) -> None:
        self.experts_cls = experts
        held = SimpleNamespace(fused_experts=new(experts))
        self.moe_kernel = SimpleNamespace(is_monolithic=experts.is_monolithic(), impl=held) if loaded else None

    def create_weights(self, *_: Any, **__: Any) -> None: ...

    def get_fused_moe_quant_config(self, layer: Any) -> None: ...


class Layer(MoERunner):
    """As much of an MoE layer as is asked for what selects."""

    def __init__(self, method: Any) -> None:
        torch.nn.Module.__init__(self)
        self.layer_name = "model.layers.4.mlp.experts"
        self.routed_experts = SimpleNamespace(quant_method=method)
        self.router = TopK(2, 6)


def found(place: str, within: str = _EXPERTS) -> Any:
    """A class of vLLM."""
    module, name = place.split(":")
    loaded = pytest.importorskip(f"{within}.{module}", exc_type=ImportError)
    return getattr(loaded, name)


def new(kind: type) -> Any:
    """An instance that is not initialised, which takes a GPU."""
    made: Any = object.__new__(kind)
    sizes = {"ep_size": 1, "use_ep": False, "dp_size": 1, "max_num_tokens": 8, "experts_per_token": 2}
    made.moe_config = SimpleNamespace(**sizes, device="cpu")
    return made


def new_state(count_groups: int) -> SteeringState:
    cpu = torch.device("cpu")
    return SteeringState(SHAPE, (4,), max_requests=2, max_tokens=8, count_groups=count_groups, device=cpu)


def steered(runner: Layer, gate: Any) -> MoELayer:
    return MoELayer(4, "model.layers.4.mlp", runner, RouterKind("softmax"), gate)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_selects_by_itself_leaves_nothing_to_correct_and_rounds_a_gates_logits(kernel: str) -> None:
    place, selects, says = KERNELS[kernel]
    experts = found(place)
    assert experts.is_monolithic() == selects
    bare, counting = new_state(0), new_state(1)
    for loaded in (False, True):
        runner, gate = Layer(Method(experts, loaded=loaded)), SimpleNamespace(bfloat16=None)
        model = torch.nn.Sequential(runner)
        check_loaded(model, bare, [steered(runner, gate)])
        assert gate.bfloat16 == selects
        if not selects:
            refuse_monolithic(runner)
            continue
        with pytest.raises(UnsupportedFeatureError, match=f"its kernel {experts.__name__} selects experts by itself"):
            refuse_monolithic(runner)
        with pytest.raises(UnsupportedFeatureError, match="--moe-backend"):
            check_loaded(model, bare, [steered(runner, None)])
    with nullcontext() if says else pytest.raises(UnsupportedFeatureError, match="routing cannot be counted here"):
        check_loaded(model, counting, [steered(runner, gate)])


@pytest.mark.parametrize("form", CONFIGS)
def test_a_gate_that_the_checkpoint_leaves_out_is_not_quantised(form: str) -> None:
    place, config = CONFIGS[form]
    quantisation = found(place, _METHODS).from_config(config)
    method = quantisation.get_quant_method(object.__new__(SteeredGateLinear), "model.layers.4.mlp.gate")
    assert type(method) is UnquantizedLinearMethod


def test_three_models_leave_it_to_the_checkpoint_whether_their_gate_is_quantised() -> None:
    """The others never quantise it. One of these is run in engine/test_quantised.py."""
    folder = Path(str(vllm.__file__)).parent
    hand_over = set()
    for path in [*folder.glob("model_executor/models/*.py"), *folder.glob("models/**/*.py")]:
        source = path.read_text(encoding="utf-8")
        for block in ast.parse(source).body if "GateLinear(" in source else ():
            if isinstance(block, ast.ClassDef):
                hand_over |= {block.name for node in ast.walk(block) if _hands_over(node)}
    assert hand_over == {"K2HorizonSparseMoeBlock", "Lfm2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock"}


def _hands_over(node: ast.AST) -> bool:
    """Whether it builds a gate with the quantisation that the model has."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "GateLinear"):
        return False
    given = next((keyword.value for keyword in node.keywords if keyword.arg == "quant_config"), None)
    return given is not None and not (isinstance(given, ast.Constant) and given.value is None)
