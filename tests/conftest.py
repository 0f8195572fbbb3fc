"""Environment and shared engines. The variables must stand before torch is imported."""

from __future__ import annotations

import os

os.environ.update(
    {
        # One OpenMP thread: libgomp's threads stall for minutes beside any other busy process.
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
)
os.environ.pop("VLLM_PLUGINS", None)

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none; pytest's summary counts them."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _own_registry(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the rankings in the home folder of whoever runs it."""
    if "STEERMOE_REGISTRY" not in os.environ:
        monkeypatch.setenv("STEERMOE_REGISTRY", str(tmp_path_factory.getbasetemp() / "no-rankings"))


@pytest.fixture
def live_environment() -> None:
    """vLLM reads its environment variables anew; it stops doing so once an engine has started."""
    from vllm import envs

    envs.disable_envs_cache()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("OlmoeForCausalLM")` is a tiny random checkpoint of that architecture."""
    from tests.support.tiny import make_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")

    def make(architecture: str) -> Path:
        return make_checkpoint(architecture, folder / architecture)

    return make


@pytest.fixture(scope="session")
def kept_alive() -> list[Any]:
    """Whoever starts an engine of its own in this process appends it here.

    Destroying one engine takes the process groups from all others, so they live to the end of the session.
    """
    return []


@pytest.fixture(scope="session")
def engines() -> Iterator[Callable[..., Any]]:
    """`engines(model, **options)` is an in-process vLLM engine, started once per set of options.

    Engines are kept to the end: destroying one takes the process group from the others.
    """
    from vllm_steermoe_plugin.engine import start_engine

    started: dict[str, Any] = {}

    def get(model: str, settings: dict[str, Any] | None = None, **options: Any) -> Any:
        key = repr((model, settings, sorted(options.items())))
        if key not in started:
            defaults = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "gpu_memory_utilization": 0.2}
            if model != "steermoe-lab":
                defaults |= {"skip_tokenizer_init": True, "max_model_len": 128, "max_num_seqs": 8}
            started[key] = start_engine(model, settings, **{**defaults, **options})
        return started[key]

    yield get


@pytest.fixture
def tight(engines: Callable[..., Any]) -> Any:
    """The lab model with a KV cache so small that vLLM preempts requests of 120 tokens."""
    return engines(
        "steermoe-lab",
        {"count_groups": 2},
        enable_prefix_caching=False,
        dtype="float32",
        max_model_len=128,
        block_size=32,
        num_gpu_blocks_override=10,
        max_num_seqs=4,
        disable_log_stats=False,
    )
