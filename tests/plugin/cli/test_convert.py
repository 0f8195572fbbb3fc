"""`steermoe convert`: each format to each other on the command line, what it writes and where, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from expert_registry.errors import FileError, ProfileError, RequestError, SteerMoEError, UsageError
from expert_registry.registry import publish
from tests.support.made_rankings import make_ranking
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.models.lab_checkpoint import NAME
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.strength import bias_experts

RUN = CliRunner()
MODEL = "org/Tiny-MoE"
SOFT = {"layer_configs": {"1": {"mode": "soft", "expert_ids": [2, 0], "lambda": 0.5}}}
FORCED = {"layer_configs": {"3": {"mode": "activate", "expert_ids": [1], "deactivate_ids": [5]}}}


@pytest.fixture(autouse=True)
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder but for inputs; the user's registry has a ranking of a model with layers 0, 1 and 3."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEERMOE_REGISTRY", str(tmp_path / "mine"))
    publish(make_ranking(1), tmp_path / "mine")
    Path("soft.json").write_text(json.dumps(SOFT))
    Path("forced.json").write_text(json.dumps(FORCED))
    Path("profile.json").write_text('{"bias": {"0": {"1": 0.5, "2": 0.25}}}')
    np.save("mask.npy", np.array([[0, 0.05, -0.5], [2, 0, 0], [0, 0, 0.1]], np.float32))
    values = np.zeros((43, 256), "<f4")
    values[7, :7] = 1
    Path("signs.bin").write_bytes(values.tobytes())


def convert(*arguments: object) -> Result:
    return RUN.invoke(app, ["convert", *(str(argument) for argument in arguments)])


def converted(*arguments: object) -> SteeringProfile:
    done = convert(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return SteeringProfile.from_json(done.stdout)


def test_easysteers_file_becomes_a_profile_and_is_written_again() -> None:
    profile = converted("soft.json", "--from", "easysteer", "--experts", 6)
    assert profile.bias == SteeringProfile(bias=((1, 0, 0.5 * (6 / 5) ** 0.5), (1, 2, 0.5 * (6 / 5) ** 0.5))).bias
    assert converted("soft.json", "--from", "easysteer", "--model", MODEL) == profile
    done = convert("soft.json", "--from", "easysteer", "--experts", 6, "--to", "easysteer", "--out", "again.json")
    assert done.stdout == "" and done.stderr == ""
    assert converted("again.json", "--from", "easysteer", "--experts", 6) == profile
    done = convert("forced.json", "--from", "easysteer", "--experts", 6)
    assert "log-softmax" in done.stderr and json.loads(done.stdout)["deactivate"] == {"3": [5]}


def test_a_matrix_becomes_biases_of_the_layers_that_its_rows_are() -> None:
    found = converted("mask.npy", "--from", "matrix", "--layers", "1-2,9", "--strength", -2, "--threshold", 0.1)
    assert found.bias == ((1, 2, 1.0), (2, 0, -4.0))
    save_file({"S": np.eye(3, 6)}, "mask.safetensors")
    found = converted("mask.safetensors", "--from", "matrix", "--model", MODEL)
    assert found.bias == ((0, 0, 1.0), (1, 1, 1.0), (3, 2, 1.0))


def test_a_request_is_resolved_by_the_registry() -> None:
    expected = bias_experts(make_ranking(1), 0.5, top=2)
    assert converted("digits:strength=0.5:top=2", "--from", "request", "--model", MODEL) == expected
    done = convert("digits@2:strength=0.5:by=sign:top=2", "--from", "request", "--model", NAME, "--to", "easysteer")
    assert json.loads(done.stdout)["layer_configs"]["1"]["expert_ids"] == [7, 8]


def test_signs_become_forced_experts_and_only_a_model_bounds_them() -> None:
    assert converted("signs.bin", "--from", "ds4-signs").activate == {(7, expert) for expert in range(7)}


def test_a_file_is_replaced_only_when_told() -> None:
    ask = ("profile.json", "--from", "profile", "--out", "out.json")
    assert convert(*ask).exit_code == 0 and json.loads(Path("out.json").read_text())["bias"] == {
        "0": {"1": 0.5, "2": 0.25}
    }
    assert isinstance(convert(*ask).exception, UsageError)
    assert convert(*ask, "--overwrite").exit_code == 0


REFUSED: list[tuple[tuple[object, ...], type[SteerMoEError], str]] = [
    (("soft.json", "--from", "easysteer"), UsageError, "--experts or --model"),
    (("soft.json", "--from", "easy"), UsageError, "did you mean 'easysteer'"),
    (("profile.json", "--from", "profile", "--to", "matrix"), UsageError, "unknown format to convert to"),
    (
        ("profile.json", "--from", "profile", "--to", "easysteer", "--experts", 6),
        ProfileError,
        "layer 0 has 2 different",
    ),
    (("profile.json", "--from", "profile", "--to", "easysteer"), UsageError, "--experts or --model"),
    (("profile.json", "--from", "profile", "--model", "no/body"), UsageError, "0 shapes in its 0 rankings"),
    (("soft.json", "--from", "profile"), RequestError, "unknown key 'layer_configs'"),
    (("profile.json", "--from", "easysteer", "--experts", 6), UsageError, "layer_configs"),
    (("soft.json", "--from", "easysteer", "--model", MODEL, "--experts", 8), UsageError, "6 experts in a layer, not 8"),
    (("forced.json", "--from", "easysteer", "--experts", 5), UsageError, "not one of 5 experts"),
    (("mask.npy", "--from", "matrix"), UsageError, "--layers or --model"),
    (("mask.npy", "--from", "matrix", "--model", MODEL), UsageError, "3 experts in a layer, not 6"),
    (("mask.npy", "--from", "matrix", "--layers", "1-3", "--experts", 4), UsageError, "3 experts in a layer, not 4"),
    (("mask.npy", "--from", "matrix", "--layers", "1-2"), UsageError, "3 rows, but 2 layers"),
    (("mask.npy", "--from", "matrix", "--layers", "1-3", "--strength", 1e-9), UsageError, "steer nothing"),
    (("soft.json", "--from", "easysteer", "--experts", 6, "--threshold", 0), UsageError, "are about a matrix"),
    (("signs.bin", "--from", "ds4-signs", "--experts", 6), UsageError, "256 experts in a layer, not 6"),
    (("signs.bin", "--from", "ds4-signs", "--model", NAME), UsageError, "256 experts in a layer, not 24"),
    (("soft.json", "--from", "ds4-signs"), UsageError, "take 44032"),
    (("digits", "--from", "request"), UsageError, "converted with --model"),
    (("@terse", "--from", "request", "--model", MODEL), UsageError, "only a server knows"),
    (("none", "--from", "request", "--model", MODEL), UsageError, "steers nothing"),
    (("digits:strength=0", "--from", "request", "--model", MODEL), UsageError, "steers nothing"),
    (("none.json", "--from", "profile"), FileError, "cannot read"),
    ((".", "--from", "easysteer", "--experts", 6), FileError, "cannot read"),
]


def test_what_cannot_be_converted_is_refused_and_nothing_is_written() -> None:
    def run(arguments: tuple[object, ...]) -> None:
        done = convert(*arguments, "--out", "out.json")
        assert done.exit_code == 1 and done.exception is not None, done.output
        raise done.exception

    assert not_refused(run, REFUSED) == [] and not Path("out.json").exists()


def test_a_layer_that_is_not_the_models_is_refused() -> None:
    Path("elsewhere.json").write_text('{"bias": {"2": {"1": 0.5}}}')
    assert "layer 2 has no routed experts" in str(
        convert("elsewhere.json", "--from", "profile", "--model", MODEL).exception
    )
