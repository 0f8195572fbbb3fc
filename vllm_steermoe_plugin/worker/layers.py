"""Find what routes in a model that vLLM has built: its MoE layers, their gates, and at which seam each is steered."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from expert_registry.errors import CompatibilityError, UnsupportedFeatureError, UnsupportedModelError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.compat.symbols.config import CURRENT_PLATFORM
from vllm_steermoe_plugin.compat.symbols.worker import MOE_RUNNER, TP_RANK
from vllm_steermoe_plugin.device.router_kind import RouterKind
from vllm_steermoe_plugin.models.architectures import Architecture
from vllm_steermoe_plugin.settings import SWITCH_OFF
from vllm_steermoe_plugin.worker.gate import SteeredGateLinear
from vllm_steermoe_plugin.worker.router_kind import kind_of

_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class MoELayer:
    """A layer of vLLM that routes.

    Attributes:
        index: of the layer in the checkpoint.
        name: of its module in the model.
        runner: vLLM's.
        kind: what its router does.
        gate: the gate at which it is steered; None if its selection is corrected instead.
    """

    index: int
    name: str
    runner: Any
    kind: RouterKind
    gate: SteeredGateLinear | None

    @property
    def router(self) -> Any:
        """vLLM's."""
        return self.runner.router

    @property
    def sequence_rank(self) -> int:
        """Which share of a step's tokens this process routes here: 0, but for sequence-parallel layers."""
        return TP_RANK.load()() if self.runner.moe_config.is_sequence_parallel else 0

    @property
    def how(self) -> str:
        """How it is steered, in words."""
        if self.gate is not None:
            return "the logits are rewritten at the gate"
        return "the selection is corrected, where an activated expert weighs as the model's strongest choice"

    def __str__(self) -> str:
        """What its router does, and how it is steered."""
        return f"{self.kind}; {self.how}"


def moe_layers(model: Any, shape: MoEShape, expected: set[int], language: Architecture) -> list[MoELayer]:
    """The MoE layers of a model, ascending.

    Args:
        model: as vLLM has built it, its weights not yet loaded.
        shape: of the whole model.
        expected: checkpoint indices of those of its layers that should be here.
        language: the row of its language model.

    Raises:
        EngineError: a layer would run unsteered, or is not there; the message names it.
    """
    runner = MOE_RUNNER.load()
    gates = _gates(model, shape)
    found: dict[int, MoELayer] = {}
    for name, module in model.named_modules():
        if not isinstance(module, runner):
            continue
        sizes = module.moe_config.num_logical_experts, module.moe_config.experts_per_token
        try:
            kind = kind_of(module.router)
            if kind is None:
                continue
            if module.layer_id in expected and sizes != (shape.num_experts, shape.top_k):
                raise UnsupportedModelError(f"it selects {sizes[1]} of {sizes[0]} experts")
            if module.layer_id in found:
                raise UnsupportedModelError("its layer has another one")
            gate = _gate_to_steer(kind, module, gates.get(module.layer_id, []), language)
        except (UnsupportedModelError, UnsupportedFeatureError) as error:
            raise type(error)(
                f"{name} cannot be steered, although {shape} was expected: {error}. To serve this model without "
                f"steering: {SWITCH_OFF}"
            ) from None
        found[module.layer_id] = MoELayer(module.layer_id, name, module, kind, gate)
    if found.keys() != expected:
        raise CompatibilityError(
            f"found MoE layers {sorted(found)} but expected {sorted(expected)} for {shape}; the others would run "
            f"unsteered. To serve this model without steering: {SWITCH_OFF}"
        )
    return [found[layer] for layer in sorted(found)]


def _gates(model: Any, shape: MoEShape) -> dict[int, list[SteeredGateLinear]]:
    gates: dict[int, list[SteeredGateLinear]] = {}
    for name, module in model.named_modules():
        if isinstance(module, SteeredGateLinear) and module.output_size == shape.num_experts:
            match = _LAYER_INDEX.search(module.prefix or name)
            if match is not None:
                gates.setdefault(int(match[1]), []).append(module)
    return gates


def _gate_to_steer(
    kind: RouterKind, runner: Any, gates: list[SteeredGateLinear], language: Architecture
) -> SteeredGateLinear | None:
    """The gate, if a rewrite of its logits decides the selection; else None, if that can be corrected."""
    # No default: if the attribute is gone, we no longer know who computes the logits.
    if runner._fse_fuse_gate:
        raise UnsupportedModelError(
            "it computes its router logits together with the shared expert's gate, from the weights of both"
        )
    past_gate = language.changes_logits or (language.passes_gate_on_rocm and CURRENT_PLATFORM.load().is_rocm())
    if kind.orders_logits and not past_gate and len(gates) == 1:
        return gates[0]
    if kind.own:
        raise UnsupportedModelError(
            f"{kind.own} is steered at its gate alone, and {len(gates)} gates were found that it could be"
        )
    refuse_monolithic(runner)
    return None


def is_monolithic(runner: Any) -> bool:
    """Whether a layer's kernel selects experts by itself."""
    method = runner.routed_experts.quant_method
    if hasattr(method, "experts_cls") and method.experts_cls is None:
        # vLLM has no kernel for this quantisation here, and would ask the class that is not there; loading says so.
        return False
    return bool(runner.is_monolithic)


def refuse_monolithic(runner: Any) -> None:
    """Raise UnsupportedFeatureError if a layer's kernel selects experts by itself, where nothing can be corrected."""
    if is_monolithic(runner):
        method = runner.routed_experts.quant_method
        kernel = getattr(method, "experts_cls", None) or type(method)
        raise UnsupportedFeatureError(
            f"its kernel {kernel.__name__} selects experts by itself. Choose one that does not with --moe-backend "
            "(marlin, triton, flashinfer_cutlass or deep_gemm, as the checkpoint's quantisation allows), or let the "
            "setting external_routing choose"
        )
