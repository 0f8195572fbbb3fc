"""What commands are given: checked before anything long is begun."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from expert_registry.errors import ConfigurationError, UsageError
from expert_registry.files import read_bounded
from vllm_steermoe_plugin.steering.profile import MAX_TEXT, SteeringProfile


def check_writable(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed.

    Raises:
        UsageError: it is a folder, or its folder cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: its folder cannot be written to")


def json_object(text: str, option: str = "--engine-args") -> dict[str, Any]:
    """The object that an option's text holds.

    Raises:
        UsageError: it holds none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{option} must be a JSON object, got {type(value).__name__}")
    return value


def need(package: str, extra: str) -> None:
    """Refuse what could not be finished without an optional package, before anything is computed.

    Raises:
        ConfigurationError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigurationError(f"this needs {package}; install vllm-steermoe-plugin[{extra}]")


def read_text(path: Path, limit: int) -> str:
    """The text of a file of at most `limit` characters.

    Raises:
        FileError: it cannot be read or is too large.
        UsageError: it is not UTF-8.
    """
    try:
        return read_bounded(path, 4 * limit).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8") from None


def read_profile(path: Path) -> SteeringProfile:
    """The profile in a JSON file.

    Raises:
        FileError, UsageError, RequestError, ProfileError: see `read_text` and `SteeringProfile.from_json`.
    """
    return SteeringProfile.from_json(read_text(path, MAX_TEXT))
