"""Runs dummy models of many architectures in the real engine, one after another, in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import traceback
from inspect import getattr_static
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support import engines
from tests.support.dummies import DUMMIES, write_config
from tests.support.engines import draft_of, model_of
from tests.support.tiny import VOCABULARY
from vllm_steermoe_plugin.models.architectures import BACKEND

PROMPT_TOKENS = 24
CANNOT_GENERATE = {"JambaForCausalLM": "the CPU build has no kernel for Mamba-1"}
"""Built and bound here, but not run."""
OTHERS = (
    "Cohere2MoeForCausalLM",
    "DbrxForCausalLM",
    "DeepseekForCausalLM",
    "DeepseekV2ForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "Qwen3VLMoeForConditionalGeneration",
)
"""Of which it is seen what happens where they cannot be steered, or only in part."""
NOT_IMPORTED = "its file cannot be imported here"
CANNOT_START = {
    "BailingMoeV2_5ForCausalLM": "a block size that its latent attention does not take on a CPU",
    "BailingMoeV3ForCausalLM": "its linear attention is for GPUs",
    "DeepseekV32ForCausalLM": "sparse attention is for GPUs",
    "Ernie4_5_MoeForCausalLM": "vLLM's router on a CPU leaves its bias out, which is refused",
    "InternS1ProForConditionalGeneration": "vLLM 0.32 reads an attribute of it that it does not set",
    "KimiK25ForConditionalGeneration": "its vision tower cannot be built without weights",
    "Step3p5ForCausalLM": "vLLM's router on a CPU knows no sigmoid without groups, which is refused",
}
"""Not started here."""


def main(folder: str, *architectures: str) -> None:
    """Print, after RESULT, what was seen of these architectures; without any, of `OTHERS` and of all classes."""
    use_larger_weights()
    register_without_inspection(*(name.partition("/")[0] for name in architectures or OTHERS), BACKEND)
    kept: list[Any] = []
    seen: dict[str, Any] = {}
    for architecture in architectures:
        try:
            seen[architecture] = look_at(architecture, Path(folder), kept)
        except Exception:  # noqa: BLE001  (reported; the other architectures are still run)
            seen[architecture] = {"error": traceback.format_exc()[-1500:]}
    if not architectures:
        seen |= look_at_others(Path(folder), kept)
    sys.stdout.write("RESULT" + json.dumps(seen) + "\n")
    sys.stdout.flush()
    # Taking down a dozen engines takes longer than running them.
    os._exit(0)


def look_at_others(folder: Path, kept: list[Any]) -> dict[str, Any]:
    """What cannot be steered, or only in part."""
    seen: dict[str, Any] = {}
    # The first has experts: for a dense model vLLM makes no group for expert parallelism, which the others need.
    seen["encoders"] = encoders_alone(folder, kept)
    seen["served"] = served_without_steering(folder, kept)
    # Nearly last: vLLM's speculation on CPU replaces kernels for the whole process.
    seen["draft"] = drafted_by_itself(folder, kept)
    seen["refused"] = admitted_by_mistake(folder, kept)
    # Last: Kimi K2.5 imports numba, upon which vLLM's search for kernels fails where there is no Triton.
    seen["classes"] = compare_classes()
    return seen


def use_larger_weights() -> None:
    """vLLM's dummy weights are so small that every expert computes nothing, and routers follow their bias alone."""
    from vllm.model_executor.model_loader import dummy_loader

    draw = dummy_loader.initialize_single_dummy_weight

    def larger(tensor: Any, **_: Any) -> None:
        most = 2.0 if tensor.shape == (8, 64) else 0.2
        draw(tensor, low=-most, high=most)

    dummy_loader.initialize_single_dummy_weight = larger


def register_without_inspection(*names: str) -> None:
    """Register the variants as classes: of a lazy name vLLM first learns in a process of its own, for ten seconds."""
    from vllm.plugins import load_general_plugins

    from vllm_steermoe_plugin.compat.symbols.registry import MODEL_REGISTRY
    from vllm_steermoe_plugin.compat.variant_names import variant_name
    from vllm_steermoe_plugin.models.architectures import ARCHITECTURES
    from vllm_steermoe_plugin.worker import variants

    # Once per process; an engine would do it, and with it register the lazy names again.
    load_general_plugins()
    registry = MODEL_REGISTRY.load()
    for name in {*names, "Qwen3MoeForCausalLM"} & ARCHITECTURES.keys():
        registry.register_model(name, getattr(variants, variant_name(name)))


