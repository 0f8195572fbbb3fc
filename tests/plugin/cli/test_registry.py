"""`steermoe registry`: every sub-command, by what it prints, stores and refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner, Result

from expert_registry import Ranking, Recommended, Registry, read_ranking, write_ranking
from expert_registry.errors import (
    FileError,
    PolicyError,
    ProfileError,
    RankingFormatError,
    RequestError,
    SteerMoEError,
    UnknownRankingError,
    UsageError,
)
from expert_registry.format import CARD_KEY, dump_ranking
from expert_registry.registry import publish
from expert_registry.revision import revise
from expert_registry.weights import weigh
from tests.support.folders import RELEASED_DATA as DATA
from tests.support.loopback import Loopback
from tests.support.made_rankings import make_ranking, with_weights
from tests.support.refusals import not_refused
from tests.support.released import LICENSE, MODEL, index_of
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.steering.profile import SteeringProfile
from vllm_steermoe_plugin.steering.strength import bias_experts

RUN = CliRunner()
RANKING = make_ranking(7, layers=(0, 1, 2))
TABLES = {"safety": (DATA / "released-11-columns.pkl").read_bytes()}


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder with two versions of a ranking; the working directory is empty."""
    folder = tmp_path / "mine"
    for version in (1, 2):
        publish(make_ranking(version, version=version), folder)
    monkeypatch.setenv("STEERMOE_REGISTRY", str(folder))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return folder


def registry(*arguments: object) -> Result:
    return RUN.invoke(app, ["registry", *(str(argument) for argument in arguments)], env={"COLUMNS": "250"})


