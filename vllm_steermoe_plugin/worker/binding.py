"""Bind a freshly built model to a steering state: find its gates, count them, refuse what would run unsteered."""

from __future__ import annotations

import re
from typing import Any

import torch

from expert_registry.errors import (
    CompatibilityError,
    SteerMoEError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.compat.symbols.config import CONFIGS
from vllm_steermoe_plugin.compat.symbols.worker import ELEMENTS_TO_LOAD, MOE_RUNNER
from vllm_steermoe_plugin.device.steering_state import BatchRow, SteeringState
from vllm_steermoe_plugin.models.architectures import Architecture, language_model_of
from vllm_steermoe_plugin.models.engine_limits import refuse_unsupported
from vllm_steermoe_plugin.models.steerability import served_shape
from vllm_steermoe_plugin.settings import SWITCH_OFF, read_settings
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.wire import STEER_KEY
from vllm_steermoe_plugin.worker.gate import SteeredGateLinear
from vllm_steermoe_plugin.worker.lora_gate import install_lora_hook
from vllm_steermoe_plugin.worker.router_check import router_obstacle
from vllm_steermoe_plugin.worker.runners.guard import guard_model, leave_unbound
from vllm_steermoe_plugin.worker.runners.v1 import install_v1_hooks

_LAYER_INDEX = re.compile(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.")
_PROBE = "steermoe-self-check"
_TOKEN_MULTIPLE = 256
"""vLLM may pad the largest step to a multiple of the tensor-parallel size."""


def bind_model(model: Any, vllm_config: Any) -> SteeringState | None:
    """Give every gate of `model` its row in a new steering state.

    Returns:
        The state; None if the operator has switched steering off, or if its config does not say that the model can
        be steered. It is then vLLM's own, and requests for steering are refused in the front end.

    Raises:
        EngineError: a part of the model or of the engine's configuration would run unsteered.
    """
    for internal in CONFIGS:
        internal.load()
    settings = read_settings(vllm_config.additional_config)
    if not settings.enabled:
        leave_unbound(model)
        return None
    try:
        shape = served_shape(vllm_config)
    except SteerMoEError:
        # The front end asks the same and refuses steering with the reason. Were it answered otherwise, the handshake
        # would find this worker absent.
        leave_unbound(model)
        return None
    language = language_model_of(vllm_config.model_config.hf_config, shape.architecture)
    refuse_unsupported(language, vllm_config, settings)
    _refuse_fused_gates(model)
    gates = _gates(model, shape)
    _refuse_later_rounding(gates, language, vllm_config.model_config.dtype)
    _check_layers(gates, shape, vllm_config)
    _check_routers(model, set(gates), shape, language.selection)
    scheduler = vllm_config.scheduler_config
    capture = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    layers = sorted(gates)
    state = SteeringState(
        shape,
        layers,
        max_requests=scheduler.max_num_seqs,
        max_tokens=-(-max(scheduler.max_num_batched_tokens, capture) // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE,
        count_groups=settings.count_groups,
        # Models are built under vLLM's device context, so this is the model's device.
        device=torch.empty(0).device,
        log_softmax=language.log_softmax,
    )
    for name, buffer in state.device_buffers().items():
        # vLLM counts what a reload must bring, and would miss these.
        setattr(buffer, ELEMENTS_TO_LOAD, 0)
        model.register_buffer(f"steermoe_{name}", buffer, persistent=False)
    for row, layer in enumerate(layers):
        gates[layer].bind_steering(state, row)
    for layer in layers:
        self_check(gates[layer], state, layer)
    _mark_config(vllm_config)
    if vllm_config.lora_config is not None:
        install_lora_hook()
    if not vllm_config.use_v2_model_runner:
        install_v1_hooks()
    guard_model(model)
    return state


def self_check(gate: SteeredGateLinear, state: SteeringState, layer: int) -> None:
    """Send synthetic router logits through a bound gate: untouched, activated, deactivated.

    Raises:
        EngineError: the gate does not do what a profile asks for.
    """
    experts, top_k = state.shape.num_experts, state.shape.top_k
    # Four tokens whose favourites differ; the last expert is nobody's, the first is the favourite of token 0.
    logits = torch.stack([-0.5 * torch.arange(experts).float().roll(shift) for shift in range(min(4, experts))])
    logits = logits.to(state.rules.device)
    worst, best = experts - 1, 0
    activate = SteeringProfile(activate=frozenset({(layer, worst)}))
    checks = [("activate", activate, worst, True)]
    if experts > top_k:
        checks.append(("deactivate", SteeringProfile(deactivate=frozenset({(layer, best)})), best, False))
    for verb, profile, expert, selected in checks:
        state.admit(_PROBE, {STEER_KEY: profile.to_json()}, len(logits))
        state.begin_step([BatchRow(_PROBE, 0, len(logits))])
        chosen = gate.rewrite(logits.clone()).topk(top_k).indices
        state.forget(_PROBE)
        state.clear_step()
        if bool((chosen == expert).any(dim=1).all()) != selected or bool((chosen == expert).any()) != selected:
            raise CompatibilityError(
                f"self-check failed: layer {layer} does not {verb} expert {expert}; chosen: {chosen.tolist()}"
            )
    if not torch.equal(gate.rewrite(logits.clone()), logits):
        raise CompatibilityError(f"self-check failed: layer {layer} changes the logits of unsteered tokens")
    state.steered_requests = 0


def _gates(model: Any, shape: MoEShape) -> dict[int, SteeredGateLinear]:
    gates: dict[int, SteeredGateLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, SteeredGateLinear) and module.output_size == shape.num_experts:
            match = _LAYER_INDEX.search(module.prefix or name)
            if match is None:
                raise CompatibilityError(f"the gate {name!r} (prefix {module.prefix!r}) does not tell its layer")
            if int(match[1]) in gates:
                raise CompatibilityError(
                    f"layer {match[1]} has two gates, the second is {name!r}; one of them would run unsteered"
                )
            gates[int(match[1])] = module
    return gates


def _refuse_fused_gates(model: Any) -> None:
    runner = MOE_RUNNER.load()
    for name, module in model.named_modules():
        # No default: if the attribute is gone, we no longer know who computes the logits.
        if isinstance(module, runner) and module._fse_fuse_gate:
            raise UnsupportedModelError(
                f"{name} computes its router logits together with the shared expert's gate, from the weights of both; "
                "steering would not reach it"
            )


def _refuse_later_rounding(gates: dict[int, SteeredGateLinear], language: Architecture, dtype: torch.dtype) -> None:
    for layer, gate in gates.items():
        if language.rounds_logits and gate.out_dtype is torch.float32 is not dtype:
            raise UnsupportedFeatureError(
                f"the router of layer {layer} computes in float32, and {language.name} then rounds its logits to "
                f"{dtype}, where an activated expert may tie with another one. Run it with dtype='float32', or switch "
                f"steering off with {SWITCH_OFF}"
            )


def _check_layers(gates: dict[int, SteeredGateLinear], shape: MoEShape, vllm_config: Any) -> None:
    first, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    expected = {layer for layer in shape.layers if first <= layer < end}
    if set(gates) != expected:
        raise CompatibilityError(
            f"found gates in layers {sorted(gates)} but expected {sorted(expected)} for {shape}; "
            f"the others would run unsteered. To serve this model without steering: {SWITCH_OFF}"
        )


def _check_routers(model: Any, layers: set[int], shape: MoEShape, selection: str) -> None:
    """What selects behind each gate: one MoE layer of vLLM, over the same E and K, by softmax top-k."""
    runner = MOE_RUNNER.load()
    found: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, runner) or module.layer_id not in layers:
            continue
        sizes = module.moe_config.num_logical_experts, module.moe_config.experts_per_token
        obstacle = router_obstacle(module.router, selection)
        if sizes != (shape.num_experts, shape.top_k):
            obstacle = f"it selects {sizes[1]} of {sizes[0]} experts"
        elif module.layer_id in found:
            obstacle = "its layer has another one"
        if obstacle is not None:
            raise UnsupportedModelError(
                f"{name} cannot be steered, although {shape} was expected: {obstacle}. To serve this model without "
                f"steering: {SWITCH_OFF}"
            )
        found.add(module.layer_id)
    if found != layers:
        raise CompatibilityError(
            f"layers {sorted(layers - found)} of {shape} have a gate but none of vLLM's MoE layers. To serve this "
            f"model without steering: {SWITCH_OFF}"
        )


def _mark_config(vllm_config: Any) -> None:
    """Make the engine's config hash differ from stock vLLM's.

    It is part of the compile cache's key; a graph compiled without the rewrite must not be served with it.
    """
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config["steermoe_bound"] = True
