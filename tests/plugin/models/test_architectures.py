"""From a model's config to its MoE shape, and from a checkpoint's place to its names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expert_registry import MoEShape
from expert_registry.errors import EngineError, SteerMoEError, UnsupportedModelError
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.compat.variant_names import architecture_of, variant_name
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.architectures import ARCHITECTURES, BY_CHECKPOINT, condition_of, shape_of
from vllm_steermoe_plugin.models.checkpoints import names_of, resolve_checkpoint, shape_in
from vllm_steermoe_plugin.models.config_families import FAMILIES
from vllm_steermoe_plugin.models.unsupported import REFUSED

QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}


def config(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{key: value for key, value in (QWEN | changes).items() if value is not ...})


SIMPLE = [name for name, row in ARCHITECTURES.items() if row.family in ("every layer", "sparse step")]


def test_every_architecture_has_its_shape_under_either_name_of_e() -> None:
    for key in ["num_experts", "num_local_experts"]:
        for architecture in SIMPLE:
            found = shape_of(config(**{"architectures": [architecture], "num_experts": ..., key: 32}))
            assert found == MoEShape(architecture, tuple(range(8)), 32, 4)


def like(architecture: str, layers: int, experts: int | None, top_k: int | None, **more: Any) -> dict[str, Any]:
    """A config whose sizes have their usual names; those that are None have others."""
    usual = {"num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": top_k}
    return {"architectures": [architecture], **{key: n for key, n in usual.items() if n is not None}, **more}


DEEPSEEK = like("DeepseekV2ForCausalLM", 6, None, 6, first_k_dense_replace=1, n_routed_experts=64)
BAILING = like("BailingMoeForCausalLM", 4, 64, 6, first_k_dense_replace=2)
JAMBA = like("JambaForCausalLM", 8, 16, 2, expert_layer_period=2, expert_layer_offset=1)
COHERE = like("Cohere2MoeForCausalLM", 4, 8, 2, first_k_dense_replace=0)
STEP = like("Step3TextForCausalLM", 5, None, None, moe_num_experts=48, moe_top_k=3)
GEMMA = like("Gemma4ForCausalLM", 3, 128, None, top_k_experts=8)
DBRX = {"architectures": ["DbrxForCausalLM"], "n_layers": 3, "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4}}
K2 = QWEN | {"architectures": ["K2HorizonForCausalLM"], "router_score_func": "softmax", "moe_gate_bias": False}
GLM = like("Glm4MoeForCausalLM", 5, None, 8, first_k_dense_replace=3, n_routed_experts=160)
LFM2 = like("Lfm2MoeForCausalLM", 4, 32, 4, num_dense_layers=2)
SARVAM = like("SarvamMLAForCausalLM", 8, 16, 4, first_k_dense_replace=1, moe_layer_freq=2)
KIMI = like("KimiLinearForCausalLM", 4, 256, None, num_experts_per_token=8, first_k_dense_replace=1)
MIMO = like("MiMoV2FlashForCausalLM", 3, None, 8, n_routed_experts=256, moe_layer_freq=[0, 1, 1])
MINIMAX = like("MiniMaxM3SparseForCausalLM", 3, None, 4, num_local_experts=128, moe_layer_freq=[0, 0, 1])
NEMOTRON = like("NemotronHForCausalLM", 99, None, 6, n_routed_experts=128, hybrid_override_pattern="MEM*E-")
LLAMA = like("Llama4ForCausalLM", 4, None, 1, num_local_experts=16, interleave_moe_layer_step=2)
ERNIE = like("Ernie4_5_MoeForCausalLM", 6, None, None, moe_num_experts=64, moe_k=6, moe_layer_start_index=1)
ARIA = like("AriaForConditionalGeneration", 2, None, None, moe_num_experts=64, moe_topk=6)
V4 = like("DeepseekV4ForCausalLM", 6, None, 6, n_routed_experts=256, num_hash_layers=3)
BACKEND = like("FlexOlmoForCausalLM", 2, 16, 4)
GRANITE = like("GraniteMoeHybridForCausalLM", 3, None, 6, num_local_experts=62)


def test_each_family_tells_its_layers_experts_and_top_k() -> None:
    for values, layers, experts, top_k in [
        (DEEPSEEK, (1, 2, 3, 4, 5), 64, 6),
        (DEEPSEEK | {"moe_layer_freq": 2}, (2, 4), 64, 6),
        (DEEPSEEK | {"n_group": 1, "topk_group": 1, "topk_method": "greedy"}, (1, 2, 3, 4, 5), 64, 6),
        (DEEPSEEK | {"n_group": 8, "topk_group": 8}, (1, 2, 3, 4, 5), 64, 6),
        (DEEPSEEK | {"n_group": None, "topk_group": None}, (1, 2, 3, 4, 5), 64, 6),
        (BAILING, (2, 3), 64, 6),
        (BAILING | {"score_function": "softmax", "router_dtype": None, "n_group": None}, (2, 3), 64, 6),
        (BAILING | {"router_dtype": "fp32"}, (2, 3), 64, 6),
        (JAMBA, (1, 3, 5, 7), 16, 2),
        (JAMBA | {"expert_layer_period": 3, "expert_layer_offset": 2}, (2, 5), 16, 2),
        (COHERE, (0, 1, 2, 3), 8, 2),
        (COHERE | {"mlp_layer_types": ["dense", "dense", "sparse", "dense"]}, (2,), 8, 2),
        (COHERE | {"first_k_dense_replace": 1}, (1, 2, 3), 8, 2),
        (STEP, (1, 2, 3, 4), 48, 3),
        (STEP | {"moe_layers_enum": "2, 4"}, (2, 4), 48, 3),
        (STEP | {"moe_layers_enum": (1, 3)}, (1, 3), 48, 3),
        (GEMMA, (0, 1, 2), 128, 8),
        (DBRX, (0, 1, 2), 16, 4),
        (K2, tuple(range(8)), 16, 4),
        (GRANITE, (0, 1, 2), 62, 6),
        # What a router does is not in the way of any.
        (DEEPSEEK | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 8}, (1, 2, 3, 4, 5), 64, 6),
        (BAILING | {"score_function": "sigmoid", "moe_router_enable_expert_bias": True}, (2, 3), 64, 6),
        (K2 | {"router_score_func": "sigmoid", "moe_gate_bias": True}, tuple(range(8)), 16, 4),
        (GLM, (3, 4), 160, 8),
        (LFM2, (2, 3), 32, 4),
        (SARVAM, (1, 3, 5, 7), 16, 4),
        (KIMI, (1, 2, 3), 256, 8),
        (MIMO, (1, 2), 256, 8),
        (MINIMAX, (2,), 128, 4),
        (MINIMAX | {"moe_layer_freq": None}, (0, 1, 2), 128, 4),
        (NEMOTRON, (1, 4), 128, 6),
        (NEMOTRON | {"hybrid_override_pattern": None, "layers_block_type": ["mamba", "moe"]}, (1,), 128, 6),
        (LLAMA, (1, 3), 16, 1),
        (ERNIE, (1, 2, 3, 4, 5), 64, 6),
        (ERNIE | {"moe_layer_interval": 2, "moe_layer_end_index": 4}, (1, 3), 64, 6),
        (ARIA, (0, 1), 64, 6),
        (V4, (3, 4, 5), 256, 6),
        (V4 | {"num_hash_layers": None, "mlp_layer_types": ["hash_moe"] + ["moe"] * 5}, (1, 2, 3, 4, 5), 256, 6),
        (BACKEND, (0, 1), 16, 4),
        (BACKEND | {"mlp_layer_types": ["dense", "sparse"]}, (1,), 16, 4),
    ]:
        assert shape_of(SimpleNamespace(**values)) == MoEShape(values["architectures"][0], layers, experts, top_k)


def test_a_model_that_cannot_be_steered_is_named_with_the_reason() -> None:
    for values, reason in [
        (DEEPSEEK | {"n_routed_experts": None}, "no routed experts"),
        (JAMBA | {"num_experts": 1}, "none of its layers"),
        (COHERE | {"mlp_layer_types": ["dense"] * 4}, "none of its layers"),
        (GEMMA | {"num_experts": None}, "no routed experts"),
        (K2 | {"mova_num_experts": 8}, "its attention has experts"),
        (GRANITE | {"num_local_experts": 0}, "no routed experts"),
        (MIMO | {"moe_layer_freq": None}, "none of its layers"),
        (V4 | {"vision_n_layers": 24}, "another bias for the tokens of images"),
        ({"architectures": ["InklingForCausalLM"]}, "one normalisation with experts that are always on"),
        ({"architectures": ["LongcatFlashForCausalLM"]}, "some of its experts compute nothing"),
        ({"architectures": ["NemotronHPuzzleForCausalLM"]}, "differ in how many experts"),
        ({"architectures": ["DeepseekV41ForCausalLM"]}, "some of a step's tokens"),
    ]:
        with pytest.raises(
            UnsupportedModelError, match=rf"(?s){values['architectures'][0]}.* cannot be steered: .*{reason}"
        ):
            shape_of(SimpleNamespace(**values))


def test_a_config_that_cannot_be_read_is_an_error_and_not_a_dense_model() -> None:
    for values, message in [
        (DEEPSEEK | {"first_k_dense_replace": None}, "DeepseekV2ForCausalLM.*no integer first_k_dense_replace"),
        (DEEPSEEK | {"moe_layer_freq": [0, 1, 1]}, "moe_layer_freq is .0, 1, 1."),
        (STEP | {"moe_layers_enum": 3}, "3 is not a list of layers"),
        (COHERE | {"mlp_layer_types": ["dense"]}, "mlp_layer_types is .'dense'."),
        (MINIMAX | {"moe_layer_freq": [1]}, "moe_layer_freq is .1., not one entry for each layer"),
        (V4 | {"num_hash_layers": "3"}, "number of its hash layers is '3'"),
        (NEMOTRON | {"hybrid_override_pattern": None, "layers_block_type": 4}, "layers_block_type is 4"),
        (LFM2 | {"num_dense_layers": ...}, "no integer first_k_dense_replace or num_dense_layers"),
        (QWEN | {"mlp_only_layers": "0,1"}, "not a list of layers"),
        (QWEN | {"decoder_sparse_step": "2"}, "decoder_sparse_step is '2'"),
    ]:
        given = {key: value for key, value in values.items() if value is not ...}
        with pytest.raises(EngineError, match=message) as caught:
            shape_of(SimpleNamespace(**given))
        assert "cannot be steered" not in str(caught.value)


LANGUAGE: dict[str, Any] = {key: value for key, value in QWEN.items() if key != "architectures"}


def test_the_shape_of_a_model_with_eyes_is_that_of_its_language_model() -> None:
    for architecture, place in [
        ("Qwen3VLMoeForConditionalGeneration", "text_config"),
        ("Qwen3OmniMoeForConditionalGeneration", "thinker_config"),
        ("InternVLChatModel", "llm_config"),
        ("InternVLForConditionalGeneration", "text_config"),
        ("InternS1ForConditionalGeneration", "text_config"),
        ("Ovis2_6_MoeForCausalLM", "llm_config"),
    ]:
        text = LANGUAGE | {"model_type": "qwen3_moe", "mlp_only_layers": [1]}
        values = {"architectures": [architecture], place: {"text_config": text} if place == "thinker_config" else text}
        expected = MoEShape(architecture, (0, 2, 3, 4, 5, 6, 7), 16, 4)
        assert shape_of(SimpleNamespace(**values)) == expected
        as_vllm_has_it = SimpleNamespace(
            architectures=[architecture], num_experts=None, get_text_config=lambda text=text: SimpleNamespace(**text)
        )
        assert shape_of(as_vllm_has_it) == expected


def test_a_language_model_that_cannot_be_steered_is_named() -> None:
    for language, reason in [
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM; it is none that is known"),
        ({"model_type": "qwen2"}, "qwen2; it is none that is known"),
        ({"architectures": ["LongcatFlashForCausalLM"]}, "LongcatFlashForCausalLM; its selection is corrected"),
        ({"architectures": ["Qwen3VLMoeForConditionalGeneration"]}, "it is none that is known"),
        (DEEPSEEK | {"n_routed_experts": None}, "no routed experts"),
    ]:
        with pytest.raises(UnsupportedModelError, match=rf"InternVLChatModel cannot be steered: .*{reason}"):
            shape_of(SimpleNamespace(architectures=["InternVLChatModel"], text_config=language))


def test_as_what_vllm_runs_a_model_decides() -> None:
    with pytest.raises(UnsupportedModelError, match="Transformers backend"):
        shape_of(config(), "TransformersForCausalLM")
    # Under the checkpoint's own name, whoever runs it.
    assert shape_of(config(), "TransformersMoEForCausalLM") == shape_of(config())
    with pytest.raises(UnsupportedModelError, match=r"own code routes.*PhiMoEForCausalLM.*--hf-overrides"):
        shape_of(config(architectures=["PhimoeForCausalLM"]), "TransformersMoEForCausalLM")
    assert shape_of(config(architectures=["Other"]), "OlmoeForCausalLM").architecture == "OlmoeForCausalLM"


def test_no_architecture_is_both_steerable_and_refused() -> None:
    assert ARCHITECTURES.keys().isdisjoint(REFUSED)
    for row in ARCHITECTURES.values():
        assert bool(row.family) != bool(row.language)
        assert not row.family or row.family in FAMILIES
        if row.language and row.language != BY_CHECKPOINT:
            assert ARCHITECTURES[row.language].family
        assert condition_of(row.name) or row.language or FAMILIES[row.family].condition == ""


def test_dense_layers_have_no_experts() -> None:
    for dense, step, layers in [
        ([], 1, (0, 1, 2, 3, 4, 5, 6, 7)),
        (None, None, (0, 1, 2, 3, 4, 5, 6, 7)),
        ([0, 5], 1, (1, 2, 3, 4, 6, 7)),
        ([], 2, (1, 3, 5, 7)),
        ([3], 2, (1, 5, 7)),
        ([], 3, (2, 5)),
        ([0, 100], 4, (3, 7)),
    ]:
        assert shape_of(config(mlp_only_layers=dense, decoder_sparse_step=step)).layers == layers
        by_hand = [i for i in range(8) if i not in (dense or []) and (i + 1) % (step or 1) == 0]
        assert list(layers) == by_hand


def test_the_first_architecture_that_can_be_steered_counts() -> None:
    assert shape_of(config(architectures=["Other", "OlmoeForCausalLM"])).architecture == "OlmoeForCausalLM"


def test_what_cannot_be_steered_is_refused_by_name() -> None:
    rows: list[tuple[Any, ...]] = [
        (
            {"architectures": ["OlmoeForCausalLMs"], "num_experts": ...},
            r"did you mean OlmoeForCausalLM.*steermoe doctor",
        ),
        ({"architectures": ["LlamaForCausalLM"], "num_experts": ...}, r"LlamaForCausalLM is not known to have experts"),
        ({"architectures": []}, r"cannot be steered"),
        ({"architectures": None}, r"cannot be steered"),
        ({"architectures": ...}, r"cannot be steered"),
        ({"num_hidden_layers": ...}, r"Qwen3MoeForCausalLM: the config has no integer num_hidden_layers"),
        ({"num_experts": ...}, r"no integer num_experts or num_local_experts"),
        ({"num_experts": "16"}, r"no integer num_experts"),
        ({"num_experts_per_tok": None}, r"no integer num_experts_per_tok"),
    ]
    assert not_refused(lambda changes: shape_of(config(**changes)), rows, EngineError) == []


def test_a_shape_that_cannot_be_is_refused() -> None:
    for layers in ((), (1, 0), (0, 0), (-1, 0)):
        with pytest.raises(SteerMoEError, match="ascending"):
            MoEShape("X", layers, 4, 2)
    all_dense = {"mlp_only_layers": list(range(8))}
    for changes in ({"num_experts_per_tok": 17}, {"num_experts": 0}, all_dense, {"num_hidden_layers": 0}):
        with pytest.raises(SteerMoEError, match="Qwen3MoeForCausalLM"):
            shape_of(config(**changes))


def folder(place: Path, text: str | None = None) -> str:
    place.mkdir(parents=True)
    if text is not None:
        (place / "config.json").write_text(text)
    return str(place)


def test_a_hub_name_is_its_own_name_and_aliases_follow() -> None:
    assert names_of("org/Model") == ["org/Model"]
    assert names_of("org/Model", ["served", "org/Model"]) == ["org/Model", "served"]


def test_the_lab_is_known_however_it_is_reached(tmp_path: Path) -> None:
    assert (
        resolve_checkpoint(lab_checkpoint.NAME) == str(lab_checkpoint.MODEL_DIR)
        and resolve_checkpoint("org/model") == "org/model"
    )
    link = tmp_path / "link"
    link.symlink_to(lab_checkpoint.MODEL_DIR)
    for name in (str(lab_checkpoint.MODEL_DIR), str(lab_checkpoint.MODEL_DIR / "." / ""), str(link)):
        assert names_of(name)[0] == lab_checkpoint.NAME
    assert shape_in(lab_checkpoint.MODEL_DIR).architecture in ARCHITECTURES


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


def test_a_folder_without_a_readable_config_still_has_its_name(tmp_path: Path) -> None:
    # The front end asks for the names of every model that vLLM serves, also of those that nobody steers.
    for number, text in enumerate((None, "", "[]", "{")):
        path = folder(tmp_path / f"mistral-format-{number}", text)
        assert names_of(path, ["served"]) == [path, "served"]


def test_a_shape_is_read_from_a_folder_or_refused_by_its_path(tmp_path: Path) -> None:
    assert shape_in(Path(folder(tmp_path / "good", json.dumps(QWEN)))).num_experts == 16
    for number, text in enumerate((None, "", "[]", "{", '{"a": NaN')):
        path = folder(tmp_path / str(number), text)
        with pytest.raises(UnsupportedModelError, match=re.escape(path)):
            shape_in(Path(path))
    with pytest.raises(UnsupportedModelError, match="cannot be steered"):
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
    monkeypatch.setattr("vllm_steermoe_plugin.compat.variant_names.vllm_version", lambda: "0.32.0+cpu")
    name = variant_name("OlmoeForCausalLM")
    assert name == "SteerableOlmoeForCausalLM_vllm_0_32_0_cpu" and architecture_of(name) == "OlmoeForCausalLM"
    monkeypatch.setattr("vllm_steermoe_plugin.compat.variant_names.vllm_version", lambda: "0.33.0")
    assert architecture_of(name) is None
