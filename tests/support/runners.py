"""Which of vLLM's model runners a run of the tests has: the one place that says so.

`STEERMOE_TEST_RUNNER=v2` gives every engine of the run Model Runner V2, in whichever process, by Triton's
interpreter (`runner_v2/sitecustomize.py`); `v1`, or nothing, Model Runner V1. One run has one: vLLM decides when it is
imported.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from tests.support.folders import ROOT
from tests.support.triton import triton_folder

VARIABLE = "STEERMOE_TEST_RUNNER"
RUNNER = os.environ.get(VARIABLE) or "v1"
V2 = RUNNER == "v2"
_FOLDER = ROOT / "tests/support/runner_v2"


def install() -> None:
    """Make this process and those that it starts have the chosen runner; to be called before vLLM is imported."""
    if RUNNER not in ("v1", "v2"):
        raise ValueError(f"{VARIABLE} is {RUNNER!r}; there are v1 and v2")
    if not V2:
        return
    os.environ["STEERMOE_TEST_TRITON"] = triton_folder()
    folders = [str(ROOT), str(_FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    if "vllm" in sys.modules:
        raise RuntimeError("vLLM was imported before its runner was chosen")
    sys.path.insert(0, str(_FOLDER))
    sys.modules.pop("sitecustomize", None)
    import sitecustomize  # noqa: F401


def check(engine: Any) -> None:
    """An engine in this process has the chosen runner.

    Raises:
        AssertionError: it has the other one.
    """
    uses = engine.llm_engine.vllm_config.use_v2_model_runner
    assert uses == V2, f"the engine has V{1 + uses}, and {VARIABLE} says {RUNNER}"
