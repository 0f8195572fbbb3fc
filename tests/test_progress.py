"""Progress where there is no terminal to draw a bar in."""

from __future__ import annotations

import pytest

from vllm_steermoe_plugin import progress


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    seen = []
    for item in progress.track(range(10), "count digits"):
        seen.append(item)
        now += 25.0
    assert seen == list(range(10))
    found = capsys.readouterr()
    assert found.err.splitlines() == ["count digits: 30%", "count digits: 60%", "count digits: 90%"] and not found.out
