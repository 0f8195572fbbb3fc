"""Where Triton lies, which is kept out of the environment: vLLM behaves otherwise where it finds it."""

from __future__ import annotations

import subprocess

from tests.support.folders import ROOT


def triton_folder() -> str:
    """Its folder in `.cache`; Triton is fetched if it is not there yet."""
    script = ROOT / "scripts" / "setup_triton.sh"
    done = subprocess.run(["bash", script], capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
