"""What the front end and the workers make of an engine's configuration, and engines that do not generate."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from test_architectures import config

from expert_registry.errors import EngineError
from vllm_steermoe_plugin import lab
from vllm_steermoe_plugin.architectures import NotSteerable, shape_of
from vllm_steermoe_plugin.served_model import served_shape


def engine_config(*, encoders: bool = False, runner: str = "generate", **changes: Any) -> Any:
    """As vLLM's, as far as it is looked at."""
    hf_config = config(**changes)
    model = SimpleNamespace(architecture=hf_config.architectures[0], hf_config=hf_config, runner_type=runner)
    return SimpleNamespace(model_config=model, is_mm_encoder_only=encoders)


def test_an_engine_that_generates_has_the_shape_of_its_model() -> None:
    assert served_shape(engine_config()) == shape_of(config())


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ({"encoders": True}, "runs only its encoders"),
        ({"runner": "pooling"}, "the engine pools"),
        ({"architectures": ["Llama4ForConditionalGeneration"]}, "sigmoid"),
    ],
)
def test_an_engine_that_does_not_run_a_steerable_language_model_says_why(engine: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotSteerable, match=reason):
        served_shape(engine_config(**engine))


def test_a_config_that_cannot_be_read_is_said_so() -> None:
    with pytest.raises(EngineError, match="has no integer num_experts"):
        served_shape(engine_config(num_experts=...))


def test_an_engine_that_pools_is_left_to_vllm(engines: Callable[..., Any]) -> None:
    engine = engines(lab.NAME, {"count_groups": 2}, runner="pooling", convert="embed")
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    assert model.steering_state is None
    assert len(engine.embed(["Count from 2 to 4."], use_tqdm=False)[0].outputs.embedding) > 0
