"""Which architectures of vLLM's registry have MoE layers: read from vLLM's sources, without importing the models."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

MODELS = "vllm.model_executor.models"
OWN_PACKAGES = "vllm.models."
SIGNS = {"FusedMoEFactory", "FusedMoE", "GateLinear", "fused_experts", "fused_topk"}
"""Names that a model with MoE layers uses."""
INNER_MODEL = "init_vllm_registered_model"
BY_CHECKPOINT = "an inner model of the checkpoint's choice"


def architectures_with_experts() -> dict[str, set[str]]:
    """Every registered architecture that reaches one of the signs, or may hold an inner model that does."""
    found = {name: _reached(*place) for name, place in registry().items()}
    return {name: signs for name, signs in found.items() if signs}


@functools.cache
def registry() -> dict[str, tuple[str, str]]:
    """Architecture -> (module, class), from the source of vLLM's registry."""
    found = {}
    for node in _parsed(f"{MODELS}.registry").body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and node.value.keys:
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                    module, cls = (ast.literal_eval(part) for part in value.elts)
                    found[key.value] = (module if module.startswith("vllm.") else f"{MODELS}.{module}", cls)
    return found


def _reached(module: str, name: str) -> set[str]:
    signs: set[str] = set()
    seen, waiting = set(), [(module, name)]
    while waiting:
        here = waiting.pop()
        if here not in seen:
            seen.add(here)
            found, further = _uses(*here)
            signs |= found
            waiting += further
    return signs


@functools.cache
def _uses(module: str, name: str) -> tuple[frozenset[str], tuple[tuple[str, str], ...]]:
    """The signs that a definition uses itself, and the definitions that it uses."""
    if name in SIGNS:
        return frozenset([name]), ()
    if not module.startswith((MODELS, OWN_PACKAGES)):
        return frozenset(), ()
    definitions, imports = _names(module)
    signs: set[str] = set()
    further = list(imports.get(name, ()))
    for node in ast.walk(definitions[name]) if name in definitions else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == INNER_MODEL:
            fixed = next((keyword.value for keyword in node.keywords if keyword.arg == "architectures"), None)
            if isinstance(fixed, ast.List):
                further += [registry()[inner] for inner in ast.literal_eval(fixed)]
            else:
                signs.add(BY_CHECKPOINT)
        elif isinstance(node, ast.Name) and node.id != INNER_MODEL:
            further.append((module, node.id))
        elif isinstance(node, ast.Attribute) and node.attr in SIGNS:
            signs.add(node.attr)
    return frozenset(signs), tuple(further)


@functools.cache
def _names(module: str) -> tuple[dict[str, ast.stmt], dict[str, set[tuple[str, str]]]]:
    """What a module defines, and what it imports from where."""
    tree, is_package = _parsed(module), _path(module).name == "__init__.py"
    definitions: dict[str, ast.stmt] = {}
    imports: dict[str, set[tuple[str, str]]] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            definitions[node.name] = node
        elif isinstance(node, ast.Assign):
            definitions |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    # vLLM's packages choose by platform inside functions; elsewhere what is imported stands at the top.
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree) if is_package else tree.body:
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            place = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                imports.setdefault(alias.asname or alias.name, set()).add((place, alias.name))
    return definitions, imports


@functools.cache
def _parsed(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


@functools.cache
def _path(module: str) -> Path:
    # Found without importing: a model's package may load its kernels.
    base = Path(str(importlib.util.find_spec("vllm").origin)).parent.parent / module.replace(".", "/")
    found = next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)
    assert found is not None, f"no source of {module}"
    return found
