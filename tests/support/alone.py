"""Scripts in a process of their own: the one place where such processes get their environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from tests.support.folders import ROOT


def environment_alone(*drop: str, **environment: str) -> dict[str, str]:
    """That of the tests, in which this repository can be imported; without `drop`, with `environment`.

    A PYTHONPATH among `environment` is added to what stands there.
    """
    kept = {key: value for key, value in os.environ.items() if key not in drop}
    path = [str(ROOT), kept.get("PYTHONPATH", ""), environment.get("PYTHONPATH", "")]
    return {**kept, **environment, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def run_alone(script: str, *arguments: str, drop: Sequence[str] = (), **environment: str) -> Any:
    """The JSON that `script` prints after RESULT; for `drop` and `environment` see `environment_alone`."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment_alone(*drop, **environment),
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1].splitlines()[0])
