"""Detection in processes of its own: over two ranks, and killed for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expert_registry import Ranking, read_ranking
from tests.support.alone import run_alone
from tests.support.few_pairs import BEHAVIOUR, few, same
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.loop import DetectionOptions
from vllm_steermoe_plugin.models import lab_checkpoint

GROUPS = 8
PAIRS = 40
SCRIPT = """
import json, sys
from pathlib import Path
from expert_registry import Recommended, write_ranking
from vllm_steermoe_plugin.detection.recipes.recipe import Behaviour
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.loop import DetectionOptions
from vllm_steermoe_plugin.engine import start_engine
from vllm_steermoe_plugin.detection.pairs import PairSet
from vllm_steermoe_plugin.detection.recipes.lab import lab_recipe

if __name__ == "__main__":
    out, kept, number, groups, options = json.loads(sys.argv[1])
    found, _ = lab_recipe("steermoe-lab", "digits")
    pairs = PairSet(found.name, found.sha256, found.pairs[:number])
    engine = start_engine("steermoe-lab", {"count_groups": groups}, dtype="float32", **options)
    behaviour = Behaviour("testing", ("one", "two"), False, Recommended(activate=1, deactivate=1))
    said = []
    how = DetectionOptions(
        permutations=20, report=said.append, checkpoint=Path(kept) if kept else None, checkpoint_every=0.0
    )
    write_ranking(detect(engine, "steermoe-lab", pairs, behaviour, options=how), Path(out))
    print("RESULT" + json.dumps(said))
"""


@pytest.fixture(scope="module")
def whole(engines: Callable[..., Any]) -> Ranking:
    """In one process and at one go."""
    engine = engines(lab_checkpoint.NAME, {"count_groups": GROUPS}, enable_prefix_caching=False, dtype="float32")
    return detect(
        engine, lab_checkpoint.NAME, few("digits", PAIRS), BEHAVIOUR, options=DetectionOptions(permutations=20)
    )


def test_two_tensor_parallel_ranks_count_the_same(whole: Ranking, tmp_path: Path) -> None:
    out = tmp_path / "ranking.safetensors"
    run_alone(
        SCRIPT,
        json.dumps([str(out), None, PAIRS, GROUPS, {"tensor_parallel_size": 2}]),
        drop=["VLLM_ENABLE_V1_MULTIPROCESSING"],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    same(whole, read_ranking(out))


def test_a_process_killed_for_real_goes_on_where_it_was(whole: Ranking, tmp_path: Path) -> None:
    out, kept = tmp_path / "ranking.safetensors", tmp_path / "progress"
    arguments = json.dumps([str(out), str(kept), PAIRS, GROUPS, {}])
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    ) as victim:
        deadline = time.monotonic() + 300
        while not kept.exists() and victim.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL and kept.exists() and not out.exists()
    (said,) = run_alone(SCRIPT, arguments, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert f"of {PAIRS} pairs are counted" in said and " 0 of" not in said
    same(whole, read_ranking(out))