def compare_classes() -> dict[str, list[str]]:
    """For each architecture, in what vLLM would treat the variant otherwise than its own class; nothing, we hope."""
    from vllm.model_executor.models.registry import _ModelInfo

    from vllm_steermoe_plugin.compat.symbols.registry import BUILT_IN_MODELS
    from vllm_steermoe_plugin.compat.variant_names import variant_name
    from vllm_steermoe_plugin.models.architectures import ARCHITECTURES
    from vllm_steermoe_plugin.worker import variants

    seen = {}
    for name in ARCHITECTURES.keys() & BUILT_IN_MODELS.load().keys():
        try:
            upstream = variants.upstream_class(name)
        except ImportError:
            seen[name] = [NOT_IMPORTED]
            continue
        variant = getattr(variants, variant_name(name))
        info, expected = _ModelInfo.from_model_cls(variant), _ModelInfo.from_model_cls(upstream)
        wrong = [field for field in expected.__dataclass_fields__ if getattr(info, field) != getattr(expected, field)]
        # The processor of images, packed weights, and all else that vLLM looks up on the class.
        wrong += [
            attribute
            for attribute in dir(upstream)
            if not attribute.startswith("__")
            and attribute not in ("_abc_impl", "get_model_state_cls", "steering_state")
            and getattr_static(variant, attribute) is not getattr_static(upstream, attribute)
        ]
        wrong += [] if issubclass(variant, upstream) and variant.__name__ == upstream.__name__ else ["class"]
        # The guard in `worker/runners/guard.py` stands at `forward`.
        wrong += [] if variant.__call__ is torch.nn.Module.__call__ else ["__call__"]
        seen[name] = wrong
    return seen


