"""Refusal by phrases. Whether an answer is safe is for a judge to say; see `judges`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval_tasks.tasks.refusal_phrases import is_empty, refuses


def refused(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`refused`: a phrase of refusal opens the answer; `empty`: there is none."""
    return {"refused": float(refuses(results[0])), "empty": float(is_empty(results[0]))}
