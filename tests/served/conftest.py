"""The server that most tests here share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.served import Server, serving
from vllm_steermoe_plugin.cli.profiles import KEY_VARIABLE

SECRET = "correct-horse-battery"
BLOCK = 32


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With the safe policy, two front-end processes, and an operator who manages profiles."""
    folder = tmp_path_factory.mktemp("serve")
    arguments = ["--enable-scale-out", "--api-server-count", "2", "--block-size", str(BLOCK)]
    arguments += ["--enable-prompt-tokens-details", "--manage", f"env:{KEY_VARIABLE}"]
    arguments += ["--profile-store", str(folder / "profiles.json"), "--profile", "house=digits:reverse"]
    with serving(folder, *arguments, **{KEY_VARIABLE: SECRET, "VLLM_LOGGING_LEVEL": "INFO"}) as running:
        yield running
