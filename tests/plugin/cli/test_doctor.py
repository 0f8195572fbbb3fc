"""`steermoe doctor`: what can be steered here, what cannot and why, and a model as vLLM reads its config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from expert_registry.errors import ConfigurationError, UnsupportedModelError
from tests.support import runners, tiny
from tests.support.dummies import write_config
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.cli.doctor import examine_kernels, runner
from vllm_steermoe_plugin.compat import versions
from vllm_steermoe_plugin.compat.symbols import config as symbols
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.architectures import ARCHITECTURES
from vllm_steermoe_plugin.models.unsupported import REFUSED
from vllm_steermoe_plugin.worker.kernels import tiers

RUN = CliRunner()


def report(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = RUN.invoke(app, ["doctor", *arguments, "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_without_a_model_it_lists_what_can_be_steered_and_what_cannot() -> None:
    code, found = report()
    assert code == 0 and found["problems"] == []
    assert found["architectures"].keys() == ARCHITECTURES.keys() and found["refused"] == REFUSED
    assert found["architectures"]["Qwen3VLMoeForConditionalGeneration"]["language_model"] == "Qwen3MoeForCausalLM"
    assert "mova_num_experts" in found["architectures"]["K2HorizonForCausalLM"]["condition"]
    assert found["versions"]["vllm"].startswith("0.")
    assert found["routers"]["softmax"] == "gate" and found["routers"]["sigmoid + bias"] == "selection"


def test_people_read_names_and_reasons() -> None:
    text = RUN.invoke(app, ["doctor"]).stdout
    for line in (
        "OlmoeForCausalLM*",
        "JambaForCausalLM\n",
        "several of its layers share one router:\n    InternS2Mobius",
        "runner  ",
    ):
        assert line in text, line
    assert all(name in text for name in (*ARCHITECTURES, *REFUSED))
    about_one = RUN.invoke(app, ["doctor", lab_checkpoint.NAME, "--no-kernels"]).stdout
    assert "layers_bound     4" in about_one and "Aria" not in about_one


@pytest.mark.engine
def test_it_says_which_kernels_vllm_would_choose_here() -> None:
    code, found = report(lab_checkpoint.NAME)
    assert code == 0, found["problems"]
    (row,) = found["kernels"]
    assert row["layers"] == [0, 1, 2, 3] and not row["selects_inside"]
    assert (row["gate"], row["router"]) == (["linear"], "softmax, renormalized") and "CPU" in row["experts"]
    text = " ".join(RUN.invoke(app, ["doctor", lab_checkpoint.NAME]).stdout.split())
    assert "router layers 0, 1, 2, 3: softmax, renormalized; the logits are rewritten at the gate" in text
    assert "kernels gate by linear; " in text


@pytest.mark.engine
def test_it_says_what_a_router_does_that_has_to_be_corrected_and_what_stands_in_the_way(tmp_path: Path) -> None:
    code, found = report(str(write_config("Glm4MoeForCausalLM/groups", tmp_path / "glm")))
    assert code == 0, found["problems"]
    (row,) = found["kernels"]
    assert row["router"] == "sigmoid + bias, 2 of 4 groups, renormalized" and "selection is corrected" in row["steered"]
    code, found = report(str(write_config("Step3p5ForCausalLM", tmp_path / "step")))
    assert code == 1 and "selects by a sigmoid only with use_grouped_topk" in found["problems"][0]


def test_on_another_card_a_gate_has_other_ways() -> None:
    class Hopper:
        def __getattr__(self, name: str) -> bool:
            return name in ("allow_cublas_router_gemm", "allow_ll_bf16_gemm")

    assert tiers(Hopper()) == ["ll_bf16_gemm", "cublas_router_gemm", "linear"]
    assert tiers(None) == []


def test_kernels_of_no_model_or_of_one_that_cannot_be_built_are_a_problem(tmp_path: Path) -> None:
    code, found = report("--kernels")
    assert code == 1 and "--kernels needs a MODEL" in found["problems"][0]
    with pytest.raises(UnsupportedModelError, match=r"cannot build .*nothing-there"):
        examine_kernels(str(tmp_path / "nothing-there"), {})


@pytest.mark.parametrize(("version", "says"), [("0.33.0+cpu", "V2 and V1"), ("0.33.1", "table alone")])
def test_it_says_what_the_tests_run(version: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "vllm_version", lambda: version)
    assert says in report()[1]["tested"]


@pytest.mark.usefixtures("live_environment")
def test_it_says_which_model_runner_is_live_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    if runners.V2:
        assert runner(None).startswith("V2") and "vLLM's default here" in runner(None)
        return
    # vLLM's CPU build runs without Triton.
    assert runner(None).startswith("V1") and "Triton" in runner(None)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert runner(None).startswith("V1") and "VLLM_USE_V2_MODEL_RUNNER=0" in runner(None)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ConfigurationError, match="V2 requires Triton"):
        runner(None)


@pytest.mark.parametrize(
    ("is_v2", "triton", "asked", "says"),
    [
        (True, True, None, r"V2.*vLLM's default here"),
        (True, True, "1", r"V2.*VLLM_USE_V2_MODEL_RUNNER=1"),
        (False, True, None, r"V1.*V2 does not support a feature"),
        (False, False, None, r"V1.*V2 needs Triton"),
    ],
)
def test_the_runner_elsewhere(
    is_v2: bool, triton: bool, asked: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def internal(value: Any) -> SimpleNamespace:
        return SimpleNamespace(load=lambda: value)

    monkeypatch.setattr(symbols, "VLLM_CONFIG", internal(lambda: SimpleNamespace(use_v2_model_runner=is_v2)))
    monkeypatch.setattr(symbols, "HAS_TRITON", internal(triton))
    monkeypatch.setattr(symbols, "V2_MISSING", internal(lambda config: ["a feature"]))
    if asked is None:
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    else:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", asked)
    assert re.match(says, runner(None))


def test_a_hybrid_is_told_from_its_config_alone(tmp_path: Path) -> None:
    code, found = report(str(write_config("GraniteMoeHybridForCausalLM", tmp_path)), "--no-kernels")
    assert code == 0 and found["problems"] == []
    assert found["runs_as"] == "GraniteMoeHybridForCausalLM"
    assert (found["layers_bound"], found["layers"]) == (3, [0, 1, 2]) and "8 experts, top-2" in found["shape"]


def test_a_config_that_cannot_be_steered_is_told_with_the_reason(tmp_path: Path) -> None:
    config = json.loads((lab_checkpoint.MODEL_DIR / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"mlp_only_layers": [0, 1, 2, 3]}))
    code, found = report(str(tmp_path), "--no-kernels")
    assert code == 1 and found["runs_as"] == "Qwen3MoeForCausalLM" and "layers_bound" not in found
    reason = "this Qwen3MoeForCausalLM cannot be steered: none of its layers has routed experts"
    assert found["problems"] == [f"[STEERMOE-E302] {reason}"]


def test_a_model_of_the_transformers_backend_is_refused_with_the_way_out(tmp_path: Path) -> None:
    config = tiny.CONFIGS["PhiMoEForCausalLM"]()
    config.architectures = ["PhimoeForCausalLM"]
    config.save_pretrained(tmp_path)
    code, found = report(str(tmp_path), "--no-kernels")
    assert code == 1 and found["runs_as"] == "TransformersMoEForCausalLM"
    assert "transformers' own code routes" in found["problems"][0] and "--hf-overrides" in found["problems"][0]


def test_a_model_that_is_not_here_is_named(tmp_path: Path) -> None:
    code, found = report(str(tmp_path / "nothing"), "--no-kernels")
    assert code == 1 and str(tmp_path / "nothing") in found["problems"][0] and "versions" in found
