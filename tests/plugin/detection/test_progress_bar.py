"""Progress: a bar in a terminal, lines in a log, and from where an earlier run has come to."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from tests.support.folders import ROOT
from vllm_steermoe_plugin import progress_bar as progress


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


def test_a_log_goes_on_from_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for _ in progress.track(range(2), "count", done=6):
        now += 61.0
    assert capsys.readouterr().err.splitlines() == ["count: 88%"]
    assert list(progress.track([], "nothing left", done=6)) == []


def shown_in_terminal(script: str) -> str:
    """What a script writes to a terminal as its standard error, without colours; its standard output must be clean."""
    above, below = pty.openpty()
    with os.fdopen(above, "rb", buffering=0) as terminal:
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TTY_COMPATIBLE", "FORCE_COLOR")}
        running = subprocess.Popen(
            [sys.executable, "-c", "from vllm_steermoe_plugin.progress_bar import byte_progress, track\n" + script],
            cwd=ROOT,
            env={**environment, "TERM": "xterm", "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=below,
        )
        os.close(below)
        written = b""
        while True:
            try:
                part = terminal.read(1 << 16)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            written += part
        out, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and out == b"", written
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written.decode())


def percentages(shown: str) -> list[int]:
    return [int(found) for found in re.findall(r"(\d+)%", shown)]


def test_a_terminal_gets_a_bar_that_starts_where_the_earlier_run_stopped() -> None:
    wait = "import time\nfor _ in track(range(4), 'count digits'{}): time.sleep(0.15)"
    fresh = percentages(shown_in_terminal(wait.format("")))
    assert fresh[0] == 0 and fresh[-1] == 100 and fresh == sorted(fresh)
    shown = shown_in_terminal(wait.format(", done=12"))
    resumed = percentages(shown)
    assert resumed[0] == 75 and resumed[-1] == 100 and resumed == sorted(resumed)
    assert "count digits" in shown and "━" in shown


def test_a_bar_is_left_in_peace_by_who_stops_early() -> None:
    shown = shown_in_terminal("for n in track(range(10), 'count'):\n    if n == 5: break")
    assert percentages(shown)[-1] == 50


def test_a_terminal_gets_a_bar_of_bytes() -> None:
    shown = shown_in_terminal("with byte_progress(2000, 'pull') as advance: advance(500); advance(1500)")
    assert "pull" in shown and "2.0/2.0 kB" in shown
