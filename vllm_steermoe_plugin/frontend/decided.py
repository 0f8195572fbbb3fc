"""A served request is decided on once: by the check of its body, not again for each prompt that the engine gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from vllm_steermoe_plugin.admission.request_admission import Decision, FrontEnd

_DECIDED: ContextVar[tuple[FrontEnd | None, Decision] | None] = ContextVar("steermoe_decided", default=None)


@contextmanager
def decided(front_end: FrontEnd | None, decision: Decision | None) -> Iterator[None]:
    """While a request is answered, in its own task: what its steering was decided to be."""
    token = _DECIDED.set((front_end, decision) if decision is not None else None)
    try:
        yield
    finally:
        _DECIDED.reset(token)


def decision_of(front_end: FrontEnd) -> Decision | None:
    """What was decided on the request that this task answers; None outside of a server's tasks."""
    found = _DECIDED.get()
    return found[1] if found is not None and found[0] is front_end else None
