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
