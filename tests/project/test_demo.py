"""`make demo`, shortened to two draws of random experts: it runs, and writes what other tools read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.folders import ROOT
from vllm_steermoe_plugin.lab.world import BEHAVIOURS

RATES = {"unsteered", "steered", "reversed", "random", "control_unsteered", "control_steered"}


@pytest.mark.engine
@pytest.mark.nightly
def test_the_demo_detects_serves_measures_and_writes_its_results(tmp_path: Path) -> None:
    # The demo sets its own environment; what the tests set for themselves must not help it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "STEERMOE_"))}
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--out", str(tmp_path), "--draws", "2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    written = json.loads((tmp_path / "demo.json").read_text())
    assert set(written["behaviours"]) == set(BEHAVIOURS)
    assert set(written["seconds"]) == {"detect and rank", "serve", "measure"} and written["versions"]["vllm"]
    for behaviour, found in written["behaviours"].items():
        assert set(found) >= RATES, behaviour
        for name in RATES:
            assert set(found[name]) == {"value", "low", "high", "n"}
            assert 0 <= found[name]["low"] <= found[name]["value"] <= found[name]["high"] <= 1
        assert found["steered"]["value"] >= found["unsteered"]["value"] + 0.2
        assert found["reversed"]["value"] <= found["unsteered"]["value"] - 0.2
        assert abs(found["control_steered"]["value"] - found["control_unsteered"]["value"]) <= 0.02
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    for behaviour in BEHAVIOURS:
        assert f"{behaviour}, over HTTP" in done.stdout
