"""Which requests an engine in this process preempts, asked of its scheduler.

vLLM's own metric is no longer found once another engine with metrics has started in the same process.
"""

from __future__ import annotations

from typing import Any

import pytest


def watch_preemptions(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the requests that are preempted from now on, in this order."""
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler
    original, found = scheduler._preempt_request, list[str]()

    def preempt(request: Any, *arguments: Any, **options: Any) -> None:
        found.append(request.request_id)
        original(request, *arguments, **options)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    return found
