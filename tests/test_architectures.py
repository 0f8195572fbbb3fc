"""From a model's config to its MoE shape, and from a checkpoint's place to its names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expert_registry import MoEShape
from expert_registry.errors import EngineError, SteerMoEError
from vllm_steermoe_plugin import lab
from vllm_steermoe_plugin.architectures import ARCHITECTURES, shape_of
from vllm_steermoe_plugin.checkpoints import names_of, resolve_checkpoint, shape_in
from vllm_steermoe_plugin.variant_names import architecture_of, variant_name

QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}


def config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{key: value for key, value in (QWEN | changes).items() if value is not ...})


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_every_architecture_has_its_shape_under_either_name_of_e(architecture: str, key: str) -> None:
    found = shape_of(config(**{"architectures": [architecture], "num_experts": ..., key: 32}))
    assert found == MoEShape(architecture, tuple(range(8)), 32, 4)


@pytest.mark.parametrize(
    ("dense", "step", "layers"),
    [
        ([], 1, (0, 1, 2, 3, 4, 5, 6, 7)),
        (None, None, (0, 1, 2, 3, 4, 5, 6, 7)),
        ([0, 5], 1, (1, 2, 3, 4, 6, 7)),
        ([], 2, (1, 3, 5, 7)),
        ([3], 2, (1, 5, 7)),
        ([], 3, (2, 5)),
        ([0, 100], 4, (3, 7)),
    ],
)
def test_dense_layers_have_no_experts(dense: Any, step: Any, layers: tuple[int, ...]) -> None:
    assert shape_of(config(mlp_only_layers=dense, decoder_sparse_step=step)).layers == layers
    by_hand = [i for i in range(8) if i not in (dense or []) and (i + 1) % (step or 1) == 0]
    assert list(layers) == by_hand


def test_the_first_architecture_that_can_be_steered_counts() -> None:
    assert shape_of(config(architectures=["Other", "OlmoeForCausalLM"])).architecture == "OlmoeForCausalLM"


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"architectures": ["Qwen3MoeForCausalLMs"]}, r"did you mean 'Qwen3MoeForCausalLM'.*GptOss.*Mixtral.*Olmoe"),
        ({"architectures": ["LlamaForCausalLM"]}, r"'LlamaForCausalLM'"),
        ({"architectures": []}, r"cannot be steered"),
        ({"architectures": None}, r"cannot be steered"),
        ({"architectures": ...}, r"cannot be steered"),
        ({"num_hidden_layers": ...}, r"Qwen3MoeForCausalLM has no integer num_hidden_layers"),
        ({"num_experts": ...}, r"no integer num_experts or num_local_experts"),
        ({"num_experts": "16"}, r"no integer num_experts"),
        ({"num_experts_per_tok": None}, r"no integer num_experts_per_tok"),
    ],
)
def test_what_cannot_be_steered_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(EngineError, match=names):
        shape_of(config(**changes))


@pytest.mark.parametrize(
    "changes",
    [{"num_experts_per_tok": 17}, {"num_experts": 0}, {"mlp_only_layers": list(range(8))}, {"num_hidden_layers": 0}],
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(SteerMoEError, match="Qwen3MoeForCausalLM"):
        shape_of(config(**changes))


@pytest.mark.parametrize("layers", [(), (1, 0), (0, 0), (-1, 0)])
def test_layers_must_ascend(layers: tuple[int, ...]) -> None:
    with pytest.raises(SteerMoEError, match="ascending"):
        MoEShape("X", layers, 4, 2)


def folder(place: Path, text: str | None = None) -> str:
    place.mkdir(parents=True)
    if text is not None:
        (place / "config.json").write_text(text)
    return str(place)


def test_a_hub_name_is_its_own_name_and_aliases_follow() -> None:
    assert names_of("org/Model") == ["org/Model"]
    assert names_of("org/Model", ["served", "org/Model"]) == ["org/Model", "served"]


def test_the_lab_is_known_however_it_is_reached(tmp_path: Path) -> None:
    assert resolve_checkpoint(lab.NAME) == str(lab.MODEL_DIR) and resolve_checkpoint("org/model") == "org/model"
    link = tmp_path / "link"
    link.symlink_to(lab.MODEL_DIR)
    for name in (str(lab.MODEL_DIR), str(lab.MODEL_DIR / "." / ""), str(link)):
        assert names_of(name)[0] == lab.NAME
    assert shape_in(lab.MODEL_DIR).architecture in ARCHITECTURES


def test_a_folder_of_the_hub_cache_is_known_by_its_hub_name(tmp_path: Path) -> None:
    path = folder(tmp_path / "hub" / "models--org--Tiny-MoE" / "snapshots" / "0123abcd", "{}")
    assert names_of(path, ["served"]) == ["org/Tiny-MoE", path, "served"]
    assert names_of(str(tmp_path / "models--org--gone" / "snapshots" / "0"))[0] == "org/gone"


def test_a_copy_is_known_by_the_name_in_its_config(tmp_path: Path) -> None:
    path = folder(tmp_path / "original", '{"_name_or_path": "org/Original"}')
    assert names_of(path) == ["org/Original", path]
    path = folder(tmp_path / "my-fine-tune", '{"_name_or_path": "org/Original"}')
    assert names_of(path) == [path], "a fine-tune names its base there; its rankings are used only when asked for"
    for number, text in enumerate(('{"_name_or_path": ""}', '{"_name_or_path": 3}', "{}")):
        path = folder(tmp_path / str(number), text)
        assert names_of(path) == [path]


@pytest.mark.parametrize("text", [None, "", "[]", "{"])
def test_a_folder_without_a_readable_config_still_has_its_name(tmp_path: Path, text: str | None) -> None:
    # The front end asks for the names of every model that vLLM serves, also of those that nobody steers.
    path = folder(tmp_path / "mistral-format", text)
    assert names_of(path, ["served"]) == [path, "served"]


def test_a_shape_is_read_from_a_folder_or_refused_by_its_path(tmp_path: Path) -> None:
    assert shape_in(Path(folder(tmp_path / "good", json.dumps(QWEN)))).num_experts == 16
    for number, text in enumerate((None, "", "[]", "{", '{"a": NaN')):
        path = folder(tmp_path / str(number), text)
        with pytest.raises(EngineError, match=re.escape(path)):
            shape_in(Path(path))
    with pytest.raises(EngineError, match="cannot be steered"):
        shape_in(Path(folder(tmp_path / "dense", '{"architectures": ["LlamaForCausalLM"]}')))


def test_names_of_variants_lead_back_to_their_architecture() -> None:
    for name in ARCHITECTURES:
        variant = variant_name(name)
        assert variant.isidentifier() and name in variant
        assert architecture_of(variant) == name
        assert architecture_of(variant + "1") is None and architecture_of(name) is None
    assert len({variant_name(name) for name in ARCHITECTURES}) == len(ARCHITECTURES)
    assert architecture_of("__path__") is None


def test_a_variant_of_another_vllm_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_steermoe_plugin.variant_names.vllm_version", lambda: "0.32.0+cpu")
    name = variant_name("OlmoeForCausalLM")
    assert name == "SteerableOlmoeForCausalLM_vllm_0_32_0_cpu" and architecture_of(name) == "OlmoeForCausalLM"
    monkeypatch.setattr("vllm_steermoe_plugin.variant_names.vllm_version", lambda: "0.33.0")
    assert architecture_of(name) is None
