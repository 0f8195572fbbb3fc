"""Every MoE architecture of vLLM: none unclassified, and the steerable ones that this machine can run do run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.alone import run_alone
from tests.support.dummies import DUMMIES
from tests.support.folders import ROOT
from tests.support.model_sources import architectures_with_experts, registry
from tests.support.run_dummies import CANNOT_GENERATE, PROMPT_TOKENS
from tests.support.tiny import CONFIGS
from vllm_steermoe_plugin.compat.symbols.registry import BUILT_IN_MODELS
from vllm_steermoe_plugin.models.architectures import ARCHITECTURES
from vllm_steermoe_plugin.models.unsupported import REFUSED

LAYERS = {
    "BailingMoeForCausalLM": [1, 2],
    "BailingMoeV2ForCausalLM": [1, 2],
    "Cohere2MoeForCausalLM": [1, 2],
    "DbrxForCausalLM": [0, 1],
    "DeepseekForCausalLM": [1, 2],
    "DeepseekV2ForCausalLM": [1, 2],
    "DeepseekV3ForCausalLM": [1, 2],
    "Gemma4ForCausalLM": [0, 1, 2],
    "Gemma4ForConditionalGeneration": [0, 1, 2],
    "GraniteMoeHybridForCausalLM": [0, 1, 2],
    "GraniteMoeSWAForCausalLM": [0, 1, 2],
    "InternS1ForConditionalGeneration": [0, 1, 2],
    "InternS2PreviewForConditionalGeneration": [0, 1, 2],
    "InternVLForConditionalGeneration": [0, 1, 2],
    "JambaForCausalLM": [1, 3],
    "K2HorizonForCausalLM": [0, 1, 2],
    "MistralLarge3ForCausalLM": [1, 2],
    "Qwen3NextForCausalLM": [1, 2],
    "Qwen3VLMoeForConditionalGeneration": [0, 1, 2],
    "Qwen3_5MoeForCausalLM": [0, 1, 2],
    "Qwen3_5MoeForConditionalGeneration": [0, 1, 2],
    "Step3TextForCausalLM": [1, 2],
}
"""MoE layers of the dummy models, counted by hand."""

FROM_THE_REGISTRY = (
    "Gemma4ForConditionalGeneration",
    "InternS1ForConditionalGeneration",
    "InternVLForConditionalGeneration",
)
"""These take their language model from vLLM's registry, so that one is a variant too, and must not be bound again."""


NEW_IN_0_33 = {
    "AliceAIForCausalLM",
    "BeamForCausalLM",
    "ClefFlashForJointSchema",
    "FlintForCausalLM",
    "Kolibri1ForCausalLM",
    "MiniCPMOcrForConditionalGeneration",
    "MuseSparkForConditionalGeneration",
    "Step5ForCausalLM",
    "Step5ForConditionalGeneration",
    "Step5MTP",
    "TransformersMoEForMTP",
}
"""With experts."""

FAMILIES = (
    "Cohere2MoeForCausalLM",
    "DbrxForCausalLM",
    "DeepseekV2ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "Qwen3NextForCausalLM",
)
"""One for each kind of router, and one of a registered language model: these run each time, the others each night."""
RUN = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.nightly) for name in DUMMIES]
GENERATE = [case for case, name in zip(RUN, DUMMIES, strict=True) if name not in CANNOT_GENERATE]


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = (item.callspec.params for item in request.session.items if hasattr(item, "callspec"))
    asked = {*FAMILIES, *(params.get("architecture") for params in cases)}
    found: dict[str, Any] = run_alone(
        "import sys; from tests.support import run_dummies; run_dummies.main(*sys.argv[1:])",
        str(tmp_path_factory.mktemp("dummies")),
        *(name for name in DUMMIES if name in asked),
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests/support/stand_ins'}",
    )
    return found


def test_every_architecture_of_vllm_with_experts_is_classified() -> None:
    """A new vLLM that brings a new MoE model fails here: it belongs in a table, by what its router does."""
    found = architectures_with_experts()
    assert len(found) > 150, "the search no longer finds what it should"
    unclassified = {name: sorted(signs) for name, signs in found.items() if name not in {*ARCHITECTURES, *REFUSED}}
    assert unclassified == {}


def test_the_tables_name_architectures_that_vllm_has() -> None:
    known = registry()
    assert BUILT_IN_MODELS.load().keys() == known.keys()
    assert {*ARCHITECTURES, *REFUSED} - known.keys() == (set() if known.keys() >= NEW_IN_0_33 else NEW_IN_0_33)


