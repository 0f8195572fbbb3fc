"""What an operator passes to other plugins stays beside the settings of `steermoe serve`, or nothing starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expert_registry.errors import UsageError
from vllm_steermoe_plugin.cli.additional_config import with_settings

OURS: dict[str, object] = {"default": "digits"}


def merged(*arguments: str) -> dict[str, object]:
    found = with_settings(arguments, OURS)
    assert sum(argument.startswith("--additional") for argument in found) == 1
    value: dict[str, object] = json.loads(found[found.index("--additional-config") + 1])
    return value


@given(
    st.dictionaries(st.text(), st.integers() | st.dictionaries(st.text(), st.integers())).filter(
        lambda d: "steermoe" not in d
    )
)
def test_keys_of_others_stay(theirs: dict[str, object]) -> None:
    text = json.dumps(theirs)
    for arguments in (("--additional-config", text), (f"--additional_config={text}",)):
        assert merged("m", *arguments, "--port", "1") == theirs | {"steermoe": OURS}
        assert with_settings(arguments, {}) == list(arguments), "nothing to merge"


def test_settings_of_both_kinds_are_put_together() -> None:
    assert merged("m", "--additional-config", '{"steermoe": {"lock": "a"}}') == {"steermoe": {"lock": "a", **OURS}}
    assert with_settings(["m", "--port", "1"], OURS)[:3] == ["m", "--port", "1"]


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("additional-config: {other: 1}\nport: 3")
    once = ("--additional-config", "{}")
    for arguments, reason in (
        ((*once, *once), "2 times"),
        (("--additional-config", "{"), "no JSON object"),
        (("--additional-config", "[]"), "no JSON object"),
        (("--additional-config",), "no JSON object"),
        (("--additional-config.other.key", "1"), "one JSON object"),
        (("--additional-config", '{"steermoe": {"default": "refusal"}}'), "both set default"),
        (("--additional-config", '{"steermoe": 3}'), "both set steermoe"),
        (("--config", str(file)), "would replace"),
        ((f"--config={file}",), "would replace"),
    ):
        with pytest.raises(UsageError, match=reason):
            with_settings(arguments, OURS)
    file.write_text("port: 3")
    assert merged("--config", str(file)) == {"steermoe": OURS}
    assert merged("--config", str(tmp_path / "absent")) == {"steermoe": OURS}
