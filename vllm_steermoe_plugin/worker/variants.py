"""The steering-aware variants: vLLM's own classes with one mixin, made on first use.

`vllm_steermoe_plugin.worker.variants:SteerableOlmoeForCausalLM_vllm_0_32_0` and its like are the
names under which vLLM asks for them. No model code is copied.
"""

from __future__ import annotations

import importlib
from typing import Any

from expert_registry.errors import CompatibilityError
from vllm_steermoe_plugin.compat.symbols.registry import BUILT_IN_MODELS, MODELS_PACKAGE, PACKAGE
from vllm_steermoe_plugin.compat.variant_names import architecture_of
from vllm_steermoe_plugin.compat.versions import vllm_version
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.models.architectures import ARCHITECTURES
from vllm_steermoe_plugin.settings import read_settings
from vllm_steermoe_plugin.worker.binding import bind_model
from vllm_steermoe_plugin.worker.external_routing import external_routing
from vllm_steermoe_plugin.worker.gate import use_steered_gates
from vllm_steermoe_plugin.worker.runners.v2 import steered_model_state

use_steered_gates()


class SteerableMixin:
    """Put before a vLLM model class: binds the model's gates to a steering state once it is built."""

    steering_state: SteeringState | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        settings = read_settings(vllm_config.additional_config)
        with external_routing(settings.enabled and settings.external_routing):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        # The language model inside another model, or the draft of one, is not bound by itself: the outermost, which
        # vLLM's runner holds, is bound once, as a whole.
        config = vllm_config.model_config
        if not config.is_submodel_config and config.runner_type != "draft":
            self.steering_state = bind_model(self, vllm_config)
        self._vllm_config = vllm_config

    def get_model_state_cls(self) -> type:
        """For Model Runner V2: the ModelState that vLLM would choose, made to report to the steering state."""
        choose = getattr(super(), "get_model_state_cls", None)
        return steered_model_state(self, self._vllm_config, choose() if choose else None, self.steering_state)


def __getattr__(name: str) -> type:
    architecture = architecture_of(name)
    if architecture is None or architecture not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    upstream = upstream_class(architecture)
    # Under vLLM's own name: vLLM asks for the names of some models' classes.
    variant = type(upstream.__name__, (SteerableMixin, upstream), {"__module__": __name__})
    globals()[name] = variant
    return variant


def upstream_class(architecture: str) -> type:
    """vLLM's own class for an architecture of its registry.

    Raises:
        EngineError: this vLLM does not know the architecture.
    """
    known = BUILT_IN_MODELS.load()
    if architecture not in known:
        raise CompatibilityError(f"vLLM {vllm_version()} has no model class for {architecture}")
    module, name = known[architecture]
    # vLLM's newer models are packages of their own, named in full.
    place = module if module.startswith(PACKAGE) else f"{MODELS_PACKAGE}.{module}"
    found: type = getattr(importlib.import_module(place), name)
    return found
