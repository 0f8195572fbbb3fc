"""Look-up by names as people write them, why candidates are rejected, and names that want to lead elsewhere."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expert_registry import MoEShape, Ranking, Registry
from expert_registry.behaviours import ALIASES, parse_reference
from expert_registry.errors import FileError, RankingFormatError, UnknownRankingError
from expert_registry.format import MAX_BYTES, content_hash
from expert_registry.lock import LOCK_VARIABLE, Pin, read_lock, write_lock
from expert_registry.places import PROJECT_FOLDER, behaviours_in, versions_in
from expert_registry.published.index import load_index
from expert_registry.registry import publish
from expert_registry.status import STATUS_FILE
from tests.support.made_rankings import make_ranking
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.admission.request_admission import FrontEnd
from vllm_steermoe_plugin.frontend.attached import _make_front_end
from vllm_steermoe_plugin.models.checkpoints import names_of, shape_in

MODEL = "org/Tiny-MoE"
SHAPE = MoEShape("OlmoeForCausalLM", (0, 1, 3), 6, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "rankings"
    for version in (1, 2, 3):
        publish(make_ranking(version, model=MODEL, behaviour="faithfulness", version=version), root)
    publish(make_ranking(9, model=MODEL, behaviour="safety"), root)
    return root


def set_status(folder: Path, place: str, **status: Any) -> None:
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / place / STATUS_FILE).write_text(json.dumps(status))


# --- names ------------------------------------------------------------------------------------------------------


def test_a_behaviour_is_found_by_name_and_alias(folder: Path) -> None:
    for written in ("faithfulness", "faithful", "Faithful", "FAITHFULNESS", " faithful "):
        assert Registry((folder,)).find([MODEL], written).ranking.card.behaviour == "faithfulness"


def test_no_alias_reverses_and_a_behaviour_of_that_name_goes_first(folder: Path) -> None:
    assert set(ALIASES.values()) == {"faithfulness", "safety"}
    with pytest.raises(UnknownRankingError, match=r"'unsafe'.*faithfulness, safety"):
        Registry((folder,)).find([MODEL], "unsafe")
    publish(make_ranking(5, model=MODEL, behaviour="safe"), folder)
    assert Registry((folder,)).find([MODEL], "safe").ranking.card.behaviour == "safe"


def test_a_reference_is_a_behaviour_and_a_version() -> None:
    for text, version in (("safety", None), ("safety@latest", None), ("safety@12", 12)):
        assert parse_reference(text) == ("safety", version)
    for text in ("safety@", "safety@0", "safety@01", "safety@-1", "safety@x", "safety@1@2", "s@²"):
        with pytest.raises(UnknownRankingError, match="a version is a number or 'latest'"):
            parse_reference(text)


def checkpoint(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    fields = {
        "architectures": ["OlmoeForCausalLM"],
        "num_hidden_layers": 3,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    }
    (folder / "config.json").write_text(json.dumps(fields | config))
    return folder


def test_a_local_folder_is_found_through_its_config_and_its_place_in_the_hub_cache(tmp_path: Path) -> None:
    root = tmp_path / "rankings"
    publish(make_ranking(1, model=MODEL, layers=(0, 1, 2)), root)
    for place in (
        checkpoint(tmp_path / "Tiny-MoE", _name_or_path="ORG/tiny-moe"),
        checkpoint(tmp_path / "hub" / "models--org--Tiny-MoE" / "snapshots" / "0a1b"),
    ):
        found = Registry((root,)).find(names_of(str(place)), "digits", shape=shape_in(place))
        assert found.ranking.card.model.id == MODEL
    tuned = checkpoint(tmp_path / "tuned", _name_or_path="ORG/tiny-moe")
    for place in (checkpoint(tmp_path / "elsewhere"), tuned):
        with pytest.raises(UnknownRankingError, match="no ranking for the model"):
            Registry((root,)).find(names_of(str(place)), "digits")


def test_a_served_name_is_a_name(folder: Path) -> None:
    assert Registry((folder,)).find(names_of("/srv/weights", ["org/tiny-moe"]), "safety").entry.version == 1


# --- fine-tunes -------------------------------------------------------------------------------------------------


def test_a_fine_tune_has_the_rankings_of_its_base_model_only_when_asked_for(folder: Path) -> None:
    registry = Registry((folder,))
    with pytest.raises(UnknownRankingError, match="me--tuned"):
        registry.find(["me/tuned"], "safety", shape=SHAPE)
    found = registry.find(["me/tuned"], "safety", shape=SHAPE, base_model=MODEL)
    assert "of the base model that was named" in found.trace[-1]
    assert "base model" not in registry.find([MODEL], "safety", base_model=MODEL).trace[-1]
    with pytest.raises(UnknownRankingError, match="6 experts, not 8"):
        registry.find(["me/tuned"], "safety", shape=MoEShape("OlmoeForCausalLM", (0, 1, 3), 8, 2), base_model=MODEL)


def test_the_fine_tunes_own_ranking_goes_first(folder: Path) -> None:
    publish(make_ranking(6, model="me/tuned", behaviour="faithfulness"), folder)
    found = Registry((folder,)).find(["me/tuned"], "faithful", base_model=MODEL)
    assert found.entry.model_key == "me--tuned"
    assert Registry((folder,)).find(["me/tuned"], "safe", base_model=MODEL).entry.model_key == "org--tiny-moe"


# --- why --------------------------------------------------------------------------------------------------------


def test_a_rejection_says_which_part_of_the_shape_differs(folder: Path) -> None:
    rows: list[tuple[Any, ...]] = [
        (MoEShape("MixtralForCausalLM", (0, 1, 3), 6, 2), "architecture OlmoeForCausalLM, not MixtralForCausalLM"),
        (MoEShape("OlmoeForCausalLM", (0, 1, 2), 6, 2), r"MoE layers 0,1,3, not 0\.\.2 \(3\)"),
        (MoEShape("OlmoeForCausalLM", tuple(range(40)), 6, 2), r"MoE layers 0,1,3, not 0\.\.39 \(40\)"),
        (MoEShape("OlmoeForCausalLM", (0, 1, 3), 7, 2), "6 experts, not 7"),
        (MoEShape("OlmoeForCausalLM", (0, 1, 3), 6, 3), "top-2, not top-3"),
        (MoEShape("OlmoeForCausalLM", (0, 1, 3), 7, 3), "6 experts, not 7; top-2, not top-3"),
    ]
    find = Registry((folder,)).find
    assert not_refused(lambda shape: find([MODEL], "safety", shape=shape), rows, UnknownRankingError) == []


def test_acceptance_names_shape_revision_and_hash(folder: Path) -> None:
    found = Registry((folder,)).find([MODEL], "safety")
    assert str(SHAPE) in found.trace[0] and "revision unknown" in found.trace[0] and found.sha256 in found.trace[0]


def test_a_ranking_of_another_revision_or_hash_is_rejected(folder: Path) -> None:
    ranking = make_ranking(4, model=MODEL, behaviour="faithfulness", version=4)
    model = ranking.card.model.model_copy(update={"revision": "abc"})
    publish(Ranking(ranking.counts, ranking.card.model_copy(update={"model": model})), folder)
    registry = Registry((folder,))
    assert registry.find([MODEL], "faithful", revision="abc").entry.version == 4
    older = registry.find([MODEL], "faithful", revision="def")
    assert older.entry.version == 3 and "counted on revision abc, not def" in older.trace[0]
    pinned = registry.find([MODEL], "faithful", version=2).sha256
    assert registry.find([MODEL], "faithful", sha256=pinned).entry.version == 2
    with pytest.raises(UnknownRankingError, match=r"its sha256 is [0-9a-f]{64}, not 0000"):
        registry.find([MODEL], "faithful", sha256="0" * 64)


def test_a_shadowed_ranking_is_named_when_the_one_before_it_is_rejected(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    publish(make_ranking(1, model=MODEL, behaviour="safety", experts=9), mine)
    with pytest.raises(UnknownRankingError, match=r"9 experts, not 6.*is shadowed by"):
        Registry((mine, folder)).find([MODEL], "safety", shape=SHAPE)


def test_a_model_of_the_index_can_be_pulled_and_the_error_says_how(tmp_path: Path) -> None:
    for item in load_index().rankings:
        with pytest.raises(UnknownRankingError, match=f"steermoe registry pull {item.model} {item.behaviour}`"):
            Registry((tmp_path,)).find([item.model.lower()], item.behaviour)


def test_an_error_among_very_many_models_stays_short(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"model-{number}" / "digits").mkdir(parents=True)
        (tmp_path / f"model-{number}" / "digits" / "v1.safetensors").write_bytes(b"")
    with pytest.raises(UnknownRankingError, match="and 20 more") as caught:
        Registry((tmp_path,)).find(["other"], "digits")
    assert len(str(caught.value)) < 2000


# --- status -----------------------------------------------------------------------------------------------------


def test_a_withdrawn_version_is_passed_over_and_refused_by_number(folder: Path) -> None:
    place = "org--tiny-moe/faithfulness"
    set_status(folder, place, withdrawn={"3": {"reason": "wrong template", "use": 2}})
    found = Registry((folder,)).find([MODEL], "faithful")
    assert found.entry.version == 2 and "withdrawn: wrong template; use faithfulness@2" in found.trace[0]
    with pytest.raises(UnknownRankingError, match="it was withdrawn: wrong template; use faithfulness@2"):
        Registry((folder,)).find([MODEL], "faithful", version=3)


def test_a_renamed_behaviour_and_model_are_followed_and_said(folder: Path) -> None:
    set_status(folder, "org--tiny-moe/truth", renamed={"behaviour": "faithfulness", "reason": "clearer"})
    set_status(folder, "org--old/truth", renamed={"model": "Org/Tiny-MoE", "behaviour": "truth"})
    found = Registry((folder,)).find(["org/old"], "truth", version=1)
    assert found.entry.name == "org--tiny-moe/faithfulness@1"
    assert found.trace[0] == "org--old/truth: renamed to org--tiny-moe/truth: no reason given"
    assert found.trace[1] == "org--tiny-moe/truth: renamed to org--tiny-moe/faithfulness: clearer"
    with pytest.raises(UnknownRankingError, match=r"renamed to.*6 experts, not 8"):
        Registry((folder,)).find(["org/old"], "truth", shape=MoEShape("OlmoeForCausalLM", (0, 1, 3), 8, 2))


def test_a_ring_of_renames_and_a_rename_to_nowhere_end(folder: Path) -> None:
    set_status(folder, "org--tiny-moe/a", renamed={"behaviour": "b"})
    set_status(folder, "org--tiny-moe/b", renamed={"behaviour": "a"})
    set_status(folder, "org--tiny-moe/c", renamed={"model": "no/body", "behaviour": "c"})
    for name in "abc":
        with pytest.raises(UnknownRankingError, match="renamed to"):
            Registry((folder,)).find([MODEL], name)


def test_a_damaged_status_or_lock_is_refused(folder: Path, tmp_path: Path) -> None:
    for text in (
        *("", "[]", "{", '{"surprise": 1}', '{"format_version": 2}', " " * 70_000, "[" * 60_000),
        *(
            '{"withdrawn": {"x": {"reason": ""}}}',
            '{"withdrawn": {"1": {}}}',
            '{"renamed": {"behaviour": "../../etc"}}',
        ),
        '{"renamed": {"behaviour": "a", "model": "../../etc"}}',
    ):
        (folder / "org--tiny-moe" / "safety" / STATUS_FILE).write_text(text)
        with pytest.raises((FileError, RankingFormatError), match=r"status\.json"):
            Registry((folder,)).find([MODEL], "safety")
    for text in ("", "{}", '{"rankings": {"a": {"version": 1, "sha256": "x"}}}', '{"rankings": []}'):
        (tmp_path / "l").write_text(text)
        with pytest.raises(RankingFormatError):
            read_lock(tmp_path / "l")


# --- lock -------------------------------------------------------------------------------------------------------


def test_under_a_lock_only_what_it_pins_is_found(folder: Path, tmp_path: Path) -> None:
    free = Registry((folder,))
    pin = Pin(version=2, sha256=free.find([MODEL], "faithful", version=2).sha256)
    write_lock(tmp_path / "steermoe.lock", {"org--tiny-moe/faithfulness": pin})
    locked = Registry((folder,), read_lock(tmp_path / "steermoe.lock"))
    found = locked.find([MODEL], "faithful")
    assert found.entry.version == 2 and "the lock file pins version 2" in found.trace[0]
    with pytest.raises(UnknownRankingError, match="pins version 2"):
        locked.find([MODEL], "faithful", version=3)
    with pytest.raises(UnknownRankingError, match="not in the lock file"):
        locked.find([MODEL], "safety")
    found.entry.path.unlink()
    publish(make_ranking(77, model=MODEL, behaviour="faithfulness", version=2), folder)
    with pytest.raises(UnknownRankingError, match=f"but the lock file pins {pin.sha256}"):
        locked.find([MODEL], "faithful")


def test_the_environment_locks_the_default_registry(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERMOE_REGISTRY", str(folder))
    monkeypatch.setenv(LOCK_VARIABLE, str(tmp_path / "none.lock"))
    with pytest.raises(FileError, match=r"none\.lock"):
        Registry.default()
    write_lock(tmp_path / "none.lock", {})
    with pytest.raises(UnknownRankingError, match="not in the lock file"):
        Registry.default().find([MODEL], "safety")


# --- sources and tricks -----------------------------------------------------------------------------------------


def test_the_project_folder_goes_first(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERMOE_REGISTRY", str(folder))
    project = tmp_path / "project"
    publish(make_ranking(50, model=MODEL, behaviour="safety"), project / PROJECT_FOLDER)
    monkeypatch.chdir(project)
    assert Registry.default().find([MODEL], "safety").ranking.counts.activations_1.tolist() == (
        make_ranking(50).counts.activations_1.tolist()
    )
    monkeypatch.chdir(tmp_path)
    assert Registry.default().find([MODEL], "safety").entry.folder == folder


MODELS = ("..", "../..", "../outside", ".", "", "/", "/etc", "a/../../b", "..\\..", MODEL + "\0", "x" * 5000, "é", "*")
BEHAVIOURS = ("..", "../safety", "../../x", "", ".", "safety/..", "safety\0", "saf*", "x" * 999)


def test_a_name_leads_nowhere_else(folder: Path) -> None:
    publish(make_ranking(1, model="org/x", behaviour="safety"), folder.parent / "outside")
    (folder.parent / "safety").mkdir()
    (folder.parent / "safety" / "v1.safetensors").write_bytes(
        (folder / "org--tiny-moe" / "safety" / "v1.safetensors").read_bytes()
    )
    find = Registry((folder,)).find
    rows = [(([model], "safety"), "no ranking for the model") for model in MODELS]
    rows += [(([MODEL], behaviour), "unknown behaviour") for behaviour in BEHAVIOURS]
    assert not_refused(lambda names: find(*names), rows, UnknownRankingError) == []


def test_a_place_is_listed_only_by_plain_names(folder: Path) -> None:
    assert len(versions_in(folder, "org--tiny-moe", "faithfulness")) == 3
    assert versions_in(folder / "org--tiny-moe" / "safety", "..", "faithfulness") == []
    assert versions_in(folder, "org--tiny-moe/safety/..", "faithfulness") == []
    assert versions_in(folder, "org--tiny-moe", "safety/../faithfulness") == []
    assert behaviours_in(folder / "org--tiny-moe", "..") == []


@pytest.mark.parametrize("level", ["file", "behaviour", "model", "status"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, level: str) -> None:
    place = folder / "org--tiny-moe" / "safety"
    moved = {"behaviour": place, "model": place.parent}.get(level)
    target = tmp_path / "elsewhere"
    if moved is not None:
        moved.rename(target)
    else:
        target.write_bytes(b"{}" if level == "status" else (place / "v1.safetensors").read_bytes())
        moved = place / (STATUS_FILE if level == "status" else "v2.safetensors")
    moved.symlink_to(target)
    with pytest.raises(FileError, match="is a link out of the registry folder"):
        Registry((folder,)).find([MODEL], "safety")


def test_the_folder_itself_may_be_a_link_and_so_may_a_file_inside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert Registry((tmp_path / "link",)).find([MODEL], "safety").entry.version == 1
    place = folder / "org--tiny-moe" / "safety"
    (place / "v1.safetensors").rename(place / "blob")
    (place / "v1.safetensors").symlink_to("blob")
    assert Registry((folder,)).find([MODEL], "safety").entry.version == 1


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "ring", "broken", "huge"])
def test_what_is_no_regular_file_is_refused_at_once(folder: Path, kind: str) -> None:
    path = folder / "org--tiny-moe" / "safety" / "v2.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(MAX_BYTES + 1)
    else:
        path.symlink_to({"device": "/dev/zero", "ring": path.name, "broken": "nothing"}[kind])
    with pytest.raises(FileError, match=r"cannot read|link out|larger than"):
        Registry((folder,)).find([MODEL], "safety")
    assert Registry((folder,)).find([MODEL], "faithful").entry.version == 3
    assert len(list(Registry((folder,)).entries())) == 5


def test_a_look_up_opens_no_file_of_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(make_ranking(1, model="other/model", behaviour="safety"), folder)
    listed: list[str] = []
    original = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: listed.append(str(path)) or original(path))
    Registry((folder,)).find([MODEL], "safety")
    assert listed and not any("other--model" in path or path == str(folder) for path in listed)


# --- through the front end --------------------------------------------------------------------------------------


def test_the_operator_names_a_base_model_and_a_lock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STEERMOE_REGISTRY", str(folder))
    place = checkpoint(tmp_path / "me" / "tuned")
    tuned = make_ranking(1, model="org/base", layers=(0, 1, 2), behaviour="safety")
    path = publish(tuned, folder)
    lock = tmp_path / "steermoe.lock"

    def front_end(**settings: str) -> FrontEnd:
        config = SimpleNamespace(
            model=str(place),
            served_model_name="tuned",
            architecture="OlmoeForCausalLM",
            runner_type="generate",
            hf_config=SimpleNamespace(**json.loads((place / "config.json").read_text())),
        )
        made = _make_front_end(
            SimpleNamespace(
                model_config=config,
                additional_config={"steermoe": settings},
                is_mm_encoder_only=False,
                kv_transfer_config=None,
            )
        )
        made.set_worker_status(None)
        return made

    with pytest.raises(UnknownRankingError, match="no ranking for the model"):
        front_end().admit({"steermoe": "safe"})
    prepared = front_end(base_model="Org/Base").admit({"steermoe": "safe"})
    assert prepared is not None and prepared.salt is not None
    with pytest.raises(FileError, match=r"steermoe\.lock"):
        front_end(base_model="Org/Base", lock=str(lock))
    write_lock(lock, {"org--base/safety": Pin(version=1, sha256=content_hash(path.read_bytes()))})
    assert front_end(base_model="Org/Base", lock=str(lock)).admit({"steermoe": "safety@1"}) == prepared
    write_lock(lock, {"org--base/safety": Pin(version=1, sha256="0" * 64)})
    with pytest.raises(UnknownRankingError, match="the lock file pins 0000"):
        front_end(base_model="Org/Base", lock=str(lock)).admit({"steermoe": "safe"})
