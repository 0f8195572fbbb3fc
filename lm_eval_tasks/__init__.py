"""Steering in lm-eval: the model type `steermoe-vllm`, and tasks.

`models` has the model types and their arguments, `tasks` the tasks; `register` and
`autoload` bring both to the `lm_eval` command. See README.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval_tasks.models.in_process import SteerMoEVLLM

__all__ = ["TASKS", "SteerMoEVLLM"]

TASKS = Path(__file__).resolve().parent / "tasks"
"""The folder to give to lm-eval's `--include_path` where the autoload is not in effect."""


def __getattr__(name: str) -> Any:
    """`SteerMoEVLLM`, with which vLLM and torch are imported, only when it is asked for."""
    if name != "SteerMoEVLLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lm_eval_tasks.models.in_process import SteerMoEVLLM

    return SteerMoEVLLM
