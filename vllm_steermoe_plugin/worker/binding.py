"""Bind a freshly built model to a steering state: each MoE layer at its gate or at its selection."""

from __future__ import annotations

from typing import Any

import torch

from expert_registry.errors import EngineError, SteerMoEError
from vllm_steermoe_plugin.compat.symbols.config import CONFIGS
from vllm_steermoe_plugin.compat.symbols.worker import ELEMENTS_TO_LOAD
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.models.architectures import TRANSFORMERS, language_model_of
from vllm_steermoe_plugin.models.engine_limits import refuse_unsupported
from vllm_steermoe_plugin.models.steerability import served_shape
from vllm_steermoe_plugin.settings import read_settings
from vllm_steermoe_plugin.worker.layers import MoELayer, moe_layers
from vllm_steermoe_plugin.worker.loaded import check_loaded
from vllm_steermoe_plugin.worker.lora_gate import install_lora_hook
from vllm_steermoe_plugin.worker.runners.guard import guard_model, leave_unbound
from vllm_steermoe_plugin.worker.runners.v1 import install_v1_hooks
from vllm_steermoe_plugin.worker.selection import SteeredSelection
from vllm_steermoe_plugin.worker.self_check import check_gate

_TOKEN_MULTIPLE = 256
"""vLLM may pad the largest step to a multiple of the tensor-parallel size."""


def bind_model(model: Any, vllm_config: Any) -> SteeringState | None:
    """Give every MoE layer of `model` its row in a new steering state.

    Returns:
        The state; None if the operator has switched steering off, if its config does not say that the model can be
        steered, or if vLLM's Transformers backend leaves the routing to transformers. It is then vLLM's own, and
        requests for steering are refused in the front end.

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
    served = vllm_config.model_config
    language = language_model_of(served.hf_config, served.architecture)
    refuse_unsupported(vllm_config, settings)
    first, end = served.get_layers_start_end_indices(vllm_config.parallel_config)
    try:
        layers = moe_layers(model, shape, {layer for layer in shape.layers if first <= layer < end}, language)
    except EngineError as error:
        if language.family != TRANSFORMERS:
            raise
        # What that backend makes of a model is known only now. It is served as it is.
        leave_unbound(model, str(error))
        return None
    scheduler = vllm_config.scheduler_config
    capture = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    most = -(-max(scheduler.max_num_batched_tokens, capture) // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE
    state = SteeringState(
        shape,
        [layer.index for layer in layers],
        max_requests=scheduler.max_num_seqs,
        # The ranks of a sequence-parallel layer share what the tensor-parallel size divides.
        max_tokens=most + vllm_config.parallel_config.tensor_parallel_size,
        count_groups=settings.count_groups,
        # Models are built under vLLM's device context, so this is the model's device.
        device=torch.empty(0).device,
        routers=sorted({str(layer) for layer in layers}),
        corrects=any(layer.gate is None for layer in layers),
    )
    for name, buffer in state.device_buffers().items():
        # vLLM counts what a reload must bring, and would miss these.
        setattr(buffer, ELEMENTS_TO_LOAD, 0)
        model.register_buffer(f"steermoe_{name}", buffer, persistent=False)
    for row, layer in enumerate(layers):
        _bind(layer, state, row)
    _mark_config(vllm_config)
    if vllm_config.lora_config is not None:
        install_lora_hook()
    if not vllm_config.use_v2_model_runner:
        install_v1_hooks()
    guard_model(model, lambda: check_loaded(model, state, layers))
    return state


def _bind(layer: MoELayer, state: SteeringState, row: int) -> None:
    rank = layer.sequence_rank
    if layer.gate is None:
        SteeredSelection(layer.router, layer.kind, state, row, rank)
    else:
        layer.gate.bind_steering(state, row, log_softmax=layer.kind.log_softmax, sequence_rank=rank)
        check_gate(layer.gate, state, layer.index)


def _mark_config(vllm_config: Any) -> None:
    """Make the engine's config hash differ from stock vLLM's.

    It is part of the compile cache's key; a graph compiled without the rewrite must not be served with it.
    """
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config["steermoe_bound"] = True
