"""The worker handshake: what each worker answers when an engine starts, and what that means for the engine.

A worker on another machine may have another release of this package, or be kept from loading it by VLLM_PLUGINS. It
then builds vLLM's own model, and nothing there would complain. (A machine without the package fails to import the
worker extension, so the engine does not start.)
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import TypedDict

from expert_registry.errors import UnsupportedFeatureError
from vllm_steermoe_plugin.compat.versions import DISTRIBUTION

EXTENSION = "vllm_steermoe_plugin.worker.extension.SteerMoEWorker"
"""What vLLM mixes into each worker class (`worker_extension_cls`)."""
METHOD = "steermoe_handshake"
"""The method of the extension that answers."""
_BESIDE = "+"
_DOT = ":"


class WorkerStatus(TypedDict):
    """A worker's answer.

    `release` is name and version of this package there, `steers` whether its model is bound to a steering state,
    `corrects` whether it corrects selections of experts in some layer, `fault` why its model runner would not report to
    that state, `why` why the model is left as it is, where only the worker can know.
    """

    release: str
    steers: bool
    corrects: bool
    fault: str | None
    why: str | None


def release() -> str:
    """Name and version of this package."""
    return f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}"


def worker_status(
    *, steers: bool, corrects: bool = False, fault: str | None = None, why: str | None = None
) -> WorkerStatus:
    """The answer of this process."""
    return {"release": release(), "steers": steers, "corrects": corrects, "fault": fault, "why": why}


def extension_beside(theirs: str) -> str:
    """The extension to configure where the user has configured one: a class with the methods of both."""
    if not theirs or theirs.startswith(EXTENSION):
        return theirs or EXTENSION
    # One attribute of our module, which vLLM looks up by what stands behind the last dot.
    return f"{EXTENSION}{_BESIDE}{theirs.replace('.', _DOT)}"


def users_extension(attribute: str) -> str | None:
    """The user's extension in the name of a class that `extension_beside` made; None if it is no such name."""
    own, beside, theirs = attribute.partition(_BESIDE)
    return theirs.replace(_DOT, ".") if beside and own == EXTENSION.rpartition(".")[2] else None


def why_not_all(answers: Sequence[Sequence[WorkerStatus]]) -> str | None:
    """Why steering would not reach all workers; None if it does.

    Args:
        answers: of each engine, of each of its workers.

    Raises:
        EngineError: a worker's model is bound, but its runner would run it without telling: nothing may be answered.
    """
    expected = release()
    wrong = []
    for engine, workers in enumerate(answers):
        for rank, answer in enumerate(workers):
            who = f"worker {rank} of engine {engine}"
            if answer["fault"] is not None:
                raise UnsupportedFeatureError(f"{who}: {answer['fault']}")
            if answer.get("why"):
                return str(answer["why"])
            if (why := _why_not(answer, expected)) is not None:
                wrong.append(f"{who} ({why})")
    if not wrong and all(answers):
        return None
    return (
        f"workers without {expected}: {', '.join(wrong[:8]) or 'all'}{' and others' * (len(wrong) > 8)}. Install it on "
        "every machine of this engine and let VLLM_PLUGINS load it there, or leave requests unsteered"
    )


def corrects(answers: Sequence[Sequence[WorkerStatus]]) -> bool:
    """Whether a worker of these corrects selections; of an older release it is not known, and it is not used."""
    return any(answer.get("corrects", False) for workers in answers for answer in workers)


def _why_not(answer: Mapping[str, object], expected: str) -> str | None:
    if answer["release"] != expected:
        return str(answer["release"])
    return None if answer["steers"] else "its model is vLLM's own: the plugin is not loaded"
