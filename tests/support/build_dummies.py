"""Builds dummy models on torch's meta device, in one process, and says how each would be steered."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.support.dummies import write_config
from tests.support.run_dummies import register_without_inspection
from vllm_steermoe_plugin.models.architectures import BACKEND


def main(folder: str, *names: str) -> None:
    """Print, after RESULT, by name: layers, kind of router and seam; or why it cannot be built or steered."""
    from vllm_steermoe_plugin.models.architectures import language_model_of, shape_of
    from vllm_steermoe_plugin.worker.kernels import built
    from vllm_steermoe_plugin.worker.layers import moe_layers

    register_without_inspection(*{name.partition("/")[0] for name in names}, BACKEND)
    found: dict[str, Any] = {}
    for name in names:
        place = write_config(name, Path(folder) / name.replace("/", "-"))
        try:
            config, model = built(str(place), enable_prefix_caching=False, max_model_len=64)
            served = config.model_config
            shape = shape_of(served.hf_config, served.architecture)
            layers = moe_layers(
                model, shape, set(shape.layers), language_model_of(served.hf_config, served.architecture)
            )
        except Exception as error:  # noqa: BLE001  (reported; the others are still built)
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        found[name] = {
            "architecture": shape.architecture,
            "layers": [layer.index for layer in layers],
            "kinds": sorted({str(layer.kind) for layer in layers}),
            "gate": [layer.gate is not None for layer in layers],
        }
    sys.stdout.write("RESULT" + json.dumps(found) + "\n")
