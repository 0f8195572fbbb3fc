"""Model Runner V2, vLLM's default on GPUs, in the real engine on a CPU.

vLLM takes V2 wherever it finds Triton with a back end that is active. V2's own kernels are small and only keep books:
Triton's interpreter runs them on CPU tensors. Python imports this file at start where its folder is on
PYTHONPATH, so engine processes have it as well (`tests/support/runners.py`); it acts when vLLM is first imported.
"""

from __future__ import annotations

import os
import sys
import types
from importlib.abc import MetaPathFinder
from typing import Any

TRITON = "STEERMOE_TEST_TRITON"
"""Names the folder that holds Triton."""


class BeforeVllm(MetaPathFinder):
    """Finds nothing; switches the interpreter on when vLLM is looked for."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "vllm":
            sys.meta_path.remove(self)
            _switch_on(os.environ[TRITON])


def _switch_on(folder: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(folder)
    import torch
    from triton import backends
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    class Interpreted:
        """As much of a Triton driver as vLLM and Triton ask for where nothing is compiled."""

        @staticmethod
        def is_active() -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cpu", "x86", 1)

        def get_active_torch_device(self) -> Any:
            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_device_interface(self) -> types.ModuleType:
            return torch.cpu

    class Compiler:
        """torch's own compiler asks for one to name it in its cache, and makes C++ of everything on a CPU."""

        def __init__(self, target: Any) -> None:
            pass

        @staticmethod
        def supports_target(target: Any) -> bool:
            return True

        def hash(self) -> str:
            return "interpreted"

    backends.backends.clear()
    backend = types.SimpleNamespace(driver=Interpreted, compiler=Compiler)
    backends.backends["cpu"] = backend  # type: ignore[assignment]
    driver.set_active(Interpreted())  # type: ignore[arg-type]


if TRITON in os.environ and not any(isinstance(finder, BeforeVllm) for finder in sys.meta_path):
    sys.meta_path.insert(0, BeforeVllm())
