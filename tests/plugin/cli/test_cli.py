"""The `steermoe` command: machine-readable output, and errors as one line with exit status 1."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expert_registry import read_ranking, write_ranking
from expert_registry.errors import ConfigurationError, EngineError, UsageError
from tests.support.folders import ROOT
from tests.support.loopback import Loopback
from tests.support.planted import VERSION, planted_ranking, planted_registry
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.cli.profiles import KEY_VARIABLE, call
from vllm_steermoe_plugin.cli.serve import profiles_of, serve_arguments
from vllm_steermoe_plugin.lab.world import BEHAVIOURS
from vllm_steermoe_plugin.models import lab_checkpoint

RUN = CliRunner()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = planted_registry(tmp_path / "registry")
    monkeypatch.setenv("STEERMOE_REGISTRY", str(folder))
    return folder


def steermoe(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vllm_steermoe_plugin", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_version() -> None:
    assert RUN.invoke(app, ["--version"]).stdout.strip() == importlib.metadata.version("vllm-steermoe-plugin")


def test_registry_list_names_every_ranking(registry: Path) -> None:
    rows = json.loads(RUN.invoke(app, ["registry", "list", "--json"]).stdout)
    assert {(row["model"], row["behaviour"]) for row in rows} >= {
        (lab_checkpoint.NAME, behaviour) for behaviour in BEHAVIOURS
    }
    assert "digits" in RUN.invoke(app, ["registry", "list"]).stdout


def test_registry_show_gives_the_top_experts(registry: Path) -> None:
    answer = json.loads(RUN.invoke(app, ["registry", "show", lab_checkpoint.NAME, "digits", "--json"]).stdout)
    expected = [list(expert) for expert in planted_ranking("digits").experts()[:20]]
    assert answer["experts"] == expected
    assert answer["card"]["behaviour"] == "digits" and len(answer["sha256"]) == 64
    assert "accepted" in answer["trace"][0]
    assert "risk difference" in RUN.invoke(app, ["registry", "show", lab_checkpoint.NAME, f"digits@{VERSION}"]).stdout


def test_doctor_reports_the_lab_model(registry: Path) -> None:
    result = RUN.invoke(app, ["doctor", lab_checkpoint.NAME, "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["problems"] == []
    assert report["layers_bound"] == 4 and set(report["behaviours"]) == set(BEHAVIOURS)
    assert "OlmoeForCausalLM" in report["architectures"]


def test_doctor_notices_that_the_plugin_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    result = RUN.invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    assert "VLLM_PLUGINS" in json.loads(result.stdout)["problems"][0]


def test_doctor_notices_that_vllm_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What we read of a configuration is gone, or a method that is to be wrapped."""
    from vllm.config import ModelConfig
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin

    for place, name, what in (
        (ModelConfig, "get_layers_start_end_indices", "vllm.config:ModelConfig of vLLM"),
        (BeamSearchOfflineMixin, "beam_search", "BeamSearchOfflineMixin.beam_search"),
    ):
        with monkeypatch.context() as without:
            without.delattr(place, name)
            result = RUN.invoke(app, ["doctor", "--json"])
            problems = json.loads(result.stdout)["problems"]
            assert result.exit_code == 1 and what in problems[0] and name in problems[0]


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    write_ranking(planted_ranking("refusal"), path)
    out = tmp_path / "r.png"
    assert RUN.invoke(app, ["plot", str(path), str(path), "--out", str(out)]).exit_code == 0
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000


def test_errors_are_one_line_and_status_1(registry: Path) -> None:
    done = steermoe("registry", "show", "nobody/nothing", "digits")
    assert done.returncode == 1
    assert "unknown model" in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    rows = [
        (("registry", "show", lab_checkpoint.NAME, "digit"), "did you mean 'digits'"),
        (("registry", "show", lab_checkpoint.NAME, "digits@9"), "digits@9"),
        (("registry", "show", lab_checkpoint.NAME, "digits@x"), "a version is a number"),
        (("detect", "--out", "x"), "either --pairs FILE or --recipe NAME"),
        (("detect", "--out", "x", "--model", "some/model", "--recipe", "refusal"), "invented world"),
        (("detect", "--out", "x", "--recipe", "singing"), "unknown recipe 'singing'"),
        (("detect", "--out", "x", "--pairs", "missing.jsonl", "--behaviour", "b"), "cannot read missing.jsonl"),
        (("plot", str(ROOT / "pyproject.toml")), "not a ranking file"),
    ]
    assert not_refused(lambda arguments: RUN.invoke(app, arguments, catch_exceptions=False), rows) == []


