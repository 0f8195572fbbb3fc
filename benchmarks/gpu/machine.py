"""What the figures were measured on."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parent.parent.parent
_MEASURED = ("vllm_steermoe_plugin", "benchmarks/gpu")


def describe() -> dict[str, str]:
    """GPU, driver, versions, date and commit, as texts."""
    facts = {
        "gpu": "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": _output("git", "-C", str(_ROOT), "describe", "--always", "--dirty"),
        "source": _source(),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts["gpu"] = f"{gpu.name} ({gpu.multi_processor_count} multiprocessors, {gpu.total_memory >> 30} GiB)"
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def clock_rate() -> str:
    """Of the multiprocessors, now: such as `1980 MHz`."""
    return _output("nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader")


def _source() -> str:
    """Of what is measured and what measures, the sha256: a copy of the tree may be no repository, or changed."""
    digest = hashlib.sha256()
    for folder in _MEASURED:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            name = path.relative_to(_ROOT).as_posix()
            digest.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return "unknown"
    lines = done.stdout.split("\n")
    return lines[0].strip() if done.returncode == 0 and lines[0].strip() else "unknown"
