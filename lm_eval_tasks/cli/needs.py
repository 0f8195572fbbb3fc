"""What the sub-commands share: options that are JSON, and a clear word where lm-eval is missing."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

from expert_registry.errors import EngineError, RequestError


def need_lm_eval() -> None:
    """Raise EngineError unless lm-eval is installed."""
    missing = [name for name in ("lm_eval", "scipy") if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineError(f"this needs {' and '.join(missing)}; install vllm-steermoe-plugin[eval]")


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
