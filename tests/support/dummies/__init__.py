"""Dummy models: configs alone, which the engine runs on weights that vLLM draws (`load_format="dummy"`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from tests.support.dummies.corrected import CORRECTED
from tests.support.dummies.softmax import SOFTMAX

DUMMIES = SOFTMAX | CORRECTED
"""By architecture; a second config of one has a slash and a word behind it."""

BARE_MODEL_TYPES = (
    "PanguProMoE",
    "bailing_hybrid",
    "bailing_moe",
    "bailing_moe_v3",
    "deepseek",
    "k2_horizon",
    "mimo_v2",
    "pangu_ultra_moe",
    "param2moe",
    "sarvam_mla",
    "sarvam_moe",
)
"""Model types whose config class comes with the checkpoint; `write_config` puts a bare one in its place."""


def write_config(name: str, folder: Path, **changes: Any) -> Path:
    """Write the config.json of a dummy model to `folder` and return the folder."""
    for model_type in BARE_MODEL_TYPES:
        bare = type("BareConfig", (transformers.PretrainedConfig,), {"model_type": model_type})
        transformers.AutoConfig.register(model_type, bare, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": [name.partition("/")[0]], **DUMMIES[name], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
