"""What the sub-commands share: options that are JSON, and a clear word where lm-eval is missing."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from expert_registry.errors import EngineError, RequestError


def need_lm_eval() -> None:
    """Raise EngineError unless lm-eval is installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EngineError("this needs lm_eval; install vllm-steermoe-plugin[eval]")


def json_object(text: str, option: str) -> dict[str, Any]:
    """The object that an option's text holds.

    Raises:
        RequestError: it holds none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"{option} must be a JSON object, got {type(value).__name__}")
    return value
