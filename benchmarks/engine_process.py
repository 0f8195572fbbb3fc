"""A vLLM engine in a process of its own, so that stock vLLM and the plugin can take turns; see `engine_worker.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.engine_worker import REPLY
from vllm_steermoe_plugin.compat.plugin_allowlist import ENTRY_POINT

Arguments = dict[str, str] | None
"""A request's `extra_args`."""

_ROOT = Path(__file__).resolve().parent.parent


class EngineProcess:
    """Starts an engine, hands it work and waits for the answer.

    Attributes:
        about: what the engine said of itself when it had started.
    """

    def __init__(
        self,
        model: str,
        settings: Mapping[str, Any] | None,
        options: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        """Start it.

        Args:
            model: a hub id, a folder or the lab model.
            settings: of the plugin; None for stock vLLM, which then does not load the plugin at all.
            options: arguments of `vllm.LLM`.
            environment: variables to set beside this process's own.
            log: where its messages are added; by default they are shown.
        """
        plugins = {"VLLM_PLUGINS": "" if settings is None else ENTRY_POINT}
        self._log = log
        with ExitStack() as stack:
            messages = None if log is None else stack.enter_context(log.open("ab"))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine_worker"],
                cwd=_ROOT,
                env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(environment or {}), **plugins},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
            )
        self.about = self._ask({"model": model, "settings": settings, "options": options})

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        arguments: Sequence[Arguments],
        new_tokens: int,
        *,
        exact: bool = False,
        text: bool = True,
    ) -> dict[str, Any]:
        """Tokens, seconds, and with `exact` the first five log-probabilities of each token.

        `text` is whether the engine also turns tokens into text, as a server does.
        """
        work = {"prompts": prompts, "arguments": arguments, "new_tokens": new_tokens, "text": text}
        return self._ask(work | {"logprobs": 5 if exact else None})

    def read(self) -> dict[str, Any]:
        """Steered requests that each worker has seen, and the routing counts if there are any."""
        return self._ask({})

    def close(self) -> None:
        """End the process, and wait until its memory is free."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=120)

    def _ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Send one line, and wait for the reply.

        Raises:
            RuntimeError: the engine ended instead.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith(REPLY):
                answer: dict[str, Any] = json.loads(line.removeprefix(REPLY))
                return answer
        place = "above" if self._log is None else f"in {self._log}"
        raise RuntimeError(f"the engine ended with status {self._process.wait()}; see its messages {place}")