def fine(*arguments: object) -> str:
    done = registry(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def refused(error: type[SteerMoEError], *arguments: object) -> str:
    done = registry(*arguments)
    assert done.exit_code == 1 and isinstance(done.exception, error), (done.output, done.exception)
    return str(done.exception)


def test_list_shows_mine_and_bundled_and_marks_what_is_bad(mine: Path) -> None:
    (mine / "org--tiny-moe" / "digits" / "v1.safetensors").write_bytes(b"x")
    (mine / "org--tiny-moe" / "digits" / "status.json").write_text('{"withdrawn": {"2": {"reason": "noisy"}}}')
    rows = json.loads(fine("list", "--json"))
    assert [row["status"][:16] for row in rows[:2]] == ["damaged: " + str(mine)[:7], "withdrawn: noisy"]
    assert {row["model"] for row in rows} >= {lab_checkpoint.NAME, MODEL}
    assert "withdrawn: noisy" in fine("list")


def test_a_foreign_card_cannot_write_to_the_terminal(mine: Path) -> None:
    path = mine / "org--tiny-moe" / "digits" / "v2.safetensors"
    ranking = read_ranking(path)
    hostile = json.dumps(ranking.card.model_dump(mode="json") | {"note": "\x1b]0;mine\x07", "source": None})
    tensors = {name: getattr(ranking.counts, name) for name in ("activations_1", "activations_2", "tokens", "layers")}
    path.write_bytes(save(tensors, metadata={CARD_KEY: hostile}))
    assert "control character U+001B" in refused(RankingFormatError, "show", MODEL, "digits@2")
    assert any("control character U+001B" in row["status"] for row in json.loads(fine("list", "--json")))
    assert "\x1b]" not in fine("list")


def test_list_shows_what_can_be_pulled(mine: Path) -> None:
    rows = json.loads(fine("list", "--pullable", "--json"))
    assert len(rows) == 12 and all(len(row["sha256"]) == 64 and row["repository"] for row in rows)
    assert "Qwen/Qwen3-30B-A3B" in fine("list", "--pullable")


def test_show_takes_aliases_versions_folders_and_pins(mine: Path) -> None:
    first = json.loads(fine("show", "ORG/tiny-moe", "digits@1", "--json"))
    assert first["card"]["version"] == 1 and "rejected" in first["trace"][0]
    assert json.loads(fine("show", MODEL, "digits@latest", "--json"))["card"]["version"] == 2
    assert json.loads(fine("show", MODEL, "digits", "--sha256", first["sha256"], "--json"))["card"]["version"] == 1
    assert json.loads(fine("show", "me/tuned", "digits", "--base-model", MODEL, "--json"))["card"]["version"] == 2
    assert (
        json.loads(fine("show", lab_checkpoint.MODEL_DIR, "digits", "--json"))["card"]["model"]["id"]
        == lab_checkpoint.NAME
    )
    assert "revision" in fine("show", MODEL, "digits", "--revision", "abc")
    assert "a version is a number" in refused(UnknownRankingError, "show", MODEL, "digits@first")


def test_verify_finds_the_damaged_the_misplaced_and_the_unlocked(mine: Path) -> None:
    assert "BAD" not in fine("verify")
    fine("lock", f"{MODEL}/digits")
    assert "BAD" not in fine("verify", "--locked", "steermoe.lock")
    place = mine / "org--tiny-moe" / "digits"
    (place / "v2.safetensors").unlink()
    publish(make_ranking(99, version=2), mine)
    done = registry("verify", MODEL, "--locked", "steermoe.lock")
    assert done.exit_code == 1 and "BAD   org--tiny-moe/digits@2" in done.stdout and "the lock file pins" in done.stdout
    (place / "v2.safetensors").write_bytes((place / "v1.safetensors").read_bytes())
    (place / "v1.safetensors").write_bytes(b"junk")
    done = registry("verify", MODEL, "digits", "--json")
    problems = [row["problem"] for row in json.loads(done.stdout)]
    assert done.exit_code == 1 and "not a ranking file" in problems[0] and "in the wrong place" in problems[1]
    for path in place.iterdir():
        path.unlink()
    assert "locked, but not there" in registry("verify", "--locked", "steermoe.lock").stdout


def test_lock_pins_and_the_lock_is_obeyed(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = json.loads(fine("lock", f"{MODEL}/digits@1", "--json"))
    assert pins["org--tiny-moe/digits"]["version"] == 1
    assert json.loads(Path("steermoe.lock").read_text())["rankings"] == pins
    assert json.loads(fine("show", MODEL, "digits", "--locked", "steermoe.lock", "--json"))["card"]["version"] == 1
    monkeypatch.setenv("STEERMOE_LOCK", "steermoe.lock")
    assert json.loads(fine("show", MODEL, "digits", "--json"))["card"]["version"] == 1
    assert "not in the lock file" in refused(UnknownRankingError, "show", lab_checkpoint.NAME, "digits")
    assert len(json.loads(fine("lock", "--out", "all.lock", "--json"))) == 4
    assert "only what is in a registry" in refused(
        UsageError, "lock", mine / "org--tiny-moe" / "digits" / "v1.safetensors"
    )


def test_diff_says_what_changed(mine: Path) -> None:
    assert "identical" in fine("diff", f"{MODEL}/digits@1", mine / "org--tiny-moe/digits/v1.safetensors")
    text = fine("diff", f"{MODEL}/digits@1", f"{MODEL}/digits@2", "--top", "5")
    assert "version\n  - 1\n  + 2" in text and "of the first 5 experts" in text and "largest change" in text
    report = json.loads(fine("diff", f"{MODEL}/digits", f"{lab_checkpoint.NAME}/digits", "--json"))
    assert report["shared"] is None and not report["identical"] and "num_experts" in report["card"]
    assert "cannot be compared" in fine("diff", f"{MODEL}/digits", f"{lab_checkpoint.NAME}/digits")


def test_export_and_add_move_a_ranking_without_changing_it(mine: Path) -> None:
    fine("export", MODEL, "digits@1", "--out", "one.safetensors")
    original = mine / "org--tiny-moe" / "digits" / "v1.safetensors"
    assert Path("one.safetensors").read_bytes() == original.read_bytes()
    fine("export", MODEL, "digits@1", "--out", "one.json")
    value = json.loads(Path("one.json").read_text())
    assert value["card"]["version"] == 1 and len(value["experts"]) == 18
    assert value["experts"] == [list(expert) for expert in read_ranking(original).experts()]
    assert "immutable" in refused(RankingFormatError, "export", MODEL, "digits", "--out", "one.json")
    assert ".safetensors or .json" in refused(UsageError, "export", MODEL, "digits", "--out", "one.csv")
    assert fine("add", "one.safetensors", "--folder", "other").startswith("stored")
    assert fine("add", "one.safetensors", "--folder", "other").startswith("there already")
    assert "there already" in fine("add", "one.safetensors")
    write_ranking(make_ranking(55), Path("two.safetensors"))
    assert "immutable" in refused(RankingFormatError, "add", "two.safetensors")
    assert "not a ranking file" in refused(RankingFormatError, "add", "one.json")


def test_weights_and_a_recommended_strength_are_shown_compared_and_exported(mine: Path) -> None:
    weights = np.zeros((3, 6), dtype=np.float32)
    weights[0, :2] = 0.5, -1.5
    numbers = Recommended(activate=2, deactivate=2, strength=0.5, top=2, by="own")
    publish(with_weights(make_ranking(1), weights, version=3, recommended=numbers), mine)
    text = fine("show", MODEL, "digits")
    assert "recommended: strength 0.5, the 2 largest weights by own" in text
    assert "weights: 2 non-zero, the largest 1.5 (by hand)" in text
    short = {"made": "by hand", "non_zero": 2, "largest": 1.5}
    fine("export", MODEL, "digits", "--out", "three.json")
    for value in (json.loads(fine("show", MODEL, "digits", "--json")), json.loads(Path("three.json").read_text())):
        assert value["weights"] == short and value["card"]["recommended"]["strength"] == 0.5
    compared = fine("diff", f"{MODEL}/digits@1", f"{MODEL}/digits@3")
    assert (
        "own weights\n  - none\n  + 2 non-zero, the largest 1.5 (by hand)" in compared and "recommended\n" in compared
    )
    publish(with_weights(make_ranking(1), weights * 2, version=4, recommended=numbers), mine)
    assert json.loads(fine("diff", f"{MODEL}/digits@3", f"{MODEL}/digits@4", "--json"))["weights"] == [
        short,
        short | {"largest": 3.0},
    ]
    assert "weights: " not in fine("show", MODEL, "digits@1")


def test_publish_copies_mine_only_and_never_replaces(mine: Path) -> None:
    assert fine("publish", "shared").count("published") == 2
    assert fine("publish", "shared", MODEL, "digits").count("there already") == 2
    assert not Path("shared", lab_checkpoint.NAME).exists()
    publish(make_ranking(77), Path("clash"))
    assert "immutable" in refused(RankingFormatError, "publish", "clash")
    assert "nothing to publish" in refused(UnknownRankingError, "publish", "shared", "no/body")


def write_index(url: str) -> str:
    Path("index.json").write_text(index_of(TABLES, RANKING, url).model_dump_json())
    return "index.json"


def test_pull_shows_the_licence_first_and_publishes_only_when_told(mine: Path) -> None:
    with Loopback({"/tables/[safety].pkl": TABLES["safety"], "/LICENSE": LICENSE}) as server:
        index = write_index(server.url)
        done = registry("pull", MODEL, "--index", index)
        assert done.exit_code == 1 and isinstance(done.exception, PolicyError)
        assert LICENSE.decode() in done.stdout and "--accept-license" in str(done.exception)
        assert [path for path, _ in server.requests] == ["/LICENSE"]
        assert "stored" in fine("pull", MODEL, "safe", "--index", index, "--accept-license")
        Path("index.json").write_text(index_of(TABLES, RANKING).model_dump_json())
        again = fine("pull", MODEL, "--index", index, "--accept-license", "--source-url", server.url)
        assert "there already" in again
    text = fine("show", MODEL, "safe")
    assert "converted from org/release" in text and "reversed: activate 2, deactivate 1" in text
    assert "left out: org--tiny-moe/safety@1" in fine("publish", "a")
    assert not Path("a/org--tiny-moe/safety").exists()
    assert "not yours to publish" in refused(RankingFormatError, "publish", "a", MODEL, "safety")
    assert fine("publish", "a", "--include-converted").count("published") == 1


def two_sources(url: str) -> tuple[str, bytes]:
    """An index whose two rankings have a source and a licence each, and the other licence."""
    other = b"No use on Sundays.\n"
    tables = {**TABLES, "faithfulness": (DATA / "released-31-columns.pkl").read_bytes()}
    index = json.loads(index_of(tables, RANKING, url).model_dump_json())
    terms = {"name": "Other licence", "summary": "Not on Sundays.", "path": "OTHER", "size": len(other)}
    terms["sha256"] = hashlib.sha256(other).hexdigest()
    index["sources"]["other"] = {**index["sources"]["made-up"], "repository": "org/second", "license": terms}
    index["rankings"][1]["source"] = "other"
    Path("two.json").write_text(json.dumps(index))
    return "two.json", other


def check_both_licences(done: Result, other: bytes) -> None:
    assert done.exit_code == 1 and isinstance(done.exception, PolicyError)
    assert done.stdout.count(LICENSE.decode()) == done.stdout.count(other.decode()) == 1
    for text, repository in ((LICENSE, "org/release"), (other, "org/second")):
        assert done.stdout.index(text.decode()) < done.stdout.index(f"{repository} at ")
    first, second = "org/release is under the Made-up licence: ", "org/second is under the Other licence: "
    assert first in str(done.exception) and second in str(done.exception)


def test_of_two_sources_each_licence_is_shown_and_named(mine: Path) -> None:
    files = {"/tables/[safety].pkl": TABLES["safety"], "/LICENSE": LICENSE}
    with Loopback(files) as server:
        index, other = two_sources(server.url)
        server.files |= {"/OTHER": other, "/tables/[faithfulness].pkl": (DATA / "released-31-columns.pkl").read_bytes()}
        check_both_licences(registry("pull", MODEL, "--index", index), other)
        only_one = registry("pull", MODEL, "faithfulness", "--index", index)
        assert "org/release" not in only_one.stdout + str(only_one.exception) and other.decode() in only_one.stdout
        shown = fine("pull", MODEL, "--index", index, "--accept-license")
        assert "org/second at " in shown and "org/release at " in shown and other.decode() not in shown
    licences = {text.parent.name: text.read_bytes() for text in (mine / "org--tiny-moe").rglob("LICENSE")}
    assert licences == {"safety": LICENSE, "faithfulness": other}


def test_import_from_two_sources_shows_the_licences_of_the_files_at_hand(mine: Path) -> None:
    index, other = two_sources("http://127.0.0.1:9/")
    Path("release").mkdir()
    Path("release", "[faithfulness].pkl").write_bytes((DATA / "released-31-columns.pkl").read_bytes())
    Path("release", "OTHER").write_bytes(other)
    done = registry("import", "release", "--index", index)
    assert other.decode() in done.stdout and "org/release" not in done.stdout + str(done.exception)
    Path("release", "[safety].pkl").write_bytes(TABLES["safety"])
    Path("release", "LICENSE").write_bytes(LICENSE)
    check_both_licences(registry("import", "release", "--index", index), other)
    assert fine("import", "release", "--index", index, "--accept-license").count("stored: ") == 2


def test_import_shows_the_licence_first(mine: Path) -> None:
    index = write_index("http://127.0.0.1:9/")
    Path("release").mkdir()
    Path("release", "[safety].pkl").write_bytes(TABLES["safety"])
    Path("release", "LICENSE").write_bytes(LICENSE)
    done = registry("import", "release", "--index", index)
    assert isinstance(done.exception, PolicyError) and LICENSE.decode() in done.stdout
    assert not (mine / "org--tiny-moe" / "safety").exists()
    assert "stored" in fine("import", "release", "--index", index, "--accept-license")
    assert json.loads(fine("show", MODEL, "safe", "--json"))["tokens"] == [40, 50]


def stored(mine: Path, version: int) -> Ranking:
    return read_ranking(mine / "org--tiny-moe" / "digits" / f"v{version}.safetensors")


def test_weigh_stores_the_next_version_with_weights_of_counts(mine: Path) -> None:
    assert fine("weigh", MODEL, "digits", "--weights", "log_ratio").startswith("stored: ")
    fine("weigh", MODEL, "digits@1", "--weights", "sign", "--top", 5, "--strength", 0.5)
    whole, signs = stored(mine, 3), stored(mine, 4)
    assert whole.weights is not None and signs.weights is not None
    assert np.array_equal(whole.weights, weigh(make_ranking(2), "log_ratio").astype(np.float32))
    assert whole.card.recommended == make_ranking().card.recommended
    assert whole.card.note == "Weighed from version 2." and whole.card.weights == "log_ratio of the counts"
    first = make_ranking(1)
    # Signs are all as large, so the first of the ranking are taken.
    rows = first.shape.rows
    assert {(e.layer, e.expert): np.sign(e.risk_difference) for e in first.experts()[:5]} == {
        (layer, expert): signs.weights[rows[layer], expert]
        for layer in rows
        for expert in np.flatnonzero(signs.weights[rows[layer]])
    }
    assert signs.card.weights == "sign of the counts, the 5 largest"
    assert signs.card.recommended == Recommended(activate=2, deactivate=2, strength=0.5)
    for counts in (whole.counts, signs.counts):
        assert any(np.array_equal(counts.activations_1, make_ranking(seed).counts.activations_1) for seed in (1, 2))


def test_weigh_takes_the_biases_of_a_profile_and_a_strength_of_1_gives_them_back(mine: Path) -> None:
    profile = SteeringProfile(bias=((0, 1, 0.3), (1, 5, -2.5), (3, 0, 1e-4)))
    Path("profile.json").write_text(profile.to_json())
    fine("weigh", MODEL, "digits", "--from", "profile.json")
    ranking = stored(mine, 3)
    assert bias_experts(ranking, 1.0) == profile and profile.digest in ranking.card.weights
    fine("weigh", MODEL, "digits", "--from", "profile.json", "--top", 1)
    assert bias_experts(stored(mine, 4), 1.0).bias == ((1, 5, -2.5),)


def test_weigh_recommends_a_strength_in_both_directions_and_it_can_be_taken_back(mine: Path) -> None:
    publish(make_ranking(5, version=3, recommended_reverse=Recommended(activate=1, deactivate=0)), mine)
    fine("weigh", MODEL, "digits", "--strength", 2, "--top", 3)
    card = stored(mine, 4).card
    assert card.recommended == Recommended(activate=2, deactivate=2, strength=2, top=3)
    assert card.recommended_reverse == Recommended(activate=1, deactivate=0, strength=2, top=3)
    assert card.format_version == 2 and card.weights == ""
    forced = {"recommended": Recommended(activate=1, deactivate=1), "recommended_reverse": None}
    again = revise(stored(mine, 4), Registry((mine,)), "Tuned.", **forced)
    assert (again.card.version, again.card.format_version) == (5, 1)
    assert again.card.note == "Weighed from version 3. Tuned." and dump_ranking(again)


def test_weigh_refuses_what_it_cannot_store(mine: Path) -> None:
    files = {
        "forced": '{"activate": {"0": [1]}, "bias": {"1": {"2": 1}}}',
        "phased": '{"bias": {"0": {"1": 1}}, "phase": "prompt"}',
        "elsewhere": '{"bias": {"2": {"1": 1}}}',
        "strong": '{"bias": {"0": {"1": 2}}}',
        "zeros": '{"bias": {"0": {"1": 0}}}',
        "cut": '{"bias"',
        "large": '{"bias": {"0": {"1": 17}}}',
    }
    for name, text in files.items():
        Path(name).write_text(text)
    Path("bytes").write_bytes(b"\xff")
    rows: list[tuple[tuple[object, ...], type[SteerMoEError], str]] = [
        ((), UsageError, "nothing to store"),
        (("--top", 3), UsageError, "nothing to store"),
        (("--weights", "sign", "--from", "zeros"), UsageError, "leave one out"),
        (("--weights", "signs"), UsageError, "did you mean 'sign'"),
        (("--weights", "own"), UsageError, "unknown kind of weights 'own'"),
        (("--weights", "sign", "--top", 19), ProfileError, "top: 19 experts"),
        (("--strength", 1, "--top", 19), ProfileError, "top: 19 experts"),
        *((("--strength", value), UsageError, "above 0 and at most 16") for value in (0, -1, 16.5, "nan", "inf")),
        (("--strength", 1e-9), UsageError, "round to 0"),
        (("--from", "strong", "--strength", 9), ProfileError, "18 for layer 0, expert 1"),
        (("--from", "forced"), UsageError, "forces experts"),
        (("--from", "phased"), UsageError, "has a phase"),
        (("--from", "elsewhere"), ProfileError, "layer 2 has no routed experts"),
        (("--from", "zeros"), UsageError, "all biases are 0"),
        (("--from", "cut"), RequestError, "not JSON"),
        (("--from", "large"), ProfileError, "from -16 to 16"),
        (("--from", "bytes"), UsageError, "not UTF-8"),
        (("--from", "."), FileError, "cannot read"),
    ]

    def run(options: tuple[object, ...]) -> None:
        done = registry("weigh", MODEL, "digits", *options)
        assert done.exit_code == 1 and done.exception is not None, done.output
        raise done.exception

    assert not_refused(run, rows) == []
    assert sorted(path.name for path in (mine / "org--tiny-moe" / "digits").iterdir()) == [
        "v1.safetensors",
        "v2.safetensors",
    ]
