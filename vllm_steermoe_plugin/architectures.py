"""The MoE architectures that can be steered: one row each, and how to read a shape from a config.

A row names vLLM's class and the config keys of E and K. Nothing here imports vLLM.
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
        name: in a checkpoint's config and in vLLM's model registry.
        module, cls: where vLLM keeps the class.
        experts_key: config key of E. (The key of K is `num_experts_per_tok` in all of them.)
    """

    name: str
    module: str
    cls: str
    experts_key: str


_MODELS = "vllm.model_executor.models."

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("GptOssForCausalLM", _MODELS + "gpt_oss", "GptOssForCausalLM", "num_local_experts"),
        Architecture("MixtralForCausalLM", _MODELS + "mixtral", "MixtralForCausalLM", "num_local_experts"),
        Architecture("OlmoeForCausalLM", _MODELS + "olmoe", "OlmoeForCausalLM", "num_experts"),
        Architecture("PhiMoEForCausalLM", _MODELS + "phimoe", "PhiMoEForCausalLM", "num_local_experts"),
        Architecture("Qwen3MoeForCausalLM", _MODELS + "qwen3_moe", "Qwen3MoeForCausalLM", "num_experts"),
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
    num_layers = _integer(config, "num_hidden_layers", row)
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    step = getattr(config, "decoder_sparse_step", None) or 1
    # The rule by which vLLM's Qwen3-MoE decides; the other architectures have neither key.
    layers = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    return MoEShape(row.name, layers, _integer(config, row.experts_key, row), _integer(config, "num_experts_per_tok", row))


def _integer(config: object, key: str, row: Architecture) -> int:
    value = getattr(config, key, None)
    if not isinstance(value, int):
        raise EngineError(f"the config of this {row.name} has no integer {key!r}")
    return value
