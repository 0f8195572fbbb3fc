"""How a model's config tells its MoE layers, its experts and what its router does: one family per way of saying it.

Each function reads the keys that vLLM's model file reads, with the same defaults, from the config of the language
model (an object with attributes, or a mapping). Nothing here imports vLLM or torch. What is read here is checked
again on the model that vLLM builds (`worker/binding.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from expert_registry.errors import UnsupportedModelError

_MISSING = object()


def read(config: object, path: str, default: object = _MISSING) -> object:
    """The value at a dotted path; `default` if it is not there.

    Raises:
        UnsupportedModelError: it is not there, and there is no default.
    """
    value = _at(config, path)
    if value is not _MISSING:
        return value
    if default is _MISSING:
        raise UnsupportedModelError(f"the config has no {path}")
    return default


def has(config: object, path: str) -> bool:
    """Whether there is something at a dotted path, be it None."""
    return _at(config, path) is not _MISSING


def _at(config: object, path: str) -> object:
    value: object = config
    for part in path.split("."):
        value = value.get(part, _MISSING) if isinstance(value, Mapping) else getattr(value, part, _MISSING)
    return value


def integer(config: object, paths: Iterable[str]) -> int:
    """The first integer among several paths.

    Raises:
        UnsupportedModelError: there is none.
    """
    paths = tuple(paths)
    found = next((value for path in paths if type(value := read(config, path, None)) is int), None)
    if found is None:
        raise UnsupportedModelError(f"the config has no integer {' or '.join(paths)}")
    return found


def num_layers(config: object) -> int:
    """Hidden layers of the language model, dense ones included."""
    return integer(config, ("num_hidden_layers", "n_layers"))


def _every_layer(config: object) -> Iterable[int]:
    return range(num_layers(config))


def _by_sparse_step(config: object) -> Iterable[int]:
    dense = set(_integers(read(config, "mlp_only_layers", None)))
    step = read(config, "decoder_sparse_step", None) or 1
    if type(step) is not int:
        raise UnsupportedModelError(f"decoder_sparse_step is {step!r}, not an integer")
    return (i for i in range(num_layers(config)) if i not in dense and (i + 1) % step == 0)


def _after_dense_ones(config: object) -> Iterable[int]:
    first = integer(config, ("first_k_dense_replace",))
    step = read(config, "moe_layer_freq", 1)
    if type(step) is not int or step < 1:
        raise UnsupportedModelError(f"moe_layer_freq is {step!r}; only a whole number of layers is known")
    return (i for i in range(first, num_layers(config)) if i % step == 0)


def _by_period(config: object) -> Iterable[int]:
    if integer(config, ("num_experts",)) < 2:  # vLLM gives a single expert no gate.
        return ()
    period, offset = integer(config, ("expert_layer_period",)), integer(config, ("expert_layer_offset",))
    return (i for i in range(num_layers(config)) if i % period == offset)


def _after_dense_types(config: object) -> Iterable[int]:
    kinds = read(config, "mlp_layer_types", None)
    kinds = list(kinds) if isinstance(kinds, list | tuple) else []
    first = next((i for i, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    return range(first, num_layers(config))


def _by_enumeration(config: object) -> Iterable[int]:
    named = read(config, "moe_layers_enum", None)
    if named is None:
        return range(1, num_layers(config))
    chosen = {int(part) for part in named.strip().split(",")} if isinstance(named, str) else set(_integers(named))
    return (i for i in range(num_layers(config)) if i in chosen)


def _integers(value: object) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list | tuple | set) or not all(type(item) is int for item in value):
        raise UnsupportedModelError(f"{value!r} is not a list of layers")
    return list(value)


def _no_obstacle(config: object) -> str | None:
    return None


def _attention_experts(config: object) -> str | None:
    return "its attention has experts and routers of its own" if read(config, "mova_num_experts", 0) else None


@dataclass(frozen=True, slots=True)
class Family:
    """Configs that say it in the same way.

    Attributes:
        experts: where E, the routed experts per layer, may stand.
        top_k: where K may stand.
        layers: the checkpoint indices of the layers with routed experts.
        obstacle: why a config cannot be steered, or None.
        condition: what the config must say for there to be no obstacle; empty if all configs will do.
    """

    experts: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k: tuple[str, ...] = ("num_experts_per_tok",)
    layers: Callable[[object], Iterable[int]] = _every_layer
    obstacle: Callable[[object], str | None] = _no_obstacle
    condition: str = ""


FAMILIES: dict[str, Family] = {
    "every layer": Family(),
    "sparse step": Family(layers=_by_sparse_step),
    "period": Family(layers=_by_period),
    "dbrx": Family(("ffn_config.moe_num_experts",), ("ffn_config.moe_top_k",)),
    "cohere": Family(layers=_after_dense_types),
    "bailing": Family(layers=_after_dense_ones),
    "deepseek": Family(("n_routed_experts",), layers=_after_dense_ones),
    "step": Family(("moe_num_experts",), ("moe_top_k",), _by_enumeration),
    "gemma": Family(top_k=("top_k_experts",)),
    "k2": Family(layers=_by_sparse_step, obstacle=_attention_experts, condition="no mova_num_experts"),
}
