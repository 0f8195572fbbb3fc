"""Configurations in which the host does not know which token of a step is whose are refused before anything runs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expert_registry import MoEShape
from expert_registry.errors import EngineError
from vllm_steermoe_plugin import vllm_internals as vllm
from vllm_steermoe_plugin.architectures import ARCHITECTURES
from vllm_steermoe_plugin.binding import ROUND_LOGITS, _refuse_later_rounding, _refuse_unsupported
from vllm_steermoe_plugin.settings import Settings

SHAPE = MoEShape("OlmoeForCausalLM", (0, 1), 4, 2)


def config(speculative: Any = None, *, fast_prefill: bool = False, **parallel: Any) -> Any:
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
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast_prefill),
        aux_output_config=SimpleNamespace(enabled=False),
        kv_transfer_config=None,
    )


def test_the_fields_are_vllms() -> None:
    # `test_internals.py` checks that vLLM has what the ledger names.
    assert set(vars(config().parallel_config)) <= set(vllm.PARALLEL_CONFIG.reads)
    assert set(vars(config().cache_config)) <= set(vllm.CACHE_CONFIG.reads)
    assert set(vars(config())) <= set(vllm.VLLM_CONFIG.reads)


def test_ordinary_configurations_are_taken() -> None:
    _refuse_unsupported(SHAPE, config(), Settings())
    _refuse_unsupported(SHAPE, config(SimpleNamespace(enable_adaptive_verification=False)), Settings())


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (config(use_sequence_parallel_moe=True), "sequence-parallel"),
        (config(use_ubatching=True), "micro-batching"),
        (config(fast_prefill=True), "kv_sharing_fast_prefill"),
        (config(prefill_context_parallel_size=2), "prefill context parallelism"),
        (config(SimpleNamespace(enable_adaptive_verification=True)), "adaptive verification"),
    ],
)
def test_others_are_refused_with_the_reason_and_the_way_out(refused: Any, says: str) -> None:
    with pytest.raises(EngineError, match=says) as error:
        _refuse_unsupported(SHAPE, refused, Settings())
    assert "switch steering off" in str(error.value)


def test_logits_that_the_model_rounds_behind_the_gate_are_refused() -> None:
    """In bfloat16 an expert at 0.01 above another may be level with it."""
    wide: Any = {3: SimpleNamespace(out_dtype=torch.float32)}
    narrow: Any = {3: SimpleNamespace(out_dtype=None)}
    for name in ROUND_LOGITS:
        shape = MoEShape(name, (3,), 4, 2)
        with pytest.raises(EngineError, match="layer 3 computes in float32"):
            _refuse_later_rounding(wide, shape, torch.bfloat16)
        _refuse_later_rounding(wide, shape, torch.float32)
        _refuse_later_rounding(narrow, shape, torch.bfloat16)
    _refuse_later_rounding(wide, SHAPE, torch.bfloat16)


def test_no_other_model_rounds_its_logits() -> None:
    """By the source of vLLM's model classes."""
    rounding = re.compile(r"router_logits\s*=\s*router_logits\.(to|float|half|bfloat16)\(")
    known = vllm.BUILT_IN_MODELS.load()

    def source(architecture: str) -> str:
        module = known[architecture][0]
        place = module if module.startswith(vllm.PACKAGE) else f"{vllm.MODELS_PACKAGE}.{module}"
        found = find_spec(place)
        assert found is not None and found.origin is not None
        return Path(found.origin).read_text(encoding="utf-8")

    assert {name for name in ARCHITECTURES if rounding.search(source(name))} == ROUND_LOGITS
