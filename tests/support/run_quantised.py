"""Quantised checkpoints in the real engine: what is made, what is asked of an engine, and a process with stand-ins."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import amx_stand_ins, corrected, engines, quantise, tiny
from tests.support.engines import model_of
from tests.support.oracle import Rules
from tests.support.quantise import Scheme
from tests.support.random_steering import as_text, prompt, random_rules
from vllm_steermoe_plugin.models.checkpoints import shape_in

WIDTH = 128
"""The least that every format takes."""
LENGTH, REQUESTS = 12, 6
SETTINGS = {"count_groups": LENGTH * REQUESTS}
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "enable_prefix_caching": False}


@dataclass(frozen=True)
class Quantised:
    """A checkpoint.

    Attributes:
        architecture: of `tiny.CONFIGS`, or of `corrected.MODELS`.
        scheme: how it is quantised.
        experts: how the name of vLLM's class for its experts ends.
        gate: vLLM's method for its gates.
        stand_ins: whether its experts need them.
        options: further ones of the engine.
    """

    architecture: str
    scheme: Scheme
    experts: str
    gate: str = "UnquantizedLinearMethod"
    stand_ins: bool = True
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def corrects(self) -> bool:
        """Whether its selection is corrected, and not its logits rewritten."""
        return self.architecture in corrected.MODELS

    def write(self, folder: Path) -> tuple[Path, Path, Path]:
        """Make it in `folder` (once); the folders of its source, of itself, and of the values that are stored in it."""
        source, stored, values = (folder / name for name in ("source", "quantised", "dequantised"))
        if not folder.exists():
            if self.corrects:
                corrected.make_checkpoint(self.architecture, source, width=WIDTH)
            else:
                tiny.make_checkpoint(self.architecture, source, width=WIDTH)
            quantise.quantise(source, stored, self.scheme)
            quantise.dequantised(source, values, self.scheme)
        return source, stored, values


CASES = {
    "int8 beside experts, gate": Quantised(
        "Qwen3MoeForCausalLM",
        quantise.int8_beside_experts(gate=True),
        "CPUUnquantizedExperts",
        gate="CompressedTensorsLinearMethod",
        stand_ins=False,
    ),
    "int8 beside experts, corrected": Quantised(
        "Glm4MoeForCausalLM", quantise.int8_beside_experts(), "CPUUnquantizedExperts", stand_ins=False
    ),
    "int8 beside experts, gate, corrected": Quantised(
        "Lfm2MoeForCausalLM",
        quantise.int8_beside_experts(gate=True),
        "CPUUnquantizedExperts",
        gate="CompressedTensorsLinearMethod",
        stand_ins=False,
        # vLLM's kernel for CPUs rotates wrongly where the heads are a dimension of their own.
        options=(("compilation_config", {"custom_ops": ["-rotary_embedding"]}),),
    ),
    "packed": Quantised("Qwen3MoeForCausalLM", quantise.packed(), "CPUExpertsInt4"),
    "gptq": Quantised("MixtralForCausalLM", quantise.gptq(), "CPUExpertsInt4"),
    "awq": Quantised("OlmoeForCausalLM", quantise.awq(), "CPUExpertsInt4"),
    "int8": Quantised("OlmoeForCausalLM", quantise.int8(), "CPUExpertsInt8"),
    "fp8": Quantised("MixtralForCausalLM", quantise.fp8(), "CPUExpertsFp8"),
    "fp8, corrected": Quantised("Glm4MoeForCausalLM", quantise.fp8(), "CPUExpertsFp8"),
    "mxfp4": Quantised("GptOssForCausalLM", quantise.mxfp4(), "CPUExpertsMxfp4"),
}


def requests(folder: Path) -> list[tuple[list[int], Rules]]:
    """Prompts and their rules, of which every third has none."""
    shape = shape_in(folder)
    return [(prompt(i, LENGTH), random_rules(shape, i) if i % 3 else {}) for i in range(REQUESTS)]


def look_at(engine: Any, folder: Path) -> dict[str, Any]:
    """What an engine built, and what it answers, unsteered, unbound and steered."""
    from tests.support.greedy import generate, prompt_logprobs, scoring
    from vllm_steermoe_plugin.detection.engine_client import take_counts
    from vllm_steermoe_plugin.steering.counted_spans import CountedSpans

    model = model_of(engine)
    asked = requests(folder)
    prompts = [ids for ids, _ in asked]

    def scores(params: list[Any]) -> np.ndarray:
        return np.stack([prompt_logprobs(output) for output in generate(engine, prompts, params)])

    plain = scores([scoring()] * REQUESTS)
    with unbound(model):
        stock = scores([scoring()] * REQUESTS)
    engine.collective_rpc("steermoe_reset_counts")
    counts = [CountedSpans(1 + i * LENGTH, ((0, LENGTH),), each=True).to_json() for i in range(REQUESTS)]
    steered = scores(
        [scoring(as_text(rules) if rules else None, count) for (_, rules), count in zip(asked, counts, strict=True)]
    )
    selections, tokens = take_counts(engine, model.steering_state.layers)
    assert tokens.tolist() == [1] * (LENGTH * REQUESTS)
    return {
        **built(model),
        "as_stock": bool(np.array_equal(plain, stock)),
        "logprobs": steered.tolist(),
        "selections": selections.reshape(REQUESTS, LENGTH, *selections.shape[1:]).tolist(),
    }


def built(model: Any) -> dict[str, Any]:
    """Which classes vLLM chose for experts and gates, and where layers are steered."""
    from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    gates = [module for module in model.modules() if isinstance(module, GateLinear)]
    return {
        "experts": sorted({runner.routed_experts.quant_method.experts_cls.__name__ for runner in runners}),
        "monolithic": any(runner.is_monolithic for runner in runners),
        "gates": sorted({type(gate.quant_method).__name__ for gate in gates}),
        "corrects": model.steering_state.corrects,
    }


@contextmanager
def unbound(model: Any) -> Iterator[None]:
    """vLLM's own gates and selections, without the plugin's."""
    from vllm_steermoe_plugin.worker.gate import SteeredGateLinear
    from vllm_steermoe_plugin.worker.selection import SteeredSelection

    gates = [module for module in model.modules() if isinstance(module, SteeredGateLinear) and module.steering]
    routers = [module.router for module in model.modules() if hasattr(module, "router")]
    selections = [
        (router, router._compute_routing)
        for router in routers
        if isinstance(getattr(router, "_compute_routing", None), SteeredSelection)
    ]
    assert gates or selections
    for gate in gates:
        gate.steering = None
    for router, selection in selections:
        router._compute_routing = selection._compute
    try:
        yield
    finally:
        for gate in gates:
            gate.steering = model.steering_state
        for router, selection in selections:
            router._compute_routing = selection


def main(folder: str, *names: str) -> None:
    """Print, after RESULT, whether stand-ins are in place, and what was seen of these cases."""
    seen: dict[str, Any] = {"stand_ins": amx_stand_ins.install()}
    kept = []
    for name in names:
        _, stored, _ = CASES[name].write(Path(folder) / name)
        try:
            kept.append(engine := engines.start(str(stored), SETTINGS, **OPTIONS))
            seen[name] = look_at(engine, stored)
        except Exception:  # noqa: BLE001  (reported; the other cases are still run)
            seen[name] = {"error": traceback.format_exc()[-1500:]}
    sys.stdout.write("RESULT" + json.dumps(seen) + "\n")
    sys.stdout.flush()
    # Taking down so many engines takes longer than running them.
    os._exit(0)
