"""The registry: which ranking is found for a model, why, and what is said when there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from expert_registry import MoEShape, Registry
from expert_registry.errors import RankingFormatError, UnknownRankingError
from expert_registry.format import content_hash
from expert_registry.registry import USER_FOLDER_VARIABLE, model_key, publish, user_folder
from tests.support.made_rankings import make_ranking

MODEL = "org/Tiny-MoE"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two models; one has two behaviours, one of them in three versions."""
    root = tmp_path / "rankings"
    for version in (1, 2, 10):
        publish(make_ranking(version, model=MODEL, behaviour="digits", version=version), root)
    publish(make_ranking(3, model=MODEL, behaviour="refusal"), root)
    publish(make_ranking(4, model="other/model", behaviour="digits"), root)
    return root


def test_the_newest_version_by_number_is_found(folder: Path) -> None:
    found = Registry((folder,)).find([MODEL], "digits")
    assert found.entry.version == found.ranking.card.version == 10
    assert found.entry.name == "org--tiny-moe/digits@10"
    assert found.sha256 == content_hash(found.entry.path.read_bytes())
    assert len(found.trace) == 1 and "accepted" in found.trace[0]


def test_exactly_the_version_that_was_asked_for_is_found(folder: Path) -> None:
    found = Registry((folder,)).find([MODEL], "digits", version=2)
    assert found.ranking.card.version == 2
    assert [line.split(":")[1].split(",")[0].strip() for line in found.trace] == [
        "rejected",
        "accepted (" + str(found.entry.path) + ")",
    ]


def test_case_and_slash_do_not_matter(folder: Path) -> None:
    for name in ["org/Tiny-MoE", "ORG/TINY-MOE", "org/tiny-moe", "org--tiny-moe", " org/Tiny-MoE/ "]:
        assert model_key(name) == "org--tiny-moe"
        assert Registry((folder,)).find([name], "refusal").ranking.card.behaviour == "refusal"


def test_the_first_name_of_a_model_that_has_a_ranking_wins(folder: Path) -> None:
    registry = Registry((folder,))
    assert registry.find(["/srv/checkpoint", "other/model", MODEL], "digits").entry.model_key == "other--model"
    assert registry.find([MODEL, "other/model"], "digits").entry.version == 10
    assert registry.find(["other/model", MODEL], "refusal").entry.model_key == "org--tiny-moe"


def test_everything_is_listed_in_order(folder: Path) -> None:
    names = [entry.name for entry in Registry((folder,)).entries()]
    assert names == [
        "org--tiny-moe/digits@1",
        "org--tiny-moe/digits@2",
        "org--tiny-moe/digits@10",
        "org--tiny-moe/refusal@1",
        "other--model/digits@1",
    ]
    assert [entry.card().version for entry in Registry((folder,)).entries()] == [1, 2, 10, 1, 1]
    assert Registry((folder,)).behaviours(["Org/tiny-moe", "nobody"]) == ["digits", "refusal"]
    assert Registry((folder,)).behaviours(["nobody"]) == []


def test_what_is_unknown_is_named_with_what_exists(folder: Path) -> None:
    for models, behaviour, version, names in [
        (["org/tiny"], "digits", None, r"'org--tiny'.*did you mean 'org--tiny-moe'.*other--model.*steermoe detect"),
        (["a", "b"], "digits", None, r"looked up as a, b"),
        ([MODEL], "digit", None, r"behaviour 'digit'.*did you mean 'digits'.*digits, refusal"),
        (["other/model"], "refusal", None, r"known: digits$"),
        ([MODEL], "digits", 3, r"digits@3.*digits@10: rejected.*digits@2: rejected.*digits@1: rejected"),
        ([], "digits", None, r"no ranking for the model"),
    ]:
        with pytest.raises(UnknownRankingError, match=names):
            Registry((folder,)).find(models, behaviour, version=version)


def test_an_empty_registry_says_that_there_is_none(tmp_path: Path) -> None:
    registry = Registry((tmp_path / "missing", tmp_path))
    assert list(registry.entries()) == []
    with pytest.raises(UnknownRankingError, match="known: none"):
        registry.find([MODEL], "digits")


