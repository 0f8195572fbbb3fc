"""The MoE architectures of vLLM that can be steered, one row each, and the MoE shape that a config has.

`models/unsupported.py` has those that cannot, and why; together they name every architecture of vLLM's registry
that has MoE layers (a test walks it). Where vLLM keeps the classes is not repeated here: its registry says it.
Nothing here imports vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from expert_registry.errors import UnsupportedModelError
from expert_registry.shape import MoEShape
from vllm_steermoe_plugin.models.config_families import FAMILIES, has, integer, read
from vllm_steermoe_plugin.models.unsupported import OTHER_NAMES, REFUSED

TRANSFORMERS = "transformers"
"""Family of the models that vLLM runs by its Transformers backend, whatever their architecture."""
BACKEND = "TransformersMoEForCausalLM"
"""As which vLLM runs those of them for which it has no class."""
BY_CHECKPOINT = "by the checkpoint"
"""The language model of a vision-language model is the architecture that its own text config names."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture that can be steered, in some or all of its configs.

    What its routers do is not said here: it is read from those that vLLM has built (`worker/router_kind.py`).

    Attributes:
        name: in a checkpoint's config and in vLLM's model registry.
        family: key of `FAMILIES`: how the config of the language model tells layers, experts and router.
        language: for models that hold a language model of another architecture: its name, or `BY_CHECKPOINT`.
        changes_logits: whether the model changes the router's logits behind the gate, be it only their dtype.
        passes_gate_on_rocm: whether on ROCm it reads the gate's weights without calling the gate.
        ran: whether the tests run a small random checkpoint of it in the real engine on CPU.
    """

    name: str
    family: str = ""
    language: str = ""
    changes_logits: bool = False
    passes_gate_on_rocm: bool = False
    ran: bool = False


ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        # Text.
        Architecture("AXK1ForCausalLM", "layer types", ran=True),
        Architecture("AfmoeForCausalLM", "dense first", ran=True),
        Architecture("BailingMoeForCausalLM", "bailing", changes_logits=True, ran=True),
        Architecture("BailingMoeV2ForCausalLM", "bailing", changes_logits=True, ran=True),
        Architecture("BailingMoeV2_5ForCausalLM", "bailing", changes_logits=True),
        Architecture("BailingMoeV3ForCausalLM", "dense first"),
        Architecture("BeamForCausalLM", "layer types"),
        Architecture("Cohere2MoeForCausalLM", "layer types", ran=True),
        Architecture("DbrxForCausalLM", "dbrx", ran=True),
        Architecture("DeepseekForCausalLM", "deepseek", ran=True),
        Architecture("DeepseekV2ForCausalLM", "deepseek", ran=True),
        Architecture("DeepseekV3ForCausalLM", "deepseek", ran=True),
        Architecture("DeepseekV32ForCausalLM", "deepseek"),
        Architecture("DeepseekV4ForCausalLM", "deepseek v4"),
        Architecture("Ernie4_5_MoeForCausalLM", "ernie"),
        Architecture("ExaoneMoEForCausalLM", "layer types", ran=True),
        Architecture("ExaoneMoeForCausalLM", "layer types", ran=True),
        Architecture("Gemma4ForCausalLM", "gemma", ran=True),
        Architecture("Glm4MoeForCausalLM", "dense first", ran=True),
        Architecture("Glm4MoeLiteForCausalLM", "deepseek", ran=True),
        Architecture("GlmMoeDsaForCausalLM", "deepseek", ran=True),
        Architecture("GptOssForCausalLM", "every layer", passes_gate_on_rocm=True, ran=True),
        Architecture("GraniteMoeForCausalLM", "every layer", ran=True),
        Architecture("GraniteMoeSWAForCausalLM", "every layer", ran=True),
        Architecture("GraniteMoeSharedForCausalLM", "every layer", ran=True),
        Architecture("HYV3ForCausalLM", "dense first", ran=True),
        Architecture("HYV4ForCausalLM", "layer types"),
        Architecture("K2HorizonForCausalLM", "k2", ran=True),
        Architecture("LagunaForCausalLM", "layer types", changes_logits=True),
        Architecture("Llama4ForCausalLM", "llama", ran=True),
        Architecture("MiMoV2FlashForCausalLM", "mimo", ran=True),
        Architecture("MiMoV2ForCausalLM", "mimo", ran=True),
        Architecture("MiniMaxM2ForCausalLM", "every layer"),
        Architecture("MiniMaxM3SparseForCausalLM", "minimax"),
        Architecture("MistralLarge3ForCausalLM", "deepseek", ran=True),
        Architecture("MixtralForCausalLM", "every layer", ran=True),
        Architecture("OlmoeForCausalLM", "every layer", ran=True),
        Architecture("PanguProMoEV2ForCausalLM", "dense first", ran=True),
        Architecture("PanguUltraMoEForCausalLM", "dense first", ran=True),
        Architecture("Param2MoEForCausalLM", "sarvam", changes_logits=True, ran=True),
        Architecture("PhiMoEForCausalLM", "every layer", ran=True),
        Architecture("Qwen2MoeForCausalLM", "sparse step", ran=True),
        Architecture("Qwen3MoeForCausalLM", "sparse step", ran=True),
        Architecture("SarvamMLAForCausalLM", "sarvam", ran=True),
        Architecture("SarvamMoEForCausalLM", "bailing", changes_logits=True, ran=True),
        Architecture("Step3TextForCausalLM", "step", ran=True),
        Architecture("Step3p5ForCausalLM", "step"),
        Architecture("Step5ForCausalLM", "step"),
        # By vLLM's Transformers backend, where that has put its own router in the place of transformers'.
        Architecture("FlexOlmoForCausalLM", TRANSFORMERS, ran=True),
        Architecture("HunYuanMoEV1ForCausalLM", TRANSFORMERS),
        Architecture("Kolibri1ForCausalLM", TRANSFORMERS),
        Architecture("MellumForCausalLM", TRANSFORMERS, ran=True),
        Architecture(BACKEND, TRANSFORMERS, ran=True),
        Architecture("TransformersMultiModalMoEForCausalLM", TRANSFORMERS),
        # Hybrids of attention and state-space or linear-attention layers.
        Architecture("AliceAIForCausalLM", "every layer"),
        Architecture("Glm5NextForCausalLM", "layer types"),
        Architecture("GraniteMoeHybridForCausalLM", "every layer", ran=True),
        Architecture("JambaForCausalLM", "period"),
        Architecture("KimiLinearForCausalLM", "kimi"),
        Architecture("Lfm2MoeForCausalLM", "dense first", ran=True),
        Architecture("NemotronHForCausalLM", "nemotron"),
        Architecture("Qwen3NextForCausalLM", "sparse step", ran=True),
        Architecture("Qwen3_5MoeForCausalLM", "every layer", ran=True),
        # With eyes or ears. Their own language model, or that of another row.
        Architecture("AriaForConditionalGeneration", "aria", ran=True),
        Architecture("BailingMoeV3VLForConditionalGeneration", language="BailingMoeV3ForCausalLM"),
        Architecture("DeepseekOCR2ForCausalLM", language=BY_CHECKPOINT),
        Architecture("DeepseekOCRForCausalLM", language=BY_CHECKPOINT),
        Architecture("DeepseekVLV2ForCausalLM", language=BY_CHECKPOINT),
        Architecture("Dots3NoteForCausalLM", "deepseek"),
        Architecture("Gemma4ForConditionalGeneration", language="Gemma4ForCausalLM", ran=True),
        Architecture("Gemma4UnifiedForConditionalGeneration", language="Gemma4ForCausalLM"),
        Architecture("Glm4vMoeForConditionalGeneration", language="Glm4MoeForCausalLM", ran=True),
        Architecture("Glm5NextForConditionalGeneration", language="Glm5NextForCausalLM"),
        Architecture("InternS1ForConditionalGeneration", language=BY_CHECKPOINT, ran=True),
        Architecture("InternS1ProForConditionalGeneration", "sparse step"),
        Architecture("InternS2PreviewForConditionalGeneration", language="Qwen3_5MoeForCausalLM", ran=True),
        Architecture("InternVLChatModel", language=BY_CHECKPOINT),
        Architecture("InternVLForConditionalGeneration", language=BY_CHECKPOINT, ran=True),
        Architecture("KimiK25ForConditionalGeneration", language="DeepseekV2ForCausalLM"),
        Architecture("KimiK3ForConditionalGeneration", language="KimiLinearForCausalLM"),
        Architecture("KimiVLForConditionalGeneration", language="DeepseekV2ForCausalLM", ran=True),
        Architecture("Llama4ForConditionalGeneration", language="Llama4ForCausalLM", ran=True),
        Architecture("MiMoV2OmniForCausalLM", language="MiMoV2FlashForCausalLM"),
        Architecture("MiniMaxM3SparseForConditionalGeneration", language="MiniMaxM3SparseForCausalLM"),
        Architecture("NemotronH_Nano_Omni_Reasoning_V3", language=BY_CHECKPOINT),
        Architecture("NemotronH_Nano_VL_V2", language=BY_CHECKPOINT),
        Architecture("NemotronH_Omni_Reasoning_V3", language=BY_CHECKPOINT),
        Architecture("NemotronH_Super_Omni_Reasoning_V3", language=BY_CHECKPOINT),
        Architecture("Ovis2_6_MoeForCausalLM", language=BY_CHECKPOINT),
        Architecture("Qwen3OmniMoeForConditionalGeneration", language="Qwen3MoeForCausalLM"),
        Architecture("Qwen3VLMoeForConditionalGeneration", language="Qwen3MoeForCausalLM", ran=True),
        Architecture("Qwen3_5MoeForConditionalGeneration", language="Qwen3_5MoeForCausalLM", ran=True),
        Architecture("Step3VLForConditionalGeneration", language=BY_CHECKPOINT),
        Architecture("Step3p7ForConditionalGeneration", language=BY_CHECKPOINT),
        Architecture("Step5ForConditionalGeneration", language=BY_CHECKPOINT),
        Architecture("UnlimitedOCRForCausalLM", language=BY_CHECKPOINT),
    )
}

_DIGITS = re.compile(r"\d")
_TEXT_CONFIGS = ("text_config", "thinker_config.text_config", "llm_config", "language_config")
"""Where a config.json keeps the config of the language model."""


def shape_of(config: object, architecture: str | None = None) -> MoEShape:
    """Read the MoE shape from a model's config.

    Args:
        config: vLLM's `hf_config`, or any object with the attributes of a config.json. For a model with eyes or
            ears the outer config, not the language model's.
        architecture: as what vLLM runs it; by default the first architecture of the config that can be steered.

    Raises:
        UnsupportedModelError: this model cannot be steered, or the config lacks what it should have.
    """
    named = read(config, "architectures", None)
    names = [name for name in named if isinstance(name, str)] if isinstance(named, Sequence) else []
    text = _text_config(config)
    if architecture is None and not any(name in ARCHITECTURES or name in REFUSED for name in names):
        # What vLLM has no class for, its Transformers backend runs.
        has_experts = any(has(text, key) for key in FAMILIES[TRANSFORMERS].experts)
        architecture = BACKEND if names and has_experts else None
    row = _row(names if architecture is None else [architecture], names)
    language = _language(row, text)
    family = FAMILIES[language.family]
    counts = [read(text, key) for key in family.experts if has(text, key)]
    # A key that says "none" is a dense model; one that is missing is not a config of this architecture.
    if counts and all(count in (None, 0) for count in counts):
        raise UnsupportedModelError(f"this {row.name} cannot be steered: its config has no routed experts")
    try:
        obstacle = family.obstacle(text)
        if obstacle is None:
            layers = tuple(family.layers(text))
            experts, top_k = integer(text, family.experts), integer(text, family.top_k)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{row.name}: {error}") from None
    if obstacle is not None:
        raise UnsupportedModelError(f"this {row.name} cannot be steered: {obstacle}")
    if not layers:
        raise UnsupportedModelError(f"this {row.name} cannot be steered: none of its layers has routed experts")
    # Of what the backend runs, the checkpoint's own name says which model it is.
    name = names[0] if row.family == TRANSFORMERS and names else row.name
    return MoEShape(name, layers, experts, top_k)


def condition_of(architecture: str) -> str:
    """What a config of this architecture must say so that it can be steered; empty if all of them can."""
    row = ARCHITECTURES[architecture]
    if row.language == BY_CHECKPOINT:
        return "its language model can be"
    return FAMILIES[ARCHITECTURES[row.language or architecture].family].condition


def language_model_of(config: object, architecture: str) -> Architecture:
    """The row of the language model: that of `architecture`, or of what it holds by the config.

    Raises:
        UnsupportedModelError: it holds one that cannot be steered.
    """
    return _language(ARCHITECTURES[architecture], _text_config(config))


def _row(names: Sequence[str], in_config: Sequence[str]) -> Architecture:
    row = next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
    hint = "".join(f". {OTHER_NAMES[name]}" for name in in_config if name in OTHER_NAMES)
    if row is not None and not (hint and row.family == TRANSFORMERS):
        return row
    if row is not None:
        raise UnsupportedModelError(
            f"{row.name} cannot be steered for {in_config[0]}: transformers' own code routes{hint}"
        )
    refused = next((name for name in names if name in REFUSED), None)
    if refused is not None:
        raise UnsupportedModelError(f"{refused} cannot be steered: {REFUSED[refused]}{hint}")
    alike = [match for name in names for match in get_close_matches(name, ARCHITECTURES, n=1, cutoff=0.95)]
    # Another number is another model, not a slip.
    alike = [match for match in alike if all(_DIGITS.sub("", match) != _DIGITS.sub("", name) for name in names)]
    meant = f" (did you mean {alike[0]}?)" if alike else ""
    raise UnsupportedModelError(
        f"this model cannot be steered: {' or '.join(names) or 'a model without a named architecture'}{meant} is not "
        f"known to have experts that can be steered; `steermoe doctor` lists what has{hint}"
    )


def _language(row: Architecture, text: object) -> Architecture:
    if not row.language:
        return row
    name: object = row.language
    if name == BY_CHECKPOINT:
        named = read(text, "architectures", None)
        name = named[0] if isinstance(named, Sequence) and named else _by_model_type(read(text, "model_type", None))
    if isinstance(name, str) and name in ARCHITECTURES and not ARCHITECTURES[name].language:
        return ARCHITECTURES[name]
    why = REFUSED.get(str(name), "it is none that is known to have experts that can be steered")
    raise UnsupportedModelError(f"this {row.name} cannot be steered: its language model is {name}; {why}")


def _by_model_type(model_type: object) -> object:
    """The causal language model of a model type, as vLLM and transformers pair them."""
    wanted = f"{model_type}ForCausalLM".replace("_", "").lower()
    return next((name for name in ARCHITECTURES if name.replace("_", "").lower() == wanted), model_type)


def _text_config(config: object) -> object:
    choose = getattr(config, "get_text_config", None)
    if choose is not None:
        return choose()
    found = (read(config, path, None) for path in _TEXT_CONFIGS)
    return next((text for text in found if isinstance(text, Mapping)), config)
