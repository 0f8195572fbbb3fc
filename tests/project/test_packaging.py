"""What is shipped: the configuration, and, where the build backend is at hand, the wheel and the source archive."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support.folders import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = PROJECT["tool"]["hatch"]["build"]["targets"]
PACKAGES = ("expert_registry", "vllm_steermoe_plugin", "lm_eval_tasks")
needs_backend = pytest.mark.skipif(find_spec("hatchling") is None, reason="the build backend, hatchling, is not here")


def shipped(folder: Path) -> set[str]:
    """Files of a folder, relative to the project."""
    return tracked(folder.relative_to(ROOT).as_posix() + "/")


def tracked(folder: str) -> set[str]:
    """Files below a folder that are of the project; other things may lie there."""
    found = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        pytest.skip("this is no checkout")
    return {name for name in found.stdout.decode().splitlines() if name.startswith(folder) and (ROOT / name).exists()}


def test_the_source_archive_has_every_folder_and_what_the_makefile_runs() -> None:
    included = {path.strip("/") for path in BUILD["sdist"]["include"]}
    folders = {path.partition("/")[0] for path in tracked("") if "/" in path and not path.startswith(".")}
    assert folders == {path for path in included if (ROOT / path).is_dir()}
    assert all((ROOT / path).exists() for path in included)
    named = set(
        re.findall(r"\b(?:scripts|requirements|tools|examples|benchmarks|tests)\b", (ROOT / "Makefile").read_text())
    )
    assert named <= included and {"scripts", "requirements"} <= named


def test_the_wheel_has_the_three_packages_and_the_file_that_lm_eval_is_reached_by() -> None:
    assert tuple(sorted(BUILD["wheel"]["packages"])) == tuple(sorted(PACKAGES))
    autoload = set(BUILD["wheel"]["force-include"])
    assert autoload == shipped(ROOT / "lm_eval_tasks" / "autoload") and BUILD["wheel"]["exclude"] == [
        "lm_eval_tasks/autoload"
    ]
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)


def test_the_description_says_who_on_what_and_with_which_python() -> None:
    project = PROJECT["project"]
    assert project["authors"] == [{"name": "The vllm-steermoe-plugin authors"}]
    classifiers = project["classifiers"]
    least = int(project["requires-python"].removeprefix(">=3."))
    versions = [int(c.rpartition(".")[2]) for c in classifiers if re.fullmatch(r"Programming .*3\.\d+", c)]
    assert versions == list(range(least, least + 3)) and "Operating System :: POSIX" in classifiers


def test_all_that_tests_import_is_in_an_extra() -> None:
    """Beside what vLLM and lm-eval bring themselves."""
    extras = {re.split(r"[\[<>=]", name)[0] for name in PROJECT["project"]["optional-dependencies"]["dev"]}
    assert {"hypothesis", "psutil", "pytest"} <= extras
    assert {"mypy", "ruff"} <= extras, "`make check` runs them"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in the wheel, and in the source archive below its folder."""
    out = tmp_path_factory.mktemp("built")
    script = "import sys, hatchling.build as b; b.build_wheel(sys.argv[1]); b.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(out)], cwd=ROOT, env=dict(os.environ), check=True, timeout=120)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel, tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        return set(wheel.namelist()), {name.partition("/")[2] for name in archive.getnames()}


@needs_backend
def test_the_built_wheel_holds_the_packages_whole_and_nothing_else(built: tuple[set[str], set[str]]) -> None:
    wheel, _ = built
    expected = set().union(*(shipped(ROOT / package) for package in PACKAGES))
    autoload = shipped(ROOT / "lm_eval_tasks" / "autoload")
    described = {name for name in wheel if ".dist-info/" in name}
    assert wheel - described == expected - autoload | {Path(name).name for name in autoload}
    assert {name.partition("/")[2] for name in described} >= {"METADATA", "entry_points.txt", "licenses/LICENSE"}


@needs_backend
def test_the_built_source_archive_holds_all_that_its_makefile_and_tests_need(built: tuple[set[str], set[str]]) -> None:
    _, archive = built
    expected = set().union(*(shipped(ROOT / path.strip("/")) for path in BUILD["sdist"]["include"]))
    alone = {path.strip("/") for path in BUILD["sdist"]["include"] if (ROOT / path.strip("/")).is_file()}
    assert expected | alone | {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO"} <= archive
    assert not any(name.startswith(("shared", ".venv", ".cache", "out/")) for name in archive)