def test_a_ranking_of_another_shape_is_rejected_with_a_trace(folder: Path) -> None:
    find = Registry((folder,)).find
    own = MoEShape("OlmoeForCausalLM", (0, 1, 3), 6, 2)
    for other in ({"top_k": 3}, {"num_experts": 8}, {"layers": (0, 1, 2)}, {"architecture": "MixtralForCausalLM"}):
        shape = replace(own, **other)
        with pytest.raises(UnknownRankingError, match=r"digits@10: rejected, .*digits@1: rejected") as caught:
            find([MODEL], "digits", shape=shape)
        assert str(shape) in str(caught.value)
    assert find([MODEL], "digits", shape=own).entry.version == 10


def test_an_older_version_that_fits_is_found_behind_a_newer_one_that_does_not(folder: Path) -> None:
    publish(make_ranking(5, model=MODEL, behaviour="digits", version=11, experts=8), folder)
    shape = MoEShape("OlmoeForCausalLM", (0, 1, 3), 6, 2)
    found = Registry((folder,)).find([MODEL], "digits", shape=shape)
    assert found.entry.version == 10
    assert found.trace[0].startswith("org--tiny-moe/digits@11: rejected") and "8 experts" in found.trace[0]


def test_the_users_ranking_shadows_the_bundled_one_of_the_same_version_only(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    path = publish(make_ranking(77, model=MODEL, behaviour="digits", version=10), mine)
    registry = Registry((mine, folder))
    assert registry.find([MODEL], "digits").entry.path == path
    assert registry.find([MODEL], "digits", version=2).entry.path.is_relative_to(folder)
    assert len(list(registry.entries())) == 5
    assert Registry((folder, mine)).find([MODEL], "digits").entry.path.is_relative_to(folder)


def test_the_default_registry_looks_into_the_users_folder_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_FOLDER_VARIABLE, str(folder))
    assert user_folder() == folder == Registry.default().folders[0]
    assert Registry.default().find([MODEL], "refusal").entry.path.is_relative_to(folder)


def test_a_file_in_the_wrong_place_is_refused_rather_than_believed(folder: Path) -> None:
    for place in ["org--tiny-moe/digits/v11", "org--tiny-moe/lies/v1", "wrong--model/digits/v1"]:
        source = folder / "org--tiny-moe" / "digits" / "v1.safetensors"
        target = folder / f"{place}.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
        model, behaviour, _ = place.split("/")
        with pytest.raises(RankingFormatError, match=r"org--tiny-moe/digits@1; it is in the wrong place"):
            Registry((folder,)).find([model], behaviour)


def test_a_damaged_file_is_an_error_and_not_passed_over(folder: Path) -> None:
    path = folder / "org--tiny-moe" / "digits" / "v10.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RankingFormatError, match=r"v10\.safetensors"):
        Registry((folder,)).find([MODEL], "digits")
    assert Registry((folder,)).find([MODEL], "digits", version=2).entry.version == 2


def test_names_that_are_no_version_are_passed_over(folder: Path) -> None:
    place = folder / "org--tiny-moe" / "digits"
    for name in ("v0", "v01", "v1000000", "v-1", "version", "v3 ", "v3.bak", "v3\n"):
        (place / f"{name}.safetensors").write_bytes(b"")
    assert len(list(Registry((folder,)).entries())) == 5


def test_publishing_refuses_to_overwrite(folder: Path) -> None:
    before = (folder / "org--tiny-moe" / "digits" / "v2.safetensors").read_bytes()
    with pytest.raises(RankingFormatError, match="immutable"):
        publish(make_ranking(99, model=MODEL, behaviour="digits", version=2), folder)
    assert (folder / "org--tiny-moe" / "digits" / "v2.safetensors").read_bytes() == before
    path = publish(make_ranking(99, model=MODEL, behaviour="digits", version=2), folder, overwrite=True)
    assert path.read_bytes() != before
