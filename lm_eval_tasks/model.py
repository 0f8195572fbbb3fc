"""The former place of `lm_eval_tasks.SteerMoEVLLM`, kept for scripts that import it from here."""

from __future__ import annotations

from lm_eval_tasks.models.in_process import SteerMoEVLLM

__all__ = ["SteerMoEVLLM"]