def test_the_search_finds_experts_directly_by_inheritance_and_inside_and_none_where_there_are_none() -> None:
    found = architectures_with_experts()
    assert all(found[name] for name in ("OlmoeForCausalLM", "Llama4ForConditionalGeneration", "InternVLChatModel"))
    for name in ("LlamaForCausalLM", "BertModel", "MambaForCausalLM", "WhisperForConditionalGeneration"):
        assert name in registry() and name not in found


def test_the_table_says_what_is_run_here() -> None:
    ran = {*CONFIGS, *DUMMIES} - CANNOT_GENERATE.keys()
    assert {name for name, row in ARCHITECTURES.items() if row.ran} == ran
    assert DUMMIES.keys() == LAYERS.keys()


def test_vllm_treats_each_variant_as_its_own_class(seen: dict[str, Any]) -> None:
    assert seen["classes"] == {name: [] for name in ARCHITECTURES}


@pytest.mark.parametrize("architecture", RUN)
def test_each_layer_is_bound_once_to_one_state(architecture: str, seen: dict[str, Any]) -> None:
    found = seen[architecture]
    assert "error" not in found, found["error"]
    assert found["class"][0] == "vllm_steermoe_plugin.worker.variants"
    assert (found["layers"], found["experts"], found["top_k"]) == (LAYERS[architecture], 8, 2)
    assert found["gates"] == list(range(len(LAYERS[architecture]))) and found["states"] == 1
    assert found["variants"] == (2 if architecture in FROM_THE_REGISTRY else 1)
    assert found["bound"] == 1


@pytest.mark.parametrize("architecture", GENERATE)
def test_activated_experts_are_always_selected_and_unsteered_requests_are_untouched(
    architecture: str, seen: dict[str, Any]
) -> None:
    found, layers = seen[architecture], len(LAYERS[architecture])
    assert "error" not in found, found["error"]
    assert found["tokens"] == [PROMPT_TOKENS, PROMPT_TOKENS]
    assert found["selections"] == [[2 * PROMPT_TOKENS] * layers] * 2
    unsteered, steered = found["activated"]
    assert steered == [PROMPT_TOKENS] * layers and all(count < PROMPT_TOKENS for count in unsteered)
    unsteered, steered = found["deactivated"]
    assert steered == [0] * layers and all(count > 0 for count in unsteered)
    assert found["as_unbound"] and found["as_beside"]
    assert found["moved"] > 1e-4


def test_a_config_that_cannot_be_steered_is_served_and_steering_is_refused(seen: dict[str, Any]) -> None:
    found = seen["served"]
    assert not found["bound"] and found["scored"] == PROMPT_TOKENS - 1
    assert "DeepseekV2ForCausalLM cannot be steered: its router scores with sigmoid" in found["refusal"]


def test_encoders_alone_are_left_to_vllm_and_steering_is_refused(seen: dict[str, Any]) -> None:
    assert not seen["encoders"]["bound"]
    assert "runs only its encoders" in seen["encoders"]["refusal"]


def test_a_draft_of_the_same_architecture_is_not_bound(seen: dict[str, Any]) -> None:
    found = seen["draft"]
    assert found["main"] and not found["draft"] and found["class"] == "vllm_steermoe_plugin.worker.variants"
    assert found["moved"] > 1e-4


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ("custom", "selects with token_choice_with_bias, of which it is not known what it does"),
        ("layers", "found MoE layers [1, 2] but expected [0, 1, 2]"),
        ("bias", "should be softmax + bias, renormalized, but it selects other experts"),
    ],
)
def test_what_the_table_admits_by_mistake_is_refused_at_start(wrong: str, reason: str, seen: dict[str, Any]) -> None:
    said = seen["refused"][wrong]
    assert reason in said and '"enabled": false' in said


@pytest.mark.parametrize(
    ("is_part", "runner", "is_bound"), [(False, "generate", True), (True, "generate", False), (False, "draft", False)]
)
@pytest.mark.parametrize("prefix", ["", "language_model"])
def test_a_part_of_another_model_or_a_draft_is_not_bound(
    is_part: bool, runner: str, is_bound: bool, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_steermoe_plugin.worker import variants

    monkeypatch.setattr(variants, "bind_model", lambda model, config: "state")

    class Upstream:
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            self.prefix = prefix

    class Variant(variants.SteerableMixin, Upstream):
        pass

    config = SimpleNamespace(model_config=SimpleNamespace(is_submodel_config=is_part, runner_type=runner))
    model = Variant(vllm_config=config, prefix=prefix)
    assert model.prefix == prefix and (model.steering_state == "state") == is_bound
