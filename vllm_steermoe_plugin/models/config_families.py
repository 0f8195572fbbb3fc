"""How a model's config tells its MoE layers and its experts: one family per way of saying it.

Each function reads the keys that vLLM's model file reads, with the same defaults, from the config of the language
model (an object with attributes, or a mapping). Nothing here imports vLLM or torch. What is read here is checked
again on the model that vLLM builds (`worker/binding.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from expert_registry.errors import UnsupportedModelError

_MISSING = object()

Layers = Callable[[object], Iterable[int]]
"""From the config of a language model to the checkpoint indices of its layers with routed experts."""


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


def integer(config: object, paths: Iterable[str], missing: int | None = None) -> int:
    """The first integer among several paths; `missing` if nothing is there.

    Raises:
        UnsupportedModelError: there is none, and nothing to take instead.
    """
    paths = tuple(paths)
    given = [value for path in paths if (value := read(config, path, None)) is not None]
    found = next((value for value in given if type(value) is int), None if given else missing)
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


def _no_layer(config: object) -> Iterable[int]:
    return ()


def _after_dense(*counts: str, missing: int | None = None, step: str = "", from_first: bool = False) -> Layers:
    """The layers after the first, dense ones.

    Args:
        counts: where the number of dense ones may stand.
        missing: that number if the config does not say it; None if it must.
        step: key of a step: of the layers after the dense ones, only every so manieth has experts.
        from_first: whether the step is counted from the first layer after them, not from the first of all.
    """

    def layers(config: object) -> Iterable[int]:
        first = integer(config, counts, missing)
        every = read(config, step, 1) if step else 1
        if type(every) is not int or every < 1:
            raise UnsupportedModelError(f"{step} is {every!r}; only a whole number of layers is known")
        origin = first if from_first else 0
        return (i for i in range(first, num_layers(config)) if (i - origin) % every == 0)

    return layers


def _by_kinds(otherwise: Layers) -> Layers:
    """The layers that `mlp_layer_types` calls sparse; without it, those that `otherwise` tells."""

    def layers(config: object) -> Iterable[int]:
        kinds = read(config, "mlp_layer_types", None)
        if kinds is None:
            return otherwise(config)
        count = num_layers(config)
        told = list(kinds)[:count] if isinstance(kinds, list | tuple) else []
        if len(told) < count or not all(kind in ("dense", "sparse") for kind in told):
            raise UnsupportedModelError(f"mlp_layer_types is {kinds!r}, not 'dense' or 'sparse' for each layer")
        return (i for i, kind in enumerate(told) if kind == "sparse")

    return layers


def _by_flags(otherwise: Layers) -> Layers:
    """The layers whose entry in the list `moe_layer_freq` is not 0; without a list, those that `otherwise` tells."""

    def layers(config: object) -> Iterable[int]:
        flags = read(config, "moe_layer_freq", None)
        if not isinstance(flags, list | tuple):
            return otherwise(config)
        if len(flags) < num_layers(config):
            raise UnsupportedModelError(f"moe_layer_freq is {flags!r}, not one entry for each layer")
        return (i for i in range(num_layers(config)) if flags[i])

    return layers


def _by_pattern(config: object) -> Iterable[int]:
    """Of a hybrid whose pattern has a letter, or a word, for each of its layers; it also tells how many there are."""
    pattern = read(config, "hybrid_override_pattern", None)
    if isinstance(pattern, str):
        return (i for i, kind in enumerate(pattern) if kind == "E")
    kinds = read(config, "layers_block_type")
    if not isinstance(kinds, list | tuple):
        raise UnsupportedModelError(f"layers_block_type is {kinds!r}, not a list of layers")
    return (i for i, kind in enumerate(kinds) if kind == "moe")


def _by_interval(config: object) -> Iterable[int]:
    if not read(config, "use_moe", True):
        return ()
    first, last = integer(config, ("moe_layer_start_index",), 0), integer(config, ("moe_layer_end_index",), -1)
    every = integer(config, ("moe_layer_interval",), 1)
    end = num_layers(config) if last == -1 else min(last + 1, num_layers(config))
    return (i for i in range(first, end) if (i + 1) % every == 0)


def _interleaved(config: object) -> Iterable[int]:
    every = integer(config, ("interleave_moe_layer_step",))
    return (i for i in range(num_layers(config)) if every > 0 and (i + 1) % every == 0)


def _after_hash_layers(config: object) -> Iterable[int]:
    """The first layers take their experts from a table by the token's id: there is no ranking to steer.

    vLLM 0.32 reads their number; 0.33 counts them in the list that transformers makes of it.
    """
    hashed = read(config, "num_hash_layers", None)
    if hashed is None:
        kinds = read(config, "mlp_layer_types")
        hashed = kinds.count("hash_moe") if isinstance(kinds, list | tuple) else kinds
    if type(hashed) is not int:
        raise UnsupportedModelError(f"the number of its hash layers is {hashed!r}")
    return range(hashed, num_layers(config))


def _by_any_rule(config: object) -> Iterable[int]:
    """As transformers' configs say it; the model that was built has the last word (`worker/layers.py`)."""
    if has(config, "mlp_layer_types") or has(config, "first_k_dense_replace"):
        return _by_kinds(_after_dense("first_k_dense_replace", step="moe_layer_freq"))(config)
    return _by_sparse_step(config)


