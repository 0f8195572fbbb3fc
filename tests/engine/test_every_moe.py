"""Every MoE architecture of vLLM: none unclassified, and the steerable ones that this machine can run do run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.alone import run_alone
from tests.support.corrected import MODELS
from tests.support.dummies import DUMMIES
from tests.support.dummies.corrected import CORRECTED
from tests.support.folders import ROOT
from tests.support.model_sources import architectures_with_experts, registry
from tests.support.run_dummies import CANNOT_GENERATE, CANNOT_START, NOT_IMPORTED, PROMPT_TOKENS
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
    "AriaForConditionalGeneration": [0, 1, 2],
    "FlexOlmoForCausalLM": [0, 1, 2],
    "Llama4ForCausalLM": [1, 3],
    "Llama4ForConditionalGeneration": [1, 3],
    "SolarOpenForCausalLM": [0, 1, 2],
}
"""MoE layers of the dummy models, counted by hand; of those that are not named, the first of three layers is dense."""

BIASED, GROUPS = "sigmoid + bias, renormalized", "sigmoid + bias, 2 of 4 groups, renormalized"
KINDS = {
    "AXK1ForCausalLM": GROUPS,
    "AfmoeForCausalLM": BIASED + ", times 2.5",
    "AfmoeForCausalLM/softmax": "softmax + bias, times 2.5",
    "AriaForConditionalGeneration": "softmax, renormalized",
    "BailingMoeV2ForCausalLM/sigmoid": GROUPS + ", times 2.5",
    "BailingMoeV2_5ForCausalLM": GROUPS,
    "BailingMoeV3ForCausalLM": GROUPS + ", times 2.5",
    "Cohere2MoeForCausalLM/sigmoid": "sigmoid, renormalized",
    "DeepseekV2ForCausalLM/groups": "softmax, 2 of 4 groups",
    "DeepseekV3ForCausalLM/sigmoid": GROUPS,
    "Dots1ForCausalLM": GROUPS,
    "Ernie4_5_MoeForCausalLM": "softmax + bias, renormalized",
    "ExaoneMoEForCausalLM": BIASED + ", times 2.5",
    "ExaoneMoeForCausalLM": BIASED + ", times 2.5",
    "FlexOlmoForCausalLM": "softmax",
    "Glm4MoeForCausalLM": BIASED,
    "Glm4MoeForCausalLM/groups": GROUPS,
    "Glm4MoeLiteForCausalLM": BIASED,
    "Glm4vMoeForConditionalGeneration": BIASED,
    "GlmMoeDsaForCausalLM": BIASED,
    "HYV3ForCausalLM": BIASED + ", times 2.5",
    "KimiVLForConditionalGeneration": GROUPS,
    "Lfm2MoeForCausalLM": BIASED,
    "Lfm2MoeForCausalLM/unbiased": "sigmoid, renormalized",
    "Llama4ForCausalLM": "sigmoid, by Llama4MoE",
    "Llama4ForConditionalGeneration": "sigmoid, by Llama4MoE",
    "MellumForCausalLM": "softmax, renormalized",
    "MiMoV2FlashForCausalLM": BIASED,
    "MiMoV2ForCausalLM": BIASED,
    "PanguProMoEV2ForCausalLM": BIASED,
    "PanguUltraMoEForCausalLM": BIASED,
    "Param2MoEForCausalLM": GROUPS + ", times 2.5",
    "SarvamMLAForCausalLM": GROUPS + ", times 2.5",
    "SarvamMoEForCausalLM": BIASED + ", times 2.5",
    "SolarOpenForCausalLM": GROUPS,
}
"""Routers of the dummy models, by their configs. (Some models scale the output instead of the weights.)"""
NOT_BUILT = {
    "DeepseekV32ForCausalLM": "Sparse Attention is not supported on CPU",
    "InternS1ProForConditionalGeneration": "Error",
    "KimiK25ForConditionalGeneration": "meta tensor",
    "Step3p5ForCausalLM": "vLLM's CPU build selects by a sigmoid only with use_grouped_topk",
}
"""Of which vLLM 0.32 builds nothing on a CPU, with what it then says."""

GPU_ALONE = {"Dots3NoteForCausalLM"}
"""Whose files of vLLM cannot be imported on a CPU."""
FROM_THE_REGISTRY = (
    "Gemma4ForConditionalGeneration",
    "Glm4vMoeForConditionalGeneration",
    "InternS1ForConditionalGeneration",
    "InternVLForConditionalGeneration",
    "KimiVLForConditionalGeneration",
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
    "BailingMoeV2ForCausalLM/sigmoid",
    "HYV3ForCausalLM",
    "SolarOpenForCausalLM",
)
"""One for each kind of router, and one of a registered language model: these run each time, the others each night."""
IN_A_PROCESS = 16
STARTED = [name for name in DUMMIES if name not in CANNOT_START]
RUN = [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.nightly) for name in STARTED]
GENERATE = [case for case, name in zip(RUN, STARTED, strict=True) if name not in CANNOT_GENERATE]


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = (item.callspec.params for item in request.session.items if hasattr(item, "callspec"))
    asked = {*FAMILIES, *(params.get("architecture") for params in cases)}
    names = [name for name in DUMMIES if name in asked]
    found: dict[str, Any] = {}
    # Some in a process: each keeps its engines. The last is of none, and looks at all else.
    for start in range(0, len(names) + IN_A_PROCESS, IN_A_PROCESS):
        found |= run_alone(
            "import sys; from tests.support import run_dummies; run_dummies.main(*sys.argv[1:])",
            str(tmp_path_factory.mktemp("dummies")),
            *names[start : start + IN_A_PROCESS],
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
    ran = {*CONFIGS, *MODELS, *(name.partition("/")[0] for name in STARTED)} - CANNOT_GENERATE.keys()
    by_the_backend = {"Dots1ForCausalLM", "SolarOpenForCausalLM"}
    assert {name for name, row in ARCHITECTURES.items() if row.ran} == ran - by_the_backend | {
        "TransformersMoEForCausalLM"
    }
    assert {*LAYERS, *CANNOT_START, *CANNOT_GENERATE} <= DUMMIES.keys()
    assert DUMMIES.keys() >= KINDS.keys() == CORRECTED.keys() - NOT_BUILT.keys()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found: dict[str, Any] = run_alone(
        "import sys; from tests.support import build_dummies; build_dummies.main(*sys.argv[1:])",
        str(tmp_path_factory.mktemp("built")),
        *CORRECTED,
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests/support/stand_ins'}",
    )
    return found


@pytest.mark.parametrize("name", KINDS)
def test_what_vllm_builds_has_the_layers_of_its_config_and_a_known_router(name: str, built: dict[str, Any]) -> None:
    found, layers = built[name], LAYERS.get(name, [1, 2])
    assert "error" not in found, found["error"]
    assert found["architecture"] == name.partition("/")[0]
    assert (found["layers"], found["kinds"]) == (layers, [KINDS[name]])
    at_gate = name in ("FlexOlmoForCausalLM", "MellumForCausalLM") or name.startswith("Llama4")
    assert found["gate"] == [at_gate] * len(layers)


@pytest.mark.parametrize("name", NOT_BUILT)
def test_what_vllm_does_not_build_on_a_cpu_is_known(name: str, built: dict[str, Any]) -> None:
    """Should it be built one day, it belongs among the others."""
    assert NOT_BUILT[name] in built[name]["error"]


def test_vllm_treats_each_variant_as_its_own_class(seen: dict[str, Any]) -> None:
    found: dict[str, list[str]] = seen["classes"]
    assert found.keys() == ARCHITECTURES.keys() & BUILT_IN_MODELS.load().keys()
    gpu_alone = {name for name, wrong in found.items() if wrong == [NOT_IMPORTED]}
    assert gpu_alone <= GPU_ALONE
    assert {name: wrong for name, wrong in found.items() if wrong and name not in gpu_alone} == {}


@pytest.mark.parametrize("architecture", RUN)
def test_each_layer_is_bound_once_to_one_state(architecture: str, seen: dict[str, Any]) -> None:
    found = seen[architecture]
    assert "error" not in found, found["error"]
    assert found["class"][0] == "vllm_steermoe_plugin.worker.variants"
    layers, top_k = LAYERS.get(architecture, [1, 2]), 1 if architecture.startswith("Llama4") else 2
    assert (found["layers"], found["experts"], found["top_k"]) == (layers, 8, top_k)
    assert found["rows"] == list(range(len(layers))) and found["states"] == 1
    assert found["variants"] == (2 if architecture in FROM_THE_REGISTRY else 1)
    assert found["bound"] == 1


@pytest.mark.parametrize("architecture", GENERATE)
def test_activated_experts_are_always_selected_and_unsteered_requests_are_untouched(
    architecture: str, seen: dict[str, Any]
) -> None:
    found, layers = seen[architecture], len(LAYERS.get(architecture, [1, 2]))
    assert "error" not in found, found["error"]
    assert found["tokens"] == [PROMPT_TOKENS, PROMPT_TOKENS]
    assert found["selections"] == [[found["top_k"] * PROMPT_TOKENS] * layers] * 2
    unsteered, steered = found["activated"]
    assert steered == [PROMPT_TOKENS] * layers and all(count < PROMPT_TOKENS for count in unsteered)
    unsteered, steered = found["deactivated"]
    assert steered == [0] * layers and all(count > 0 for count in unsteered)
    assert found["as_unbound"] and found["as_beside"]
    assert found["moved"] > 1e-4


def test_a_config_that_cannot_be_steered_is_served_and_steering_is_refused(seen: dict[str, Any]) -> None:
    found = seen["served"]
    assert not found["bound"] and found["scored"] == PROMPT_TOKENS - 1
    assert "DeepseekForCausalLM cannot be steered: its config has no routed experts" in found["refusal"]


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

    served = SimpleNamespace(is_submodel_config=is_part, runner_type=runner)
    config = SimpleNamespace(model_config=served, additional_config={})
    model = Variant(vllm_config=config, prefix=prefix)
    assert model.prefix == prefix and (model.steering_state == "state") == is_bound