def start(
    folder: Path, architecture: str, kept: list[Any], options: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """An engine on a dummy model; `changes` are to its config."""
    engine = engines.start(
        str(write_config(architecture, folder, **changes)),
        {"count_groups": 2},
        load_format="dummy",
        dtype="bfloat16",  # vLLM's linear attention on CPU knows no other.
        enable_prefix_caching=False,
        max_model_len=64,
        max_num_seqs=4,
        limit_mm_per_prompt={"image": 0, "video": 0} if "vision_config" in DUMMIES[architecture] else {},
        **(options or {}),
    )
    kept.append(engine)
    return engine


def look_at(architecture: str, folder: Path, kept: list[Any]) -> dict[str, Any]:
    """Build one model, steer it and count."""
    from vllm_steermoe_plugin.compat.symbols.worker import MOE_RUNNER
    from vllm_steermoe_plugin.detection.engine_client import take_counts
    from vllm_steermoe_plugin.worker.gate import SteeredGateLinear
    from vllm_steermoe_plugin.worker.selection import SteeredSelection
    from vllm_steermoe_plugin.worker.variants import SteerableMixin

    engine = start(folder / architecture, architecture, kept)
    model = model_of(engine)
    state = model.steering_state
    gates = [module for module in model.modules() if isinstance(module, SteeredGateLinear)]
    gates = [gate for gate in gates if gate.steering is not None]
    routers = [module.router for module in model.modules() if isinstance(module, MOE_RUNNER.load())]
    selections = {router: router._compute_routing for router in routers}
    corrected = [found for found in selections.values() if isinstance(found, SteeredSelection)]
    variants = [module for module in model.modules() if isinstance(module, SteerableMixin)]
    seen: dict[str, Any] = {
        "class": [type(model).__module__, type(model).__name__],
        "layers": list(state.layers),
        "experts": state.shape.num_experts,
        "top_k": state.shape.top_k,
        "states": len({id(gate.steering) for gate in gates} | {id(found._state) for found in corrected}),
        "rows": sorted([gate.steering_row for gate in gates] + [found.row for found in corrected]),
        "variants": len(variants),
        "bound": sum(variant.steering_state is not None for variant in variants),
    }
    if architecture in CANNOT_GENERATE:
        return seen
    engine.collective_rpc("steermoe_reset_counts")
    plain, beside = scores(engine, [None, None], count=True)
    chosen, _ = take_counts(engine, state.layers)
    # What all tokens select, or none, would show nothing.
    activated, deactivated = chosen[0].argmin(axis=1), chosen[0].argmax(axis=1)
    steering = json.dumps(
        {
            "activate": {str(layer): [int(expert)] for layer, expert in zip(state.layers, activated, strict=True)},
            "deactivate": {str(layer): [int(expert)] for layer, expert in zip(state.layers, deactivated, strict=True)},
        }
    )
    untouched, steered = scores(engine, [None, steering], count=True)
    counted, tokens = take_counts(engine, state.layers)
    for gate in gates:
        gate.steering = None
    for router, found in selections.items():
        router._compute_routing = found._compute if isinstance(found, SteeredSelection) else found
    unbound, _ = scores(engine, [None, None])
    rows = range(len(state.layers))
    return seen | {
        "tokens": tokens.tolist(),
        "selections": counted.sum(axis=2).tolist(),
        "activated": [counts[rows, activated].tolist() for counts in counted],
        "deactivated": [counts[rows, deactivated].tolist() for counts in counted],
        "as_unbound": bool(np.array_equal(plain, unbound)),
        "as_beside": bool(np.array_equal(plain, untouched)),
        "moved": float(np.abs(beside - steered).max()),
    }


def served_without_steering(folder: Path, kept: list[Any]) -> dict[str, Any]:
    """A config that cannot be steered: the engine starts, nothing is bound, and only steering is refused."""
    from vllm.exceptions import VLLMValidationError

    engine = start(folder / "dense", "DeepseekForCausalLM", kept, n_routed_experts=None)
    state = model_of(engine).steering_state
    seen: dict[str, Any] = {"bound": state is not None, "scored": len(scores(engine, [None])[0])}
    try:
        scores(engine, ['{"activate": {"1": [0]}}'])
    except VLLMValidationError as error:
        seen["refusal"] = str(error)
    return seen


def encoders_alone(folder: Path, kept: list[Any]) -> dict[str, Any]:
    """An engine without a language model: nothing is bound, and steering is refused."""
    from vllm.exceptions import VLLMValidationError

    engine = start(folder / "eyes", "Qwen3VLMoeForConditionalGeneration", kept, {"mm_encoder_only": True})
    seen: dict[str, Any] = {"bound": model_of(engine).steering_state is not None}
    try:
        scores(engine, ['{"activate": {"1": [0]}}'])
    except VLLMValidationError as error:
        seen["refusal"] = str(error)
    return seen


def drafted_by_itself(folder: Path, kept: list[Any]) -> dict[str, Any]:
    """A model with another of its architecture as its draft: only the one that vLLM's runner holds is bound."""
    architecture = "DbrxForCausalLM"
    place = folder / architecture
    speculation = {"model": str(place), "method": "draft_model", "num_speculative_tokens": 2}
    engine = start(place, architecture, kept, {"speculative_config": speculation})
    draft = draft_of(engine)
    plain, steered = scores(engine, [None, '{"activate": {"0": [5]}}'])
    return {
        "main": model_of(engine).steering_state is not None,
        "draft": draft.steering_state is not None,
        "class": type(draft).__module__,
        "moved": float(np.abs(plain - steered).max()),
    }


def admitted_by_mistake(folder: Path, kept: list[Any]) -> dict[str, str]:
    """The tables made to admit what is not as they say: what the engine says at start."""
    from vllm_steermoe_plugin.models import config_families
    from vllm_steermoe_plugin.worker import router_kind

    router_kind.OWN_SELECTIONS.pop("token_choice_with_bias")
    families = config_families.FAMILIES
    families["deepseek"] = config_families.Family(("n_routed_experts",))
    said = {}
    for name, architecture, changes in (
        ("custom", "Cohere2MoeForCausalLM", {"expert_selection_fn": "sigmoid"}),
        ("layers", "DeepseekV2ForCausalLM", {}),
        # vLLM's router on a CPU leaves this bias out.
        ("bias", "Ernie4_5_MoeForCausalLM", {}),
    ):
        try:
            start(folder / f"wrong-{name}", architecture, kept, **changes)
            said[name] = "started"
        except Exception as error:  # noqa: BLE001  (its text is what is tested)
            said[name] = str(error)
    return said


def scores(engine: Any, steering: list[str | None], count: bool = False) -> list[np.ndarray]:
    """Log-probabilities of the tokens of one prompt per request, `[T - 1]` each."""
    from tests.support.greedy import generate, prompt_logprobs, scoring
    from vllm_steermoe_plugin.steering.counted_spans import CountedSpans

    ids = [4 + (7 * i) % (VOCABULARY - 4) for i in range(PROMPT_TOKENS)]
    params = [
        scoring(steer, CountedSpans(group, ((0, len(ids)),)).to_json() if count else None)
        for group, steer in enumerate(steering, start=1)
    ]
    return [prompt_logprobs(output) for output in generate(engine, [ids] * len(params), params)]
