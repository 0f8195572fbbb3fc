"""Tiny random checkpoints of models whose selection is corrected, and transformers with a slow loop in its router."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.dummies.common import ARIA_VISION
from tests.support.oracle import Roundings, Router, Rules, rewrite_row
from tests.support.tiny import COMMON, DERIVED_HEADS, widen

EXPERTS, TOP_K = 16, 4
_MANY: dict[str, Any] = {
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": TOP_K,
    "first_k_dense_replace": 1,
}
_GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
_NOAUX: dict[str, Any] = {"norm_topk_prob": True, "routed_scaling_factor": 2.5, **_GROUPS}
_LATENT: dict[str, Any] = {
    **DERIVED_HEADS,
    "num_key_value_heads": 2,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}


@dataclass(frozen=True)
class Model:
    """A model's config, and how its router selects.

    Attributes:
        config: of transformers.
        router: a bias in it stands for one that is drawn.
        at_gate: whether it is steered by rewriting its logits.
        extra: written into config.json, where vLLM reads more than transformers.
        within: where its language model keeps its layers.
    """

    config: Callable[[], Any]
    router: Router
    at_gate: bool = False
    extra: tuple[tuple[str, Any], ...] = ()
    within: str = "model"

    @property
    def auto(self) -> Any:
        """The class of transformers that makes and loads it."""
        return transformers.AutoModelForCausalLM if self.within == "model" else transformers.AutoModelForImageTextToText


_BIASED = Router(TOP_K, "sigmoid", bias=(0.0,), renormalize=True, scale=2.5)
_GROUPED = replace(_BIASED, groups=4, kept=2)

MODELS: dict[str, Model] = {
    "AriaForConditionalGeneration": Model(
        lambda: transformers.AriaConfig(
            text_config={
                "model_type": "aria_text",
                **DERIVED_HEADS,
                "intermediate_size": 64,
                "moe_num_experts": EXPERTS,
                "moe_topk": TOP_K,
                "moe_num_shared_experts": 1,
            },
            vision_config=ARIA_VISION,
            projector_patch_to_query_dict={"4": 4},
            image_token_index=3,
        ),
        Router(TOP_K, "softmax"),
        within="model.language_model",
    ),
    "Cohere2MoeForCausalLM": Model(
        lambda: transformers.Cohere2MoeConfig(
            **COMMON | {"tie_word_embeddings": True},
            intermediate_size=32,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            mlp_layer_types=["dense", "sparse", "sparse"],
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            expert_selection_fn="sigmoid",
            norm_topk_prob=True,
        ),
        Router(TOP_K, "sigmoid"),
    ),
    "DeepseekV2ForCausalLM": Model(
        lambda: transformers.DeepseekV2Config(
            **_LATENT, **_MANY, **_GROUPS, topk_method="group_limited_greedy", routed_scaling_factor=2.0
        ),
        Router(TOP_K, "softmax", groups=4, kept=2, renormalize=False, scale=2.0),
    ),
    "DeepseekV3ForCausalLM": Model(
        lambda: transformers.DeepseekV3Config(**_LATENT, **_MANY, **_NOAUX),
        _GROUPED,
        extra=(("topk_method", "noaux_tc"), ("scoring_func", "sigmoid")),
    ),
    "Dots1ForCausalLM": Model(
        lambda: transformers.Dots1Config(**COMMON, **_MANY, **_NOAUX, sliding_window=None), _GROUPED
    ),
    "ExaoneMoeForCausalLM": Model(
        lambda: transformers.ExaoneMoeConfig(
            **COMMON,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            num_shared_experts=1,
            mlp_layer_types=["dense", "sparse", "sparse"],
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            sliding_window=64,
            **_NOAUX,
        ),
        _GROUPED,
    ),
    "FlexOlmoForCausalLM": Model(
        lambda: transformers.FlexOlmoConfig(
            **DERIVED_HEADS, intermediate_size=64, num_experts=EXPERTS, num_experts_per_tok=TOP_K
        ),
        Router(TOP_K, "softmax", renormalize=False),
        at_gate=True,
    ),
    "Glm4MoeForCausalLM": Model(
        lambda: transformers.Glm4MoeConfig(**COMMON, **_MANY, **_NOAUX, use_qk_norm=True), _GROUPED
    ),
    "Lfm2MoeForCausalLM": Model(
        lambda: transformers.Lfm2MoeConfig(
            **DERIVED_HEADS | {"tie_word_embeddings": True},
            intermediate_size=64,
            moe_intermediate_size=32,
            num_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            num_dense_layers=1,
            layer_types=["conv", "full_attention", "conv"],
            use_expert_bias=True,
            norm_topk_prob=True,
        ),
        replace(_BIASED, scale=1.0),
    ),
    "Llama4ForCausalLM": Model(
        lambda: transformers.Llama4TextConfig(
            **COMMON | {"num_hidden_layers": 4},
            intermediate_size=32,
            intermediate_size_mlp=64,
            num_local_experts=EXPERTS,
            num_experts_per_tok=1,
            interleave_moe_layer_step=2,
            attention_chunk_size=128,
        ),
        Router(1, "sigmoid", renormalize=False),
        at_gate=True,
    ),
}


def make_checkpoint(
    architecture: str, folder: Path, offset: float = 0.0, width: int | None = None, **changes: Any
) -> Path:
    """Write a random checkpoint to `folder` (once); correction biases have a deviation of 0.7 about `offset`.

    `width`, if given, is that of hidden states and of experts; `changes` are made to the config.
    """
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    made = MODELS[architecture]
    config = made.config() if width is None else widen(made.config(), width)
    config.update(changes)
    model = made.auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")) or ("experts" in name and "bias" not in name):
                parameter.normal_(std=0.3)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(mean=offset, std=0.7)
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    written |= {"architectures": [architecture], **dict(made.extra)}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


class CorrectedReference:
    """transformers' own model, in which every token's selection is made anew, one expert after the other.

    It computes in `dtype`; weights are those of a model in `rounds_to`, `dtype` unless given.

    Made before vLLM builds the same architecture in this process: its Transformers backend changes the class.
    """

    def __init__(
        self,
        architecture: str,
        folder: Path,
        dtype: torch.dtype = torch.float32,
        rounds_to: torch.dtype | None = None,
    ) -> None:
        made = MODELS[architecture]
        self.made = made
        model = made.auto.from_pretrained(folder, dtype=rounds_to or dtype, experts_implementation="eager")
        self.model: Any = model.to(dtype).eval()
        self.routers: dict[int, tuple[Any, Router]] = {}
        for index, layer in enumerate(self.model.get_submodule(made.within).layers):
            for block in layer.modules():
                for module in block.children():
                    if type(module).__name__.lower().endswith(("topkrouter", "llama4router")):
                        self.routers[index] = module, self._router(module, block)

    def _router(self, module: Any, block: Any) -> Router:
        if self.made.router.bias is None:
            return self.made.router
        bias = module.e_score_correction_bias if hasattr(module, "e_score_correction_bias") else block.expert_bias
        return replace(self.made.router, bias=tuple(bias.double().tolist()))

    def run(
        self, token_ids: list[int], rules: Rules, *, own: bool = False
    ) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
        """Log-probabilities `[T, V]` and, per layer, the sorted experts of each token."""
        logprobs, chosen = self._run([token_ids], rules, own)
        return logprobs[0], chosen

    def run_rounded(
        self, token_ids: list[int], rules: Rules, copies: int
    ) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
        """The same under `Roundings`, each copy by its own chance: `[N, T, V]` and the experts of N * T tokens."""
        with Roundings(seed=0):
            return self._run([token_ids] * copies, rules, own=False)

    def _run(
        self, token_ids: list[list[int]], rules: Rules, own: bool
    ) -> tuple[torch.Tensor, dict[int, list[list[int]]]]:
        chosen: dict[int, list[list[int]]] = {}
        handles = []
        for index, (module, router) in self.routers.items():
            mine = {expert: rule for (at, expert), rule in rules.items() if at == index}
            handles.append(module.register_forward_hook(self._hook(index, router, mine, own, chosen)))
        try:
            with torch.no_grad():
                logits = self.model(torch.tensor(token_ids)).logits
        finally:
            for handle in handles:
                handle.remove()
        return torch.log_softmax(logits.float(), dim=-1), chosen

    def _hook(
        self, index: int, router: Router, rules: dict[int, int], own: bool, chosen: dict[int, list[list[int]]]
    ) -> Callable[..., Any]:
        def steered(output: Any) -> Any:
            logits = next(t for t in output[::-1] if t.is_floating_point() and t.shape[-1] == EXPERTS)
            rows = []
            for row in logits.double().tolist():
                if self.made.at_gate:
                    rewritten = rewrite_row(row, rules, torch.float32)
                    selected = router.select(rewritten)
                    rows.append(dict(zip(selected, router.weigh(rewritten, selected), strict=True)))
                else:
                    rows.append(router.steer(row, rules, own=own))
            chosen[index] = [sorted(row) for row in rows]
            ids = torch.tensor([list(row) for row in rows])
            weights = torch.tensor([list(row.values()) for row in rows], dtype=torch.float32)
            if len(output) == 2:  # Llama 4: scores of all experts, and logits.
                return torch.zeros_like(logits).scatter_(1, ids, weights), logits
            indices = next(t for t in output if not t.is_floating_point())
            return tuple(ids if t is indices else logits if t is logits else weights for t in output)

        def hook(module: Any, args: Any, output: Any) -> Any:
            with _disable_current_modes():  # The selection has no roundings.
                return steered(output)

        return hook
