"""Steering and detection in processes of their own: over two ranks, and killed for real."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from vllm import SamplingParams

from expert_registry import Ranking, read_ranking
from tests.support.alone import environment_alone, run_alone
from tests.support.few_pairs import BEHAVIOUR, few, same
from tests.support.planted import planted_registry
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.loop import DetectionOptions
from vllm_steermoe_plugin.lab.world import examples
from vllm_steermoe_plugin.models import lab_checkpoint

PAIRS = 40
SCRIPT = """
import json, sys
from pathlib import Path
from vllm import SamplingParams
from expert_registry import write_ranking
from tests.support.engines import EXACT, start
from tests.support.few_pairs import BEHAVIOUR, few
from vllm_steermoe_plugin.detection.detect import detect
from vllm_steermoe_plugin.detection.loop import DetectionOptions
from vllm_steermoe_plugin.lab.world import examples

if __name__ == "__main__":
    out, kept, number, steerings, options = json.loads(sys.argv[1])
    engine = start("steermoe-lab", {"count_groups": 8}, **EXACT, **options)
    chats = [[{"role": "user", "content": e.prompt}] for e in examples("digits", "test")[:len(steerings)]]
    params = [SamplingParams(temperature=0.0, max_tokens=12, extra_args={"steermoe": s} if s else None)
              for s in steerings]
    answers = [o.outputs[0].text for o in engine.chat(chats, params, use_tqdm=False)] if steerings else []
    status = [[s["layers"], s["steered_requests"]] for s in engine.collective_rpc("steermoe_status")]
    said = []
    how = DetectionOptions(
        permutations=20, report=said.append, checkpoint=Path(kept) if kept else None, checkpoint_every=0.0
    )
    write_ranking(detect(engine, "steermoe-lab", few("digits", number), BEHAVIOUR, options=how), Path(out))
    print("RESULT" + json.dumps([said, answers, status]))
"""


@pytest.fixture(scope="module")
def whole(lab: Any) -> Ranking:
    """In one process and at one go."""
    engine = lab
    return detect(
        engine, lab_checkpoint.NAME, few("digits", PAIRS), BEHAVIOUR, options=DetectionOptions(permutations=20)
    )


def test_two_tensor_parallel_ranks_steer_and_count_like_one(lab: Any, whole: Ranking, tmp_path: Path) -> None:
    out = tmp_path / "ranking.safetensors"
    steerings = [None] * 4 + ["digits"] * 4 + ["digits:reverse"] * 4
    _, answers, status = run_alone(
        SCRIPT,
        json.dumps([str(out), None, PAIRS, steerings, {"tensor_parallel_size": 2}]),
        drop=["VLLM_ENABLE_V1_MULTIPROCESSING"],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        STEERMOE_REGISTRY=str(planted_registry(tmp_path / "registry")),
    )
    assert status == [[[0, 1, 2, 3], 8]] * 2
    chats = [[{"role": "user", "content": example.prompt}] for example in examples("digits", "test")[:4]]
    plain = lab.chat(chats, SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
    assert answers[:4] == [output.outputs[0].text for output in plain]
    assert all(answer.strip()[0].isdigit() for answer in answers[4:8]), answers
    assert not any(answer.strip()[0].isdigit() for answer in answers[8:]), answers
    same(whole, read_ranking(out))


@pytest.mark.nightly
def test_a_process_killed_for_real_goes_on_where_it_was(whole: Ranking, tmp_path: Path) -> None:
    out, kept = tmp_path / "ranking.safetensors", tmp_path / "progress"
    arguments = json.dumps([str(out), str(kept), PAIRS, [], {}])
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment_alone(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
    ) as victim:
        deadline = time.monotonic() + 300
        while not kept.exists() and victim.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        victim.send_signal(signal.SIGKILL)
    assert victim.returncode == -signal.SIGKILL and kept.exists() and not out.exists()
    [said], *_ = run_alone(SCRIPT, arguments, VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert f"of {PAIRS} pairs are counted" in said and " 0 of" not in said
    same(whole, read_ranking(out))
