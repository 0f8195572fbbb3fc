"""Run a script in a process of its own and read the JSON that it prints after RESULT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.support.folders import ROOT


def run_alone(script: str, *arguments: str, drop: Sequence[str] = (), **environment: str) -> Any:
    """What `script` printed; variables in `drop` are taken out of its environment, `environment` is added."""
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={"PYTHONPATH": str(ROOT), **kept, **environment},
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1].splitlines()[0])