def _by_period(config: object) -> Iterable[int]:
    if integer(config, ("num_experts",)) < 2:  # vLLM gives a single expert no gate.
        return ()
    period, offset = integer(config, ("expert_layer_period",)), integer(config, ("expert_layer_offset",))
    return (i for i in range(num_layers(config)) if i % period == offset)


def _by_enumeration(config: object) -> Iterable[int]:
    either = (read(config, key, None) for key in ("moe_layers_enum", "moe_layer_list"))
    named = next((value for value in either if value is not None), None)
    if named is None:
        return range(1, num_layers(config))
    parts = [part for part in named.split(",") if part.strip()] if isinstance(named, str) else _integers(named)
    chosen = {int(part) for part in parts}
    return (i for i in range(num_layers(config)) if i in chosen)


def _integers(value: object) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, list | tuple | set) or not all(type(item) is int for item in value):
        raise UnsupportedModelError(f"{value!r} is not a list of layers")
    return list(value)


def _no_obstacle(config: object) -> str | None:
    return None


def _no_mova(config: object) -> str | None:
    return "its attention has experts and routers of its own" if read(config, "mova_num_experts", 0) else None


def _no_images(config: object) -> str | None:
    return "its router takes another bias for the tokens of images" if read(config, "vision_n_layers", 0) else None


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
    layers: Layers = _every_layer
    obstacle: Callable[[object], str | None] = _no_obstacle
    condition: str = ""


FAMILIES: dict[str, Family] = {
    "every layer": Family(),
    "sparse step": Family(layers=_by_sparse_step),
    "period": Family(layers=_by_period),
    "layer types": Family(
        ("n_routed_experts", "num_experts", "num_local_experts"),
        layers=_by_kinds(_after_dense("first_k_dense_replace", step="moe_layer_freq")),
    ),
    "dense first": Family(
        ("n_routed_experts", "num_experts"), layers=_after_dense("first_k_dense_replace", "num_dense_layers")
    ),
    "deepseek": Family(("n_routed_experts",), layers=_after_dense("first_k_dense_replace", step="moe_layer_freq")),
    "deepseek v4": Family(
        ("n_routed_experts",), layers=_after_hash_layers, obstacle=_no_images, condition="no vision_n_layers"
    ),
    "bailing": Family(layers=_after_dense("first_k_dense_replace", missing=0)),
    "sarvam": Family(layers=_after_dense("first_k_dense_replace", missing=1, step="moe_layer_freq", from_first=True)),
    "kimi": Family(
        top_k=("num_experts_per_token", "num_experts_per_tok"),
        layers=_after_dense("first_k_dense_replace", missing=0, step="moe_layer_freq"),
    ),
    "minimax": Family(("num_local_experts",), layers=_by_flags(_every_layer)),
    "mimo": Family(("n_routed_experts",), layers=_by_flags(_no_layer)),
    "nemotron": Family(("n_routed_experts",), layers=_by_pattern),
    "llama": Family(("num_local_experts",), layers=_interleaved),
    "ernie": Family(("moe_num_experts",), ("moe_k",), _by_interval),
    "step": Family(("moe_num_experts",), ("moe_top_k",), _by_kinds(_by_enumeration)),
    "aria": Family(("moe_num_experts",), ("moe_topk",)),
    "dbrx": Family(("ffn_config.moe_num_experts",), ("ffn_config.moe_top_k",)),
    "gemma": Family(top_k=("top_k_experts",)),
    "transformers": Family(
        ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts"),
        _by_any_rule,
        condition="vLLM's Transformers backend has fused its router",
    ),
    "k2": Family(layers=_by_sparse_step, obstacle=_no_mova, condition="no mova_num_experts"),
}
