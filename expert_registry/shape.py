"""The shape of a mixture-of-experts model, as far as steering needs it."""

from __future__ import annotations

from dataclasses import dataclass

from expert_registry.errors import ProfileError


@dataclass(frozen=True, slots=True)
class MoEShape:
    """Which layers route, over how many experts, and how many each token gets.

    Attributes:
        architecture: the name in the checkpoint's config, such as `OlmoeForCausalLM`.
        layers: checkpoint indices of the L layers that have routed experts, ascending.
        num_experts: E, routed experts per layer.
        top_k: K, experts per token.
    """

    architecture: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise ProfileError(f"layers of {self.architecture} must be ascending indices, got {self.layers}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ProfileError(f"{self.architecture}: top-k {self.top_k} does not fit {self.num_experts} experts")

    def __str__(self) -> str:
        return (
            f"{self.architecture} with {len(self.layers)} MoE layers ({self.layers[0]}..{self.layers[-1]}), "
            f"{self.num_experts} experts, top-{self.top_k}"
        )

    @property
    def rows(self) -> dict[int, int]:
        """Checkpoint index of each layer -> its row, from 0, in all arrays `[L, E]`."""
        return {layer: row for row, layer in enumerate(self.layers)}

    def differences(self, other: MoEShape) -> list[str]:
        """In what this shape is not as `other`, in words; empty if they are equal."""
        result = []
        if self.architecture != other.architecture:
            result.append(f"architecture {self.architecture}, not {other.architecture}")
        if self.layers != other.layers:
            result.append(f"MoE layers {_layers(self.layers)}, not {_layers(other.layers)}")
        if self.num_experts != other.num_experts:
            result.append(f"{self.num_experts} experts, not {other.num_experts}")
        if self.top_k != other.top_k:
            result.append(f"top-{self.top_k}, not top-{other.top_k}")
        return result


def _layers(layers: tuple[int, ...]) -> str:
    whole = layers == tuple(range(layers[0], layers[-1] + 1))
    if whole or len(layers) > 16:
        return f"{layers[0]}..{layers[-1]} ({len(layers)})"
    return ",".join(str(layer) for layer in layers)
