"""The page about files of other tools: its commands print what stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.folders import ROOT

PAGE = (ROOT / "docs" / "interchange.md").read_text(encoding="utf-8")


def test_each_command_prints_what_the_page_says(tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```\n```text\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```sh") >= 4
    for name, module in (("steermoe", "-m vllm_steermoe_plugin"), ("python", "")):
        (tmp_path / name).write_text(f'#!/bin/sh\nexec {sys.executable} {module} "$@"\n')
        (tmp_path / name).chmod(0o755)
    here = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "STEERMOE_REGISTRY": str(tmp_path)}
    for script, said in blocks:
        done = subprocess.run(
            ["bash", "-e", "-c", script],
            env=os.environ | here,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.stdout, done.returncode) == (said, 0), done.stderr
