"""Front ends over a few rankings of a tiny model."""

from __future__ import annotations

from pathlib import Path

from expert_registry import MoEShape, Recommended, Registry
from expert_registry.errors import EngineError
from expert_registry.registry import publish
from tests.support.made_rankings import make_ranking
from vllm_steermoe_plugin.admission.request_admission import AdmittedRequest, FrontEnd
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.wire import STEER_KEY

MODEL = "org/Tiny-MoE"
SHAPE = MoEShape("OlmoeForCausalLM", (0, 1, 3), 6, 2)
EXPERTS = '{"activate": {"3": [5]}}'
DIGITS = make_ranking(1, behaviour="digits", recommended_reverse=Recommended(activate=1, deactivate=3))


def tiny_registry(folder: Path) -> Registry:
    """Rankings of a tiny model, and one of another shape."""
    publish(DIGITS, folder)
    publish(make_ranking(5, behaviour="refusal", recommended=Recommended(activate=0, deactivate=1)), folder)
    publish(make_ranking(3, behaviour="other", experts=8), folder)
    return Registry((folder,))


def front_end(
    registry: Registry, settings: Settings | None = None, *, served: bool = False, shape: MoEShape | EngineError = SHAPE
) -> FrontEnd:
    return FrontEnd(settings=settings or Settings(), shape=shape, models=[MODEL], registry=registry, served=served)


def profile_in(prepared: AdmittedRequest | None) -> SteeringProfile | None:
    """What the worker will read."""
    assert prepared is not None
    text = prepared.extra_args.get(STEER_KEY)
    return None if text is None else SteeringProfile.from_json(str(text))
