"""Environment, tiers and the summary. The variables must stand before torch is imported."""

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

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support import runners

runners.install()

pytest_plugins = ["tests.support.engines"]

ENGINE_FOLDERS = ("engine", "served")
ENGINE_FIXTURES = {"engines", "checkpoint", "kept_alive"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs an engine by its folder and fixtures; skip what needs a GPU where there is none."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in ENGINE_FOLDERS or ENGINE_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("engine")
    if not (marked := [item for item in items if item.get_closest_marker("gpu")]):
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests were skipped for each reason, and how many another tier runs."""
    stats = terminalreporter.stats
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", ()))
    tiers = Counter(_tier(item) for item in stats.get("deselected", ()))
    for what, found in (("skipped", skipped), ("not in this tier", tiers)):
        for kind, number in found.most_common():
            terminalreporter.write_line(f"{what}: {number} ({kind})")


def _tier(item: pytest.Item) -> str:
    return next((name for name in ("nightly", "engine") if item.get_closest_marker(name)), "deselected")


@pytest.fixture(autouse=True)
def _own_registry(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the rankings in the home folder of whoever runs it."""
    if "STEERMOE_REGISTRY" not in os.environ:
        monkeypatch.setenv("STEERMOE_REGISTRY", str(tmp_path_factory.getbasetemp() / "no-rankings"))
