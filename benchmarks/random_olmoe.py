"""A random checkpoint of OLMoE's architecture, of any size, with the lab model's tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vllm_steermoe_plugin.models import lab_checkpoint


def write_olmoe(
    folder: Path, *, hidden: int, intermediate: int, layers: int, experts: int = 64, top_k: int = 8, context: int = 1024
) -> Path:
    """Write it, in bfloat16, to `folder`, and return that."""
    import torch
    import transformers

    torch.manual_seed(0)
    config: Any = transformers.OlmoeConfig(
        vocab_size=json.loads((lab_checkpoint.MODEL_DIR / "config.json").read_text())["vocab_size"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=context,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(lab_checkpoint.MODEL_DIR / name, folder / name)
    return folder
