"""A random LoRA adapter on disk, and the same checkpoint with that adapter merged into its weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4


def write_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]], std: float = 0.3) -> Path:
    """An adapter of random matrices for modules of `(in, out)` features."""
    draw = torch.Generator().manual_seed(7)
    tensors = {}
    for name, (size_in, size_out) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, size_in, generator=draw) * std
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(size_out, RANK, generator=draw) * std
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    # lora_alpha == r: the product is added as it is.
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge_adapter(checkpoint: Path, adapter: Path, into: Path) -> Path:
    """A copy of `checkpoint` with `W + B A` in place of each adapted `W`."""
    shutil.copytree(checkpoint, into)
    weights = load_file(into / "model.safetensors")
    parts = load_file(adapter / "adapter_model.safetensors")
    for name in [key for key in parts if key.endswith("lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weights[f"{module}.weight"] += parts[name.replace("lora_A", "lora_B")] @ parts[name]
    save_file(weights, into / "model.safetensors", {"format": "pt"})
    return into