@pytest.mark.engine
def test_detect_writes_a_ranking(tmp_path: Path) -> None:
    out = tmp_path / "digits.safetensors"
    done = steermoe("detect", "--recipe", "digits", "--out", str(out), "--seed", "3")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "risk difference" in done.stdout
    assert read_ranking(out).card.data.name.endswith("seed 3")
    assert list(tmp_path.iterdir()) == [out], "the file of progress is removed once the ranking is written"
    again = steermoe("detect", "--recipe", "digits", "--out", str(out))
    assert again.returncode == 1 and again.stderr.startswith("steermoe: error [STEERMOE-E201]: ")
    assert "immutable" in " ".join(again.stderr.split())


def test_a_model_that_is_no_mixture_is_refused_before_its_weights_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}')
    (tmp_path / "pairs.jsonl").write_text('{"text_1": "2 3", "text_2": "two three"}\n')
    pairs = ("--pairs", str(tmp_path / "pairs.jsonl"), "--behaviour", "b")
    done = steermoe("detect", "--model", str(tmp_path), *pairs, "--out", str(tmp_path / "x"))
    assert done.returncode == 1 and "LlamaForCausalLM" in done.stderr and "vllm" not in done.stderr


def test_the_operators_key_does_not_follow_a_redirection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k" * 20)
    with Loopback({"/steermoe/profiles": b"{}"}) as elsewhere:

        def redirect(request: BaseHTTPRequestHandler, data: bytes | None) -> bool:
            request.send_response(302)
            request.send_header("Location", elsewhere.url + "steermoe/profiles")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return True

        with Loopback({}, redirect) as server, pytest.raises(EngineError, match="status 302"):
            call(server.url, "GET", "profiles")
        assert not elsewhere.requests


def test_serve_resolves_the_lab_model() -> None:
    arguments = serve_arguments(lab_checkpoint.NAME)
    assert arguments[0] == str(lab_checkpoint.MODEL_DIR) and arguments[1:3] == [
        "--served-model-name",
        lab_checkpoint.NAME,
    ]
    assert serve_arguments("some/model") == ["some/model", "--served-model-name", "some/model"]


def test_serve_hands_profiles_and_who_manages_them_to_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: started.append(command))
    # Set, so that it is put back; then unset, as it usually is.
    monkeypatch.setenv("VLLM_PLUGINS", "steermoe")
    monkeypatch.delenv("VLLM_PLUGINS")
    store = tmp_path / "profiles.json"
    options = ["--profile", "terse=digits:activate=4", "--profile", "house=refusal", "--default", "@house"]
    managed = ["--manage", "env:NAME", "--profile-store", str(store)]
    for more in ([], managed):
        result = RUN.invoke(app, ["serve", lab_checkpoint.NAME, *options, *more, "--api-server-count", "2"])
        assert result.exit_code == 0, result.output
    settings = [json.loads(command[command.index("--additional-config") + 1])["steermoe"] for command in started]
    expected = {"profiles": {"terse": "digits:activate=4", "house": "refusal"}, "default": "@house"}
    assert settings == [expected, expected | {"manage": "env:NAME", "profile_store": str(store)}]
    assert all(command[-4:-2] == ["--api-server-count", "2"] for command in started)
    assert "steermoe" in os.environ["VLLM_PLUGINS"].split(",")


def test_a_profile_option_is_a_name_and_a_text_and_settings_that_are_none_stop_serve() -> None:
    for options in (["terse"], ["a=digits", "a=refusal"]):
        with pytest.raises(UsageError, match="NAME=TEXT"):
            profiles_of(options)
    for option, words in (("--manage=secret", "manage"), ("--profile=Terse=digits", "profiles")):
        with pytest.raises(ConfigurationError, match=words):
            RUN.invoke(app, ["serve", lab_checkpoint.NAME, option], catch_exceptions=False)
