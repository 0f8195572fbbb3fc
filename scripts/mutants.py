"""Do the tests notice? Each mutation of `mutants.json`, one at a time in a copy of this checkout, against its tests.

python -m scripts.mutants [NAME...]    # all of them take an hour; some start an engine
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_suffix(".json")


class Mutant(BaseModel):
    """`old`, which stands once in `file`, becomes `new`; one of `tests` (files or node ids) must then fail."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str


def read_mutants() -> list[Mutant]:
    """All of the list, in its order."""
    return TypeAdapter(list[Mutant]).validate_json(LIST.read_bytes())


def copy_of(source: Path, checkout: Path) -> Path:
    """Put what git does not ignore in `source` into `checkout`."""
    listed = subprocess.check_output(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=source, text=True)
    for name in filter(None, listed.split("\0")):
        if (source / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, checkout / name)
    return checkout


def run_tests(tests: Sequence[str], checkout: Path) -> tuple[int, str]:
    """pytest's exit status in `checkout`, and the first test that failed (else its last words)."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=checkout,
        # No compiled file: one of a mutation, as long as the original and of the same second, would outlive it.
        env=os.environ | {"PYTHONPATH": str(checkout), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else (done.stdout + done.stderr).strip()[-300:]


def judge(mutant: Mutant, checkout: Path) -> str:
    """`caught` by which test; or `SURVIVED`, `stale` (there is nothing to mutate), `no verdict` (no test was run)."""
    path = checkout / mutant.file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text.count(mutant.old) != 1:
        return f"stale: {text.count(mutant.old)} times in {mutant.file}"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        status, said = run_tests(mutant.tests, checkout)
    finally:
        path.write_text(text, encoding="utf-8")
    return {0: "SURVIVED", 1: f"caught by {said}"}.get(status, f"no verdict: pytest ended with {status}: {said}")


def main(names: Sequence[str]) -> int:
    """Print the verdicts; 0 if all were caught, and all their tests pass without a mutation."""
    known = {mutant.name: mutant for mutant in read_mutants()}
    chosen = [known[name] for name in names or known]
    with tempfile.TemporaryDirectory() as folder:
        checkout = copy_of(ROOT, Path(folder))
        status, said = run_tests(list(dict.fromkeys(test for mutant in chosen for test in mutant.tests)), checkout)
        if status:
            sys.exit(f"without a mutation the tests do not pass: {said}")
        caught = 0
        for mutant in chosen:
            verdict = judge(mutant, checkout)
            caught += verdict.startswith("caught")
            print(f"{mutant.name:32} {verdict}", flush=True)  # noqa: T201
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
