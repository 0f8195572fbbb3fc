"""Configurations in which the host does not know which token of a step is whose are refused before anything runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from expert_registry import MoEShape
from expert_registry.errors import EngineError
from vllm_steermoe_plugin.binding import _refuse_unsupported
from vllm_steermoe_plugin.settings import Settings

SHAPE = MoEShape("OlmoeForCausalLM", (0, 1), 4, 2)


def config(speculative: Any = None, **parallel: Any) -> Any:
    """As much of a VllmConfig as is looked at, with the fields' real names."""
    plain: dict[str, Any] = {
        "use_sequence_parallel_moe": False,
        "use_ubatching": False,
        "enable_elastic_ep": False,
        "prefill_context_parallel_size": 1,
        "data_parallel_size": 1,
    }
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**{**plain, **parallel}),
        speculative_config=speculative,
        aux_output_config=SimpleNamespace(enabled=False),
    )


def test_the_fields_are_vllms() -> None:
    from vllm.config import ParallelConfig, SpeculativeConfig

    for name in vars(config().parallel_config):
        assert hasattr(ParallelConfig, name) or name in ParallelConfig.__dataclass_fields__
    assert "enable_adaptive_verification" in SpeculativeConfig.__dataclass_fields__


def test_ordinary_configurations_are_taken() -> None:
    _refuse_unsupported(SHAPE, config(), Settings())
    _refuse_unsupported(SHAPE, config(SimpleNamespace(enable_adaptive_verification=False)), Settings())


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (config(use_sequence_parallel_moe=True), "sequence-parallel"),
        (config(use_ubatching=True), "micro-batching"),
        (config(prefill_context_parallel_size=2), "prefill context parallelism"),
        (config(SimpleNamespace(enable_adaptive_verification=True)), "adaptive verification"),
    ],
)
def test_others_are_refused_with_the_reason_and_the_way_out(refused: Any, says: str) -> None:
    with pytest.raises(EngineError, match=says) as error:
        _refuse_unsupported(SHAPE, refused, Settings())
    assert "switch steering off" in str(error.value)
