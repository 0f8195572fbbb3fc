"""What commands refuse before they load a model or measure anything."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expert_registry.errors import ConfigurationError, UsageError
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.cli.inputs import json_object

EVALUATE = ("eval", "no/model", "--profiles", "none", "--tasks", "steermoe_lab_digits")
TUNE = ("tune", "steermoe-lab", "--behaviour", "digits", "--tasks", "steermoe_lab_digits")
COMPARE = ("compare", "no-run.json")


def error_of(*arguments: str) -> BaseException | None:
    return CliRunner().invoke(app, list(arguments)).exception


def test_plots_that_could_not_be_drawn_are_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (
        (*EVALUATE, "--out", "run.json", "--report", "report"),
        (*TUNE, "--behaviour", "singing", "--out", "tuned"),
        (*COMPARE, "--out", "report"),
    ):
        error = error_of(*command)
        assert isinstance(error, ConfigurationError) and "matplotlib" in str(error) and "[plot]" in str(error)
        other = error_of(*command, "--no-plot")
        assert other is not None and "matplotlib" not in str(other)


def test_a_place_that_cannot_be_written_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for command in ((*EVALUATE, "--out"), (*EVALUATE, "--out", "x", "--report"), (*TUNE, "--out"), (*COMPARE, "--out")):
        error = error_of(*command, "file/inside")
        assert isinstance(error, UsageError) and "cannot write file/inside" in str(error)


def test_what_is_no_json_object_is_named_by_its_option() -> None:
    for text in ("{", "[1]", "3", "[" * 100_000):
        with pytest.raises(UsageError, match="--metadata"):
            json_object(text, "--metadata")
    assert json_object(json.dumps({"a": 1})) == {"a": 1}
