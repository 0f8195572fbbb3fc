"""Steering in lm-eval: the model type `steermoe-vllm`, and tasks.

`model` is the model type, `steering_args` its model arguments, `register` and
`autoload` bring both to the `lm_eval` command. See README.md.
"""

from __future__ import annotations

from pathlib import Path

TASKS = Path(__file__).resolve().parent / "tasks"
"""The folder to give to lm-eval's `--include_path` where the autoload is not in effect."""
