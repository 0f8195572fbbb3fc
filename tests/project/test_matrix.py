"""The table of what was run with which vLLM and runner, from what pytest leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import matrix
from scripts.matrix import Cell, read, table

FOUND = """<testsuites><testsuite time="90.0">
<testcase classname="tests.engine.test_exact" name="test_a[x]"/>
<testcase classname="tests.engine.test_exact" name="test_b"><failure message="no">no</failure></testcase>
<testcase classname="tests.engine.test_exact" name="test_c"><skipped message="Skipped: no GPU">f:1</skipped></testcase>
<testcase classname="tests.engine.test_lora" name="test_d"><error message="failed on setup">no</error></testcase>
<testcase classname="tests.registry.test_hub" name="test_e"/>
</testsuite></testsuites>"""


def test_every_outcome_is_counted_and_what_failed_is_named(tmp_path: Path) -> None:
    (tmp_path / "found.xml").write_text(FOUND)
    run = read(tmp_path / "found.xml")
    assert run.failed == ["tests/engine/test_exact.py::test_b", "tests/engine/test_lora.py::test_d"]
    text = table({"0.32-v1": run, "0.33-v2": run})
    assert "| file | 0.32-v1 | 0.33-v2 |" in text
    assert "| engine/test_exact.py | 1 + 1, 1 FAILED | 1 + 1, 1 FAILED |" in text
    assert "| engine/test_lora.py | 0, 1 FAILED | 0, 1 FAILED |" in text
    assert "| all other files | 1 | 1 |" in text
    assert "| **all** | 2 + 1, 2 FAILED, 2 min | 2 + 1, 2 FAILED, 2 min |" in text
    assert "* 0.33-v2 skipped 1: no GPU" in text and "* 0.33-v2 FAILED tests/engine/test_lora.py::test_d" in text


def test_what_failed_runs_again_and_the_rest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    cell = Cell("0.32", "v2", "python", ("tests/engine",))
    cell.record.write_text(FOUND)
    ran: list[str] = []

    def run(self: Cell, tests: list[str], record: Path, arguments: object) -> None:
        ran.extend(tests)
        record.write_text('<testsuite><testcase classname="tests.engine.test_exact" name="test_b"/></testsuite>')

    monkeypatch.setattr(Cell, "_run", run)
    cell.run_again(())
    assert ran == ["tests/engine/test_exact.py::test_b", "tests/engine/test_lora.py::test_d"]
    found = read(cell.record)
    assert found.failed == ["tests/engine/test_lora.py::test_d"], "it was not run"
    assert found.files["tests/engine/test_exact.py"] == {"passed": 2, "skipped": 1}
