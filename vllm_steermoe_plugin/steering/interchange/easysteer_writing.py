"""A profile as EasySteer's JSON, where that says the same."""

from __future__ import annotations

import json

from expert_registry.errors import ProfileError
from vllm_steermoe_plugin.steering.interchange.easysteer import EPSILON, to_population
from vllm_steermoe_plugin.steering.profile import SteeringProfile


def write_easysteer(profile: SteeringProfile, num_experts: int) -> str:
    """The text of a file with which EasySteer steers as the profile does.

    Args:
        profile: in whose layers all biases are equal, or there are none.
        num_experts: E of the model, at least 2.

    Raises:
        ProfileError: EasySteer's file cannot say it; the message says in which layer.
    """
    if profile.phase != "both":
        raise ProfileError(f"phase={profile.phase}: EasySteer's file has no phase; its requests have one")
    if profile.weight != "top":
        raise ProfileError(f"weight={profile.weight}: EasySteer's file does not say how much activated experts weigh")
    if not profile:
        raise ProfileError("the profile steers nothing")
    cells = {(layer, expert) for layer, expert, _ in profile.bias} | profile.activate | profile.deactivate
    layer, expert = max(cells, key=lambda cell: cell[1])
    if expert >= num_experts:
        raise ProfileError(f"layer {layer} has no expert {expert}: each layer has {num_experts}")
    configs = {str(layer): _layer(layer, profile, num_experts) for layer in sorted({layer for layer, _ in cells})}
    return json.dumps({"layer_configs": configs}, indent=1)


def _layer(layer: int, profile: SteeringProfile, num_experts: int) -> dict[str, object]:
    forced = {
        name: ids
        for name, cells in (("activate_ids", profile.activate), ("deactivate_ids", profile.deactivate))
        if (ids := sorted(expert for at, expert in cells if at == layer))
    }
    biases = {expert: bias for at, expert, bias in profile.bias if at == layer}
    if forced and biases:
        raise ProfileError(
            f"layer {layer} forces experts ({forced}) and has biases ({biases}); a layer of EasySteer's file does one "
            "of both"
        )
    if forced:
        return {"mode": "activate", **forced, "epsilon": EPSILON}
    values = sorted(set(biases.values()))
    if len(values) > 1:
        raise ProfileError(
            f"layer {layer} has {len(values)} different biases, from {values[0]:g} to {values[-1]:g}; a layer of "
            "EasySteer's file has one lambda. In a request, by=sign makes biases of one sign equal; both signs in one "
            "layer can only be written as experts that are forced in and out"
        )
    return {"mode": "soft", "expert_ids": sorted(biases), "lambda": values[0] / to_population(num_experts)}
