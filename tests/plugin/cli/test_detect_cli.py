"""`steermoe detect` without an engine: what is refused before one starts, and what is printed of a ranking."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from expert_registry.errors import UsageError
from tests.registry.test_statistics import ranking_of, routed, summed
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.cli.detect import _name_of
from vllm_steermoe_plugin.cli.detection_summary import print_summary
from vllm_steermoe_plugin.detection.card import check_described
from vllm_steermoe_plugin.detection.recipes.lab import lab_recipe
from vllm_steermoe_plugin.models import lab_checkpoint


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"text_1": "2 3", "text_2": "two three"}))
    return str(path)


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the engine starts")

    monkeypatch.setattr("vllm_steermoe_plugin.engine.start_engine", start)


def detect(*arguments: str) -> BaseException:
    found = CliRunner().invoke(app, ["detect", *arguments]).exception
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--behaviour", "Terse Answers"), "cannot hold behaviour 'Terse Answers'"),
        (("--behaviour", "none"), "'none' is reserved"),
        (("--behaviour", "b", "--model-id", "/models/mine"), "cannot hold the model's name '/models/mine'"),
        (("--behaviour", "b", "--sides", "x" * 5000, "y"), "cannot hold sides.0"),
        (("--behaviour", "b", "--data-file", "rows"), "--data-file holds the rows of a --recipe"),
        ((), "--pairs needs --behaviour"),
    ],
)
def test_what_could_not_be_written_is_refused_before_the_engine_starts(
    arguments: tuple[str, ...], reason: str, pairs: str, tmp_path: Path
) -> None:
    error = detect("--pairs", pairs, "--out", str(tmp_path / "out"), *arguments)
    assert isinstance(error, UsageError) and reason in str(error)


def test_pairs_and_notes_that_no_card_holds_are_refused_before_the_engine_starts() -> None:
    pairs, behaviour = lab_recipe(lab_checkpoint.NAME, "digits")
    check_described("a/model", behaviour, pairs)
    for some, about, field in (
        (replace(pairs, name="a\udcff.jsonl"), behaviour, "name"),
        (replace(pairs, name="x" * 5000), behaviour, "name"),
        (replace(pairs, name="two\nlines.jsonl"), behaviour, "name"),
        (pairs, replace(behaviour, note="x" * 3900), "note"),
        (pairs, replace(behaviour, sides=("🤖" * 2500,) * 2), "what describes digits: the card would take"),
    ):
        with pytest.raises(UsageError, match=f"cannot hold {field}"):
            check_described("a/model", about, some)


def test_a_file_that_could_not_be_written_is_refused_before_the_engine_starts(pairs: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x", tmp_path):
        error = detect("--pairs", pairs, "--behaviour", "b", "--overwrite", "--out", str(out))
        assert isinstance(error, UsageError) and f"cannot write {out}" in str(error)


def test_one_file_is_not_taken_for_two_things(pairs: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for arguments in (
        ("--pairs", pairs, "--out", out, "--checkpoint", out),
        ("--pairs", pairs, "--out", pairs, "--overwrite"),
        ("--pairs", pairs, "--out", out, "--checkpoint", str(tmp_path / ".." / tmp_path.name / Path(pairs).name)),
        ("--recipe", "digits", "--data-file", pairs, "--out", pairs, "--overwrite"),
    ):
        error = detect(*arguments)
        assert isinstance(error, UsageError) and "must be different files" in str(error)


def test_what_a_recipe_says_itself_is_refused(tmp_path: Path) -> None:
    given = ("--behaviour", "b", "--count", "all", "--activate", "3", "--safety")
    error = detect("--recipe", "digits", "--out", str(tmp_path / "out"), *given)
    assert "--behaviour, --count, --activate, --safety would" in str(error)


def test_what_is_right_starts_the_engine(pairs: str, tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "new" / "out"))
    assert str(detect("--pairs", pairs, "--behaviour", "b", "--sides", "a", "b", *out)) == "the engine starts"
    assert str(detect("--recipe", "digits", *out)) == "the engine starts"


def test_a_folder_is_known_by_the_name_that_it_bears(tmp_path: Path) -> None:
    assert _name_of(lab_checkpoint.NAME) == _name_of(str(lab_checkpoint.MODEL_DIR)) == lab_checkpoint.NAME
    assert _name_of("owner/name") == "owner/name"
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert _name_of(str(cached)) == "owner/name"
    with pytest.raises(UsageError, match="give one by --model-id"):
        _name_of(str(tmp_path))


def printed(capsys: pytest.CaptureFixture[str], examples: int, permutations: int, pairs: int = 0) -> tuple[str, str]:
    counts, clusters = summed(*routed(4, examples, effect=2.0), permutations=permutations)
    ranking = ranking_of(counts, clusters)
    data = ranking.card.data.model_copy(update={"pairs": pairs or examples})
    print_summary(replace(ranking, card=ranking.card.model_copy(update={"data": data})))
    found = capsys.readouterr()
    assert "nan" not in found.out + found.err
    return found.out, found.err


def test_the_summary_says_what_its_numbers_are(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, 60, 99)
    assert (
        "95 % intervals by pair; q: false-discovery rate among all 10 experts; p of 99 permutations "
        "(in brackets family-wise, among all)"
    ) in out
    first = out.splitlines()[1]
    assert first.split()[:4] == ["layer", "1", "expert", "0"] and "  p 0.010 (0.010)  log-odds +" in first
    assert "effective sample size" in out and "(halves of the pairs)" in out
    out, _ = printed(capsys, 60, 99, pairs=300)
    assert "intervals by cluster (60 of 300 pairs); q" in out and "(halves of the clusters)" in out


def test_few_clusters_are_cautioned_about_and_not_turned_into_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, 29, 99, pairs=300)
    assert "effective sample size" not in out and "only 29 clusters:" in err
    assert "  p " in out and "[" in out
    out, err = printed(capsys, 30, 99, pairs=300)
    assert "effective sample size" in out and "only" not in err


def test_a_ranking_of_before_has_the_p_values_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    counts, clusters = summed(*routed(4, 60, effect=2.0), permutations=99)
    print_summary(ranking_of(counts, replace(clusters, exceeded_by_any=None)))
    out = capsys.readouterr().out
    assert "family-wise" not in out and "  p 0.010  log-odds" in out


def test_the_summary_leaves_out_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, 60, 0)
    assert "  p " not in out and "  q " in out
    out, err = printed(capsys, 1, 99)
    assert "only 1 pair:" in err and "  q " not in out and "  p " not in out and "halves" not in out


def test_no_interval_of_no_width_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    selections = np.zeros((40, 2, 2, 5), dtype=np.int64)
    selections[:, 0, :, :2] = 3
    selections[:, 1, :, 2:4] = 3
    print_summary(ranking_of(*summed(selections, np.full((40, 2), 3), permutations=9)))
    assert capsys.readouterr().out.count("+1.000  [zero variance]  q ") == 4
