"""Which kernels vLLM would choose here for a model's routers and experts: the model is built without its weights.

    python -m vllm_steermoe_plugin.worker.kernels CHECKPOINT

prints them as JSON. Versions and cards differ: a gate has up to seven ways to multiply, and a monolithic kernel selects
experts by itself. The model is built on torch's meta device in one rank, with steering switched off; that takes a
process of its own, since it starts vLLM's process groups.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from typing import Any

import torch

from expert_registry.errors import EngineError
from vllm_steermoe_plugin.compat.symbols.worker import (
    BUILD_MODEL,
    ENGINE_ARGS,
    GATE_FORWARD,
    GATE_LINEAR,
    INIT_DISTRIBUTED,
    INIT_PARALLEL,
    MOE_RUNNER,
    SET_CONFIG,
)
from vllm_steermoe_plugin.models.architectures import language_model_of, shape_of
from vllm_steermoe_plugin.settings import KEY
from vllm_steermoe_plugin.worker.layers import is_monolithic, moe_layers

_TIER = re.compile(r"self\.(allow_\w+)")


def kernels(checkpoint: str) -> dict[str, Any]:
    """How vLLM would run a model's MoE layers here, and how they would be steered.

    Returns:
        `rows`, one for each kind of MoE layer: its `layers`, what its `router` does and how it is `steered`, the ways
        of its `gate` in the order in which vLLM tries them, the `experts` kernel, and `selects_inside`, whether that
        one selects experts by itself. `obstacle`, why the model cannot be steered as it is built, or None.
    """
    config, model = built(checkpoint)
    served = config.model_config
    steered, obstacle = {}, None
    try:
        shape = shape_of(served.hf_config, served.architecture)
        language = language_model_of(served.hf_config, served.architecture)
        steered = {layer.name: layer for layer in moe_layers(model, shape, set(shape.layers), language)}
    except EngineError as error:
        obstacle = str(error)
    runner, gate = MOE_RUNNER.load(), GATE_LINEAR.load()
    gates = {name.rpartition(".")[0]: module for name, module in model.named_modules() if isinstance(module, gate)}
    rows: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, runner):
            continue
        method = module.routed_experts.quant_method
        experts = getattr(method, "experts_cls", None)
        row = {
            "gate": tiers(gates.get(name.rpartition(".")[0]) or gates.get(name)),
            "router": str(steered[name].kind) if name in steered else type(module.router).__name__,
            "steered": steered[name].how if name in steered else "not steered",
            "experts": type(method).__name__ if experts is None else experts.__name__,
            "selects_inside": is_monolithic(module),
        }
        rows.setdefault(json.dumps(row), row | {"layers": []})["layers"].append(module.layer_id)
    return {"rows": list(rows.values()), "obstacle": obstacle}


def tiers(gate: Any) -> list[str]:
    """The ways in which a GateLinear may multiply here, as its `forward` tries them; `linear` is the last resort."""
    if gate is None:
        return []
    tried = dict.fromkeys(_TIER.findall(inspect.getsource(GATE_FORWARD.load())))
    return [name.removeprefix("allow_") for name in tried if getattr(gate, name)] + ["linear"]


def built(checkpoint: str, **options: Any) -> tuple[Any, Any]:
    """vLLM's configuration and model of a checkpoint, on torch's meta device; `options` are of vLLM's EngineArgs."""
    switched_off = {KEY: {"enabled": False}}
    arguments = ENGINE_ARGS.load()(
        model=checkpoint, skip_tokenizer_init=True, additional_config=switched_off, **options
    )
    config = arguments.create_engine_config()
    with SET_CONFIG.load()(config), tempfile.NamedTemporaryFile() as meeting:
        INIT_DISTRIBUTED.load()(1, 0, f"file://{meeting.name}", 0, "gloo")
        INIT_PARALLEL.load()(1, 1)
        with torch.device("meta"):
            return config, BUILD_MODEL.load()(config)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(kernels(sys.argv[1])) + "\n")
