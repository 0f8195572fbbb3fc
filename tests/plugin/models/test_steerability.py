"""What the front end and the workers make of an engine's configuration, and engines that do not generate."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig

from expert_registry.errors import UnsupportedFeatureError, UnsupportedModelError
from tests.plugin.models.test_architectures import config
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.architectures import shape_of
from vllm_steermoe_plugin.models.kv_connectors import SALTED
from vllm_steermoe_plugin.models.steerability import served_shape

UNSUPPORTED = (UnsupportedModelError, UnsupportedFeatureError)


def engine_config(*, encoders: bool = False, runner: str = "generate", kv: str | None = None, **changes: Any) -> Any:
    """As vLLM's, as far as it is looked at."""
    hf_config = config(**changes)
    model = SimpleNamespace(architecture=hf_config.architectures[0], hf_config=hf_config, runner_type=runner)
    transfer = None if kv is None else KVTransferConfig(kv_connector=kv, kv_role="kv_both")
    return SimpleNamespace(model_config=model, is_mm_encoder_only=encoders, kv_transfer_config=transfer)


def test_an_engine_that_generates_has_the_shape_of_its_model() -> None:
    assert served_shape(engine_config()) == shape_of(config())


def test_an_engine_that_does_not_run_a_steerable_language_model_says_why() -> None:
    rows: list[tuple[Any, ...]] = [
        ({"encoders": True}, "runs only its encoders"),
        ({"runner": "pooling"}, "the engine pools"),
        ({"kv": "ExampleConnector"}, "ExampleConnector, as it is configured, may bring in"),
        ({"kv": "NixlConnector"}, "NixlConnector, as"),
        ({"kv": "MultiConnector"}, "MultiConnector, as"),
        ({"architectures": ["InklingForCausalLM"]}, "one normalisation"),
    ]
    assert not_refused(lambda engine: served_shape(engine_config(**engine)), rows, UNSUPPORTED) == []


def test_a_kv_connector_that_keeps_steerings_apart_is_no_obstacle() -> None:
    for connector in sorted(SALTED):
        assert served_shape(engine_config(kv=connector)) == shape_of(config())
        own = engine_config(kv=connector)
        own.kv_transfer_config.kv_connector_module_path = "somebody.elses"
        with pytest.raises(UNSUPPORTED, match=connector):
            served_shape(own)


def test_what_is_behind_offloading_is_looked_at() -> None:
    for extra, steerable in [
        ({"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs"}, {"type": "obj"}]}, True),
        ({"spec_name": "CPUOffloadingSpec"}, True),
        ({"spec_name": "Mine", "spec_module_path": "somebody.elses"}, False),
        ({"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs"}, {"type": "p2p"}]}, False),
        ({"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "kvcr"}]}, False),
        ({"spec_name": "TieringOffloadingSpec", "secondary_tiers": [{"type": "fs", "module_path": "m"}]}, False),
        ({"spec_name": "TieringOffloadingSpec", "secondary_tiers": ["fs"]}, False),
    ]:
        engine = engine_config(kv="OffloadingConnector")
        engine.kv_transfer_config.kv_connector_extra_config = extra
        if steerable:
            assert served_shape(engine) == shape_of(config())
        else:
            with pytest.raises(UNSUPPORTED, match="OffloadingConnector, as it is configured"):
                served_shape(engine)


def test_such_a_connector_reads_vllms_hashes_or_salts() -> None:
    """By its source, since none of them runs on this machine."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    place = Path(str(inspect.getfile(KVConnectorFactory))).parents[3]
    folder = "distributed/kv_transfer/kv_connector/v1"
    sources = {
        "LMCacheMPConnector": (f"{folder}/lmcache_mp_connector.py", "request.cache_salt"),
        "MooncakeStoreConnector": (f"{folder}/mooncake/store/scheduler.py", "request.block_hashes"),
        "OffloadingConnector": (f"{folder}/offloading/scheduler.py", "req.block_hashes"),
        "SimpleCPUOffloadConnector": ("v1/simple_kv_offload/manager.py", "request.block_hashes"),
    }
    assert set(sources) == set(SALTED)
    for file, key in sources.values():
        assert key in (place / file).read_text(), f"read again how {file} finds what it keeps"


def test_a_config_that_cannot_be_read_is_said_so() -> None:
    with pytest.raises(UnsupportedModelError, match="has no integer num_experts"):
        served_shape(engine_config(num_experts=...))


def test_an_engine_that_pools_is_left_to_vllm(engines: Callable[..., Any]) -> None:
    engine = engines(lab_checkpoint.NAME, {"count_groups": 2}, runner="pooling", convert="embed")
    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    assert model.steering_state is None
    assert len(engine.embed(["Count from 2 to 4."], use_tqdm=False)[0].outputs.embedding) > 0
