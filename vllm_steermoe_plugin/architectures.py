"""The MoE architectures that can be steered: one row each, and how to read a shape from a config.

A row names the module of vLLM's class. Nothing here imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expert_registry.errors import EngineError, one_of
from expert_registry.shape import MoEShape


@dataclass(frozen=True, slots=True)
class Architecture:
    """A softmax-routed MoE model of vLLM.

    Attributes:
        name: in a checkpoint's config, in vLLM's model registry, and of vLLM's class.
        module: where vLLM keeps the class.
    """

    name: str
    module: str


_EXPERTS_KEYS = ("num_experts", "num_local_experts")
"""Config keys of E; transformers has renamed it more than once, for the same model."""

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("GptOssForCausalLM", "vllm.model_executor.models.gpt_oss"),
        Architecture("GraniteMoeForCausalLM", "vllm.model_executor.models.granitemoe"),
        Architecture("GraniteMoeSharedForCausalLM", "vllm.model_executor.models.granitemoeshared"),
        Architecture("MixtralForCausalLM", "vllm.model_executor.models.mixtral"),
        Architecture("OlmoeForCausalLM", "vllm.model_executor.models.olmoe"),
        Architecture("PhiMoEForCausalLM", "vllm.model_executor.models.phimoe"),
        Architecture("Qwen2MoeForCausalLM", "vllm.model_executor.models.qwen2_moe"),
        Architecture("Qwen3MoeForCausalLM", "vllm.model_executor.models.qwen3_moe"),
    )
}


def shape_of(config: object) -> MoEShape:
    """Read the MoE shape from a model config (vLLM's `hf_config`, or any object with its attributes).

    Raises:
        EngineError: the architecture is not in the table, or the config lacks what it should have.
    """
    names: Sequence[str] = getattr(config, "architectures", None) or ()
    row = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    if row is None:
        raise EngineError(f"this model cannot be steered: {one_of(' '.join(names), ARCHITECTURES, 'architecture')}")
    num_layers = _integer(config, ("num_hidden_layers",), row)
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    step = getattr(config, "decoder_sparse_step", None) or 1
    # The rule by which vLLM's Qwen3-MoE decides; the other architectures have neither key.
    layers = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    return MoEShape(
        row.name, layers, _integer(config, _EXPERTS_KEYS, row), _integer(config, ("num_experts_per_tok",), row)
    )


def _integer(config: object, keys: Sequence[str], row: Architecture) -> int:
    found = next((value for key in keys if type(value := getattr(config, key, None)) is int), None)
    if found is None:
        raise EngineError(f"the config of this {row.name} has no integer {' or '.join(keys)}")
    return found
