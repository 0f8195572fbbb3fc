"""vLLM's `--additional-config` is one JSON object for all plugins: the operator's settings are merged into it.

Written twice, vLLM takes the last and drops the other without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expert_registry.errors import UsageError
from vllm_steermoe_plugin.settings import KEY

_OPTIONS = ("--additional-config", "--additional_config")
_FILE = "--config"


def with_settings(arguments: Sequence[str], settings: Mapping[str, object]) -> list[str]:
    """Arguments of `vllm serve` in which `settings` stand under the plugin's key, and all other keys as they were.

    Args:
        arguments: what goes to `vllm serve`, among it any `--additional-config`.
        settings: of this plugin; with none of them, the arguments stay as they are.

    Raises:
        UsageError: the two cannot be merged: no JSON object, written twice or in a form that only vLLM reads, in
            vLLM's configuration file, or a setting that stands in both.
    """
    if not settings:
        return list(arguments)
    kept: list[str] = []
    found: list[str] = []
    left = iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name in _OPTIONS:
            found.append(value if equals else next(left, ""))
        elif name.startswith(tuple(f"{option}." for option in _OPTIONS)):
            raise UsageError(f"{name}: write {_OPTIONS[0]} as one JSON object, into which the settings are merged")
        else:
            kept.append(argument)
            if name == _FILE:
                file = value if equals else next(left, "")
                kept += [] if equals else [file]
                _refuse_in_file(Path(file))
    if len(found) > 1:
        raise UsageError(f"{_OPTIONS[0]} is written {len(found)} times; vLLM would use the last one alone")
    theirs = _object(found[0]) if found else {}
    ours = theirs.get(KEY, {})
    both = sorted(ours.keys() & settings.keys()) if isinstance(ours, dict) else [KEY]
    if both:
        raise UsageError(f"{_OPTIONS[0]} {KEY!r} and an option of this command both set {', '.join(both)}")
    return [*kept, _OPTIONS[0], json.dumps({**theirs, KEY: {**ours, **settings}})]


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{_OPTIONS[0]} {text!r:.80} is no JSON object")
    return found


def _refuse_in_file(file: Path) -> None:
    import yaml  # It comes with vLLM.

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return  # vLLM says so.
    if isinstance(found, dict) and any(f"--{key}" in _OPTIONS for key in found):
        raise UsageError(
            f"{file} has an additional-config, which the settings of this command would replace; write both into "
            f"{_OPTIONS[0]}, or all settings into that file"
        )
