"""The one place where tests start engines in their own process; fixtures, loaded by `tests/conftest.py`.

Engines live to the end of the session: destroying one takes the process groups from all others.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import runners

SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.2}
"""Options of every engine."""
TINY = {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8}
"""Further options of engines with a tiny checkpoint, which has no tokenizer."""
KEPT: list[Any] = []
EXACT = {"dtype": "float32", "enable_prefix_caching": False}


def start(model: str, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """An engine with the plugin, in this process unless the environment says otherwise."""
    from vllm_steermoe_plugin.engine import start_engine

    engine = start_engine(model, settings, **SMALL | (TINY if model != "steermoe-lab" else {}) | options)
    runners.check(engine)
    return engine


def model_of(engine: Any) -> Any:
    """The model that the runner of an engine in this process holds."""
    return engine.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def draft_of(engine: Any) -> Any:
    """The drafting model of an engine in this process; None if it drafts without one."""
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    return getattr(runner.speculator if runners.V2 else runner.drafter, "model", None)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("OlmoeForCausalLM")` is a tiny random checkpoint of that architecture."""
    from tests.support.tiny import make_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda architecture: make_checkpoint(architecture, folder / architecture)


@pytest.fixture(scope="session")
def kept_alive() -> list[Any]:
    """Whoever starts an engine of its own in this process appends it here."""
    return KEPT


def pytest_sessionfinish(exitstatus: int) -> None:
    """Leave without taking the engines down: for each, vLLM collects garbage three times through all the others."""
    if KEPT:
        atexit.register(_leave, int(exitstatus))


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@pytest.fixture(scope="session")
def engines(kept_alive: list[Any]) -> Callable[..., Any]:
    """`engines(model, settings, **options)` is an engine, started once per set of settings and options."""
    started: dict[str, Any] = {}

    def get(model: str, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        key = repr((model, settings, sorted(options.items())))
        if key not in started:
            started[key] = start(model, settings, **options)
            kept_alive.append(started[key])
        return started[key]

    return get


@pytest.fixture(scope="session")
def lab(engines: Callable[..., Any]) -> Any:
    """The lab model in float32, eight groups counted, without a prefix cache."""
    return engines("steermoe-lab", {"count_groups": 8}, **EXACT)


@pytest.fixture(scope="session")
def tiny(engines: Callable[..., Any], checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    """`tiny("OlmoeForCausalLM")`: its checkpoint in float32, four groups counted, without a prefix cache."""
    return lambda architecture: engines(str(checkpoint(architecture)), {"count_groups": 4}, **EXACT)


@pytest.fixture
def tight(engines: Callable[..., Any]) -> Any:
    """The lab model with a KV cache so small that vLLM preempts requests of 120 tokens."""
    small = {"max_model_len": 128, "block_size": 32, "num_gpu_blocks_override": 10, "max_num_seqs": 4}
    return engines("steermoe-lab", {"count_groups": 2}, **EXACT, **small, disable_log_stats=False)


@pytest.fixture
def live_environment() -> None:
    """vLLM reads its environment variables anew; it stops doing so once an engine has started."""
    from vllm import envs

    envs.disable_envs_cache()
