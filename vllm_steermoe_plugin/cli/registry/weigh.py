"""`steermoe registry weigh`: weights for biases and a recommended strength, as a ranking's next version."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from expert_registry import MoEShape, Recommended, Registry
from expert_registry.errors import UsageError, one_of
from expert_registry.places import user_folder
from expert_registry.ranking import Ranking
from expert_registry.registry import publish
from expert_registry.revision import revise
from expert_registry.weights import SCORES, largest, own_weights
from expert_registry.weights import weigh as weights_of
from vllm_steermoe_plugin.cli.inputs import read_profile
from vllm_steermoe_plugin.cli.registry.opening import Locked, find
from vllm_steermoe_plugin.steering.biases import MAX_BIAS
from vllm_steermoe_plugin.steering.rules import check_rules
from vllm_steermoe_plugin.steering.strength import bias_experts

_FROM_COUNTS = SCORES[1:]


def weigh(
    model: Annotated[str, typer.Argument(help="Hub id, checkpoint folder or served name.")],
    behaviour: Annotated[str, typer.Argument(help="Behaviour or behaviour@version.")],
    weights: Annotated[str | None, typer.Option(help=f"Make weights of the counts: {', '.join(_FROM_COUNTS)}.")] = None,
    profile: Annotated[
        Path | None, typer.Option("--from", help='Take the biases of a profile, {"bias": ...}, as weights.')
    ] = None,
    strength: Annotated[float | None, typer.Option(help=f"Recommend this strength, at most {MAX_BIAS}.")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="Only the N largest weights.")] = None,
    locked: Locked = None,
) -> None:
    """Store the next version of a ranking in your registry, with weights of its own, a recommended strength or both."""
    if weights is not None and profile is not None:
        raise UsageError("--weights and --from both make weights; leave one out")
    if weights is None and profile is None and strength is None:
        raise UsageError("nothing to store; say --weights, --from or --strength")
    if strength is not None and not 0 < strength <= MAX_BIAS:
        raise UsageError(f"--strength {strength:g}: a recommended strength is above 0 and at most {MAX_BIAS}")
    registry = Registry.default(locked)
    ranking = find(model, behaviour, registry).ranking
    made: tuple[NDArray[np.float64], str] | None = None
    if weights is not None:
        made = _of_counts(ranking, weights)
    elif profile is not None:
        made = _of_profile(profile, ranking.shape)
    changes: dict[str, object] = {}
    if made is not None:
        values, words = made
        cells = largest(ranking, values, top)
        own = np.zeros(values.shape, dtype=np.float32)
        own[cells] = values[cells]
        ranking = replace(ranking, weights=own)
        changes["weights"] = words if top is None else f"{words}, the {top} largest"
        top = None
    if strength is not None:
        if not bias_experts(ranking, strength, top=top):  # What cannot be applied is refused here, not at each request.
            raise UsageError(f"--strength {strength:g}: all biases would round to 0")
        numbers = {"strength": strength, "top": top, "by": None}
        for name in ("recommended", "recommended_reverse"):
            so_far: Recommended | None = getattr(ranking.card, name)
            if so_far is not None:
                changes[name] = so_far.model_copy(update=numbers)
    ranking = revise(ranking, registry, f"Weighed from version {ranking.card.version}.", **changes)
    typer.echo(f"stored: {publish(ranking, user_folder())}")
    typer.echo(f"  recommended: {ranking.card.recommended}")
    typer.echo(f"  weights: {own_weights(ranking) or 'of the counts'}")


def _of_counts(ranking: Ranking, by: str) -> tuple[NDArray[np.float64], str]:
    for known in _FROM_COUNTS:
        if known == by:
            return weights_of(ranking, known), f"{by} of the counts"
    raise UsageError(one_of(by, _FROM_COUNTS, "kind of weights"))


def _of_profile(path: Path, shape: MoEShape) -> tuple[NDArray[np.float64], str]:
    profile = read_profile(path)
    if profile.activate or profile.deactivate or profile.phase != "both":
        raise UsageError(f"{path} forces experts or has a phase; weights are biases, in both phases")
    check_rules(profile, shape)
    values = np.zeros((len(shape.layers), shape.num_experts))
    for layer, expert, bias in profile.bias:
        values[shape.rows[layer], expert] = bias
    if not profile:
        raise UsageError(f"{path}: all biases are 0")
    return values, f"biases of the profile with digest {profile.digest}"
