"""A vLLM engine in a process of its own, so that stock vLLM and the plugin can be measured in turn."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.cost.work import Work

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Threads of the engines that wait must not take a core from the one that works.
    "OMP_WAIT_POLICY": "PASSIVE",
}


@dataclass(frozen=True, slots=True)
class EngineKind:
    """How an engine is started.

    Attributes:
        name: in the tables.
        plugin: False for stock vLLM, which then does not load the plugin at all.
        options: arguments of `vllm.LLM`.
    """

    name: str
    plugin: bool
    options: dict[str, Any]


class EngineProcess:
    """Starts an engine; `run` hands it work and returns the seconds that it took."""

    def __init__(self, kind: EngineKind, model: Path, threads: int, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        environment = ENVIRONMENT | {"OMP_NUM_THREADS": str(threads), "VLLM_PLUGINS": "steermoe" if kind.plugin else ""}
        self._process = context.Process(
            target=_serve, args=(theirs, kind, str(model), environment, str(log)), daemon=True
        )
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def run(self, work: Work, steerings: Sequence[str] = ()) -> float:
        """Seconds for `work`; request i is steered by `steerings[i % len(steerings)]`, if there are any."""
        self._pipe.send((work, list(steerings)))
        seconds: float = self._pipe.recv()
        return seconds

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, kind: EngineKind, model: str, environment: dict[str, str], log: str) -> None:
    os.environ.update(environment)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from vllm import LLM, SamplingParams

    engine = LLM(model=model, **kind.options)
    pipe.send("ready")
    while True:
        try:
            work, steerings = pipe.recv()
        except EOFError:
            return
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in work.prompts]
        params = [
            SamplingParams(
                max_tokens=work.generated,
                ignore_eos=True,
                temperature=0.0,
                detokenize=False,
                extra_args={"steermoe": steerings[i % len(steerings)]} if steerings else None,
            )
            for i in range(len(prompts))
        ]
        start = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        pipe.send(time.perf_counter() - start)
