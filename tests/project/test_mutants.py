"""The tool that mutates the code tells what the tests notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.mutants import Mutant, judge, read_mutants
from tests.support.folders import ROOT


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, "caught by test_toy.py::test_double"),
        ({"new": "x * 2"}, "SURVIVED"),
        ({"old": "x - x"}, "stale: 0 times"),
        ({"file": "gone.py"}, "stale: 0 times"),
        ({"old": "x"}, "stale: 3 times"),
        ({"tests": ("test_gone.py",)}, "no verdict: pytest ended with 4"),
    ],
)
def test_a_mutation_is_caught_or_survives_or_is_stale(change: dict[str, object], verdict: str, tmp_path: Path) -> None:
    code, test = "def double(x):\n    return x + x\n", "from toy import double\n\ndef test_double():\n"
    (tmp_path / "toy.py").write_text(code)
    (tmp_path / "test_toy.py").write_text(test + "    assert double(3) == 6\n")
    given = {"name": "toy", "file": "toy.py", "old": "x + x", "new": "x", "tests": ("test_toy.py",), "why": ""}
    assert judge(Mutant.model_validate(given | change), tmp_path).startswith(verdict)
    assert (tmp_path / "toy.py").read_text() == code


def test_mutations_have_names_of_their_own_and_tests_that_exist() -> None:
    mutants = read_mutants()
    assert len({mutant.name for mutant in mutants}) == len(mutants) > 0
    assert all((ROOT / test.partition("::")[0]).is_file() for mutant in mutants for test in mutant.tests)
    stale = [m.name for m in mutants if (ROOT / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    assert stale == [], "whoever moves a line moves its mutation along"
