"""Builds the next vLLM's engine for a machine without a GPU; prints its Python.

No release of it is compiled for CPUs yet. Its Python from the source archive over the compiled kernels of the release
in .venv is a working engine, for what both have. The environment is a copy of .venv by hard links. Safe to run
again: nothing is done when nothing changed, and a download that was cut off goes on.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements/next.txt"
CACHE = ROOT / ".cache"
VENV = ROOT / ".venv"
UV = next(iter(sorted(CACHE.glob("uv-*/bin/uv"))), Path("uv"))
VERSION, SHA256 = re.findall(r"^vllm==(\S+) \\\n\s+--hash=sha256:(\w+)", PINS.read_text(), re.MULTILINE)[0]
FOLDER = CACHE / "vllm-next"
TIMEOUT, ATTEMPTS = 60.0, 4


def main() -> None:
    """Build it, unless it is there."""
    CACHE.mkdir(exist_ok=True)
    with (CACHE / "next.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made_of = (PINS.read_text(), Path(__file__).read_text(), (VENV / ".ready").read_text(), str(ROOT))
        want = hashlib.sha256("\0".join(made_of).encode()).hexdigest()
        stamp = FOLDER / ".ready"
        if not (stamp.exists() and stamp.read_text() == want):
            build(fetch())
            stamp.write_text(want)
    sys.stdout.write(f"{FOLDER}/bin/python\n")


def fetch() -> Path:
    """The source archive, checked against its pin."""
    archive = CACHE / f"vllm-{VERSION}.tar.gz"
    if not archive.exists():
        part = archive.with_suffix(".part")
        url = find_archive()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                download(url, part)
                break
            except httpx.TransportError:
                if attempt == ATTEMPTS:
                    raise
        if (found := hashlib.sha256(part.read_bytes()).hexdigest()) != SHA256:
            part.unlink()
            raise SystemExit(f"the archive of vLLM {VERSION} has the sha256 {found}, not {SHA256}; run this again")
        part.rename(archive)
    return archive


def find_archive() -> str:
    """Where the package index that uv is set up with keeps the archive."""
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder) / "asked.in", Path(folder) / "pylock.toml"
        asked.write_text(f"vllm=={VERSION}\n")
        run(UV, "pip", "compile", "--quiet", "--no-deps", "--no-binary", "vllm", "-o", found, asked)
        return str(tomllib.loads(found.read_text())["packages"][0]["sdist"]["url"])


def download(url: str, part: Path) -> None:
    """Append to `part` what is missing of it."""
    have = part.stat().st_size if part.exists() else 0
    ask = {"Range": f"bytes={have}-"} if have else {}
    with httpx.stream("GET", url, headers=ask, follow_redirects=True, timeout=TIMEOUT) as reply:
        if reply.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return
        reply.raise_for_status()
        with part.open("ab" if reply.status_code == httpx.codes.PARTIAL_CONTENT else "wb") as file:
            for block in reply.iter_bytes():
                file.write(block)


def build(archive: Path) -> None:
    """A copy of .venv in which vLLM's Python is that of the archive."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    run("cp", "-al", VENV, FOLDER)
    (FOLDER / ".ready").unlink()
    (packages,) = FOLDER.glob("lib/python3*/site-packages")
    shutil.rmtree(packages / "vllm")
    top = f"vllm-{VERSION}/"
    with tarfile.open(archive) as source:
        members = [member for member in source if member.name.startswith(f"{top}vllm/")]
        for member in members:
            member.name = member.name.removeprefix(top)
        source.extractall(packages, members, filter="data")
    compiled = VENV / packages.relative_to(FOLDER)
    for kernels in (compiled / "vllm").rglob("*.so"):
        os.link(kernels, packages / kernels.relative_to(compiled))
    rename_metadata(packages)
    own_scripts()
    further = re.sub(r"^vllm==.*\n(    .*\n)*", "", PINS.read_text(), flags=re.MULTILINE)
    (FOLDER / "further.txt").write_text(further)
    run(UV, "pip", "install", "--quiet", "--python", FOLDER / "bin/python", "--no-deps", "--require-hashes",
        "--only-binary", ":all:", "-r", FOLDER / "further.txt")  # fmt: skip
    run(FOLDER / "bin/python", ROOT / "scripts/check_engine.py")


def rename_metadata(packages: Path) -> None:
    """The record of the distribution `vllm` says the new version; `+cpu` is what vLLM tells its platform by."""
    (old,) = packages.glob("vllm-*.dist-info")
    new = packages / f"vllm-{VERSION}+cpu.dist-info"
    metadata = re.sub(r"^Version: .*$", f"Version: {VERSION}+cpu", (old / "METADATA").read_text(), flags=re.MULTILINE)
    old.rename(new)
    rewrite(new / "METADATA", metadata)


def own_scripts() -> None:
    """Commands start the Python of this environment, and not that of the one it is copied from."""
    for script in (FOLDER / "bin").iterdir():
        if script.is_file() and not script.is_symlink() and script.read_bytes()[:2] == b"#!":
            rewrite(script, script.read_text().replace(f"{VENV}/bin", f"{FOLDER}/bin"))


def rewrite(path: Path, text: str) -> None:
    """Replace a file, which is linked from the other environment too."""
    mode = path.stat().st_mode
    path.unlink()
    path.write_text(text)
    path.chmod(mode)


def run(*command: object) -> None:
    """A command that must end well; what it prints goes to standard error."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, env=environment)


if __name__ == "__main__":
    main()
