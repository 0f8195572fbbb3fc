"""The ledger of vLLM's internals, and that the hooks notice when something moved."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from expert_registry.errors import EngineError
from tests.support.folders import ROOT
from vllm_steermoe_plugin import register
from vllm_steermoe_plugin.compat import ledger, versions
from vllm_steermoe_plugin.compat.internal import SENTINEL, Internal, provides, wrap_once
from vllm_steermoe_plugin.compat.ledger import LEDGER, WRAPPED
from vllm_steermoe_plugin.compat.symbols import core, frontend, http, worker
from vllm_steermoe_plugin.compat.symbols.config import CONFIGS
from vllm_steermoe_plugin.compat.symbols.frontend import INPUT_PROCESSOR, OFFLINE_BEAMS, PROCESS_INPUTS
from vllm_steermoe_plugin.compat.symbols.registry import BUILT_IN_MODELS, MODEL_REGISTRY
from vllm_steermoe_plugin.compat.variant_names import architecture_of, variant_name
from vllm_steermoe_plugin.compat.versions import check_version, vllm_version
from vllm_steermoe_plugin.frontend.attached import _shape, attach_front_end
from vllm_steermoe_plugin.models.architectures import ARCHITECTURES


@pytest.mark.parametrize("internal", LEDGER, ids=lambda internal: internal.path)
def test_every_touched_symbol_is_where_the_ledger_says(internal: Internal) -> None:
    internal.load()


def test_a_symbol_that_moved_is_named_with_what_it_was_for() -> None:
    with pytest.raises(EngineError, match=r"has no vllm\.v1:nothing.*needed to steer"):
        Internal("vllm.v1:nothing", "steer").load()


def test_what_has_moved_between_supported_releases_is_found_in_either_place() -> None:
    from vllm.v1.engine import EngineCoreRequest

    path = "vllm.v1.engine:EngineCoreRequest"
    assert Internal("vllm.of.another_release:EngineCoreRequest", "steer", formerly=path).load() is EngineCoreRequest
    with pytest.raises(EngineError, match=r"has no vllm\.x:y .*needed to steer"):
        Internal("vllm.x:y", "steer", formerly="vllm.x:z").load()


def test_a_changed_signature_is_an_error() -> None:
    with pytest.raises(EngineError, match="was expected"):
        Internal(PROCESS_INPUTS.path, "steer", ("self", "prompt")).load()


def some_class() -> Any:
    class Base:
        declared: int

        def __init__(self) -> None:
            self.made = 1

    class Derived(Base):
        @property
        def asked(self) -> int:
            return self.elsewhere.kept  # type: ignore[attr-defined, no-any-return]

    return Derived


@pytest.mark.parametrize("name", ["declared", "made", "asked", "__init__"])
def test_an_attribute_is_found_where_a_class_has_it_or_makes_it(name: str) -> None:
    assert provides(some_class(), name)


@pytest.mark.parametrize("name", ["elsewhere", "kept", "gone"])
def test_an_attribute_that_is_only_read_or_not_there_is_missing(name: str) -> None:
    assert not provides(some_class(), name)


READING = [internal for internal in LEDGER if internal.reads]


@pytest.mark.parametrize("internal", READING, ids=lambda internal: internal.path)
def test_an_attribute_that_went_away_is_named_with_what_it_was_for(internal: Internal) -> None:
    renamed = tuple(f"{name}_of_another_release" for name in internal.reads)
    with pytest.raises(EngineError, match=re.escape(f"{internal.path} of vLLM")) as error:
        replace(internal, reads=(*internal.reads, *renamed)).load()
    assert f"has no {', '.join(renamed)}; it is needed to" in str(error.value)


READ_CONFIGS = ("worker/binding.py", "models/steerability.py", "models/engine_limits.py", "models/engine_config.py")
READ_CONFIGS += ("frontend/attached.py", "worker/variants.py", "worker/runners/lookup.py")


def attributes_of(module: str) -> set[str]:
    tree = ast.parse((ROOT / "vllm_steermoe_plugin" / module).read_text(encoding="utf-8"))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_no_field_of_vllms_configuration_is_read_that_the_ledger_lacks() -> None:
    """Wherever a file of ours that is handed configurations reads a name that one of vLLM's has."""
    package = ROOT / "vllm_steermoe_plugin"
    ours = {
        path.relative_to(package).as_posix() for path in package.rglob("*.py") if package / "compat" not in path.parents
    }
    configs = [internal.load() for internal in CONFIGS]
    listed = {name for internal in CONFIGS for name in internal.reads}
    there = {name for config in configs for name in (*vars(config), *config.__dataclass_fields__)}
    there = {name for name in there if not name.startswith("__")}
    read = set().union(*(attributes_of(module) for module in READ_CONFIGS))
    assert len(read & there) >= 25 and (read & there) - listed == set()
    assert listed <= set().union(*map(attributes_of, ours))


def test_what_is_wrapped_is_in_the_ledger_with_its_signature() -> None:
    """So that `steermoe doctor` sees it move, and counts it: by the source, each call names an entry that says so."""
    named: set[str] = set()
    for path in (ROOT / "vllm_steermoe_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "wrap_once":
                named.add(ast.unparse(node.args[0]))
    entries = {name: entry for module in (frontend, http, core, worker) for name, entry in vars(module).items()}
    assert {id(entries[name]) for name in named} == {id(internal) for internal in WRAPPED}
    assert [internal.path for internal in WRAPPED if internal.parameters is None] == []
    assert len(WRAPPED) <= 10, "each wrapped callable is a debt"


def test_what_moved_is_not_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(x: int) -> int:
        return 2 * x

    module = ModuleType("moved")
    monkeypatch.setitem(sys.modules, "moved", module)
    monkeypatch.setattr(module, "doubled", doubled, raising=False)
    for path, parameters in (("moved:doubled", ("y",)), ("moved:tripled", ("x",)), ("moved:Class.doubled", ("x",))):
        with pytest.raises(EngineError, match="needed to test"):
            wrap_once(Internal(path, "test", parameters, wrapped=True), lambda original: original)
    assert vars(module)["doubled"] is doubled
    for _ in range(2):
        wrap_once(Internal("moved:doubled", "test", ("x",), wrapped=True), lambda original: lambda x: original(x) + 1)
    assert vars(module)["doubled"](3) == 7
    with pytest.raises(EngineError, match="does not say so"):
        wrap_once(Internal("moved:doubled", "test", ("x",)), lambda original: original)


def test_a_keyword_that_a_body_no_longer_passes_is_missed() -> None:
    OFFLINE_BEAMS.load()
    with pytest.raises(EngineError, match="has no skip_copy; it is needed to tell"):
        replace(OFFLINE_BEAMS, mentions=("skip_copy",)).load()


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("0.31.9", False), ("0.32.0+cpu", True), ("0.33.2", True), ("0.34.0", False), ("1.0", False),
        ("0.33.0rc1", True), ("0.34.0rc2.dev45+g1a2b3c4d5", True), ("0.1.dev17000+g1a2b3c4d5.d20261101", True),
    ],
)  # fmt: skip
def test_supported_versions(version: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "vllm_version", lambda: version)
    if fits:
        check_version()
    else:
        with pytest.raises(EngineError, match=r"supports vLLM from 0\.32"):
            check_version()


def test_a_source_build_is_judged_by_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Internal("vllm.config:NotThere", "test", ("x",))
    monkeypatch.setattr(ledger, "LEDGER", (*ledger.LEDGER, moved))
    ledger.check_source_build()
    monkeypatch.setattr(versions, "vllm_version", lambda: "0.1.dev17000+g1a2b3c4d5")
    config = SimpleNamespace(model_config=None, parallel_config=None)
    with pytest.raises(EngineError, match="NotThere"):
        attach_front_end(SimpleNamespace(vllm_config=config))


def test_requests_come_to_the_engine_only_through_what_is_wrapped() -> None:
    """Wherever vLLM makes a request for its engine or sends one there, by its source."""
    package = Path(str(importlib.util.find_spec("vllm").origin)).parent  # type: ignore[union-attr]
    made: dict[str, int] = {}
    sent: dict[str, int] = {}
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(package).as_posix()
        made[name] = len(re.findall(r"(?<!class )\bEngineCoreRequest\(", text))
        sent[name] = len(re.findall(r"\bengine_core\.add_request(?:_async)?\(", text))
    # Besides `process_inputs`: one that is aborted before it runs, to free what was sent ahead of it.
    assert {name: n for name, n in made.items() if n} == {
        "v1/engine/input_processor.py": 1,
        "v1/engine/async_llm.py": 1,
    }
    assert {name for name, n in sent.items() if n} == {
        "v1/engine/async_llm.py",
        "v1/engine/core_client.py",
        "v1/engine/llm_engine.py",
    }
    aborted = (package / "v1/engine/async_llm.py").read_text().split("= EngineCoreRequest(")[1]
    assert "abort_immediately=True" in aborted.split("add_request_async")[0]


def test_registering_twice_wraps_once() -> None:
    register()
    processor = INPUT_PROCESSOR.load()
    first = processor.process_inputs
    register()
    assert processor.process_inputs is first
    assert hasattr(first, SENTINEL)


@pytest.mark.usefixtures("live_environment")
def test_a_front_end_that_passes_by_the_plugin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(EngineError, match="VLLM_PLUGINS"):
        register()


def test_variants_are_registered_under_the_built_in_names_by_lazy_strings() -> None:
    register()
    registry = MODEL_REGISTRY.load()
    for name in ARCHITECTURES.keys() & BUILT_IN_MODELS.load().keys():
        assert registry.models[name].module_name == "vllm_steermoe_plugin.worker.variants"
        assert architecture_of(registry.models[name].class_name) == name


def test_a_class_of_another_plugin_stays_and_cannot_be_steered(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    name = "OlmoeForCausalLM"
    registry = MODEL_REGISTRY.load()
    monkeypatch.setitem(registry.models, name, registry.models[name])
    registry.register_model(name, "other_plugin.models:TheirOlmoe")
    register()
    assert registry.models[name].module_name == "other_plugin.models"
    model = SimpleNamespace(architecture=name, hf_config=SimpleNamespace(architectures=[name]))
    config = SimpleNamespace(model_config=model)
    assert "another plugin has registered its own OlmoeForCausalLM" in str(_shape(config))


def test_variant_names_carry_the_vllm_version() -> None:
    assert variant_name("OlmoeForCausalLM") == f"SteerableOlmoeForCausalLM_vllm_{re.sub('[.+]', '_', vllm_version())}"
    assert architecture_of("SteerableOlmoeForCausalLM_vllm_0_1_0") is None


def test_a_variant_is_a_subclass_of_vllms_own_class_under_its_name() -> None:
    # All of them, with what vLLM looks up on a class: tests/engine/test_every_moe.py.
    from vllm.model_executor.models.olmoe import OlmoeForCausalLM

    from vllm_steermoe_plugin.worker import variants

    variant = getattr(variants, variant_name("OlmoeForCausalLM"))
    assert issubclass(variant, OlmoeForCausalLM) and issubclass(variant, variants.SteerableMixin)
    assert variant.__name__ == "OlmoeForCausalLM" and variant is getattr(variants, variant_name("OlmoeForCausalLM"))
    with pytest.raises(AttributeError):
        _ = variants.SteerableNothing  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="no model class for NobodysForCausalLM"):
        variants.upstream_class("NobodysForCausalLM")


def test_entry_points_resolve() -> None:
    found = {
        (point.group, point.name): point
        for point in importlib.metadata.distribution("vllm-steermoe-plugin").entry_points
    }
    assert found["vllm.general_plugins", "steermoe"].load() is register
    for point in found.values():
        assert callable(point.load()), point


def engine_config(engines: Callable[..., Any], checkpoint: Callable[[str], Path]) -> Any:
    engine = engines(
        str(checkpoint("OlmoeForCausalLM")), {"count_groups": 4}, dtype="float32", enable_prefix_caching=False
    )
    return engine.llm_engine


def test_the_compile_cache_key_differs_from_stock(
    engines: Callable[..., Any], checkpoint: Callable[[str], Path]
) -> None:
    config = engine_config(engines, checkpoint).vllm_config
    with_plugin = config.compute_hash()
    mark = config.additional_config.pop("steermoe_bound")
    assert config.compute_hash() != with_plugin
    config.additional_config["steermoe_bound"] = mark


def test_a_gate_that_ignores_its_rules_fails_the_self_check(
    engines: Callable[..., Any], checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_steermoe_plugin.worker.gate import SteeredGateLinear
    from vllm_steermoe_plugin.worker.self_check import check_gate

    core = engine_config(engines, checkpoint).engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    gates = [module for module in model.modules() if isinstance(module, SteeredGateLinear)]
    check_gate(gates[1], model.steering_state, 1)
    rewrite = SteeredGateLinear.rewrite
    monkeypatch.setattr(SteeredGateLinear, "rewrite", lambda self, logits: logits)
    with pytest.raises(EngineError, match="does not activate"):
        check_gate(gates[1], model.steering_state, 1)
    monkeypatch.setattr(SteeredGateLinear, "rewrite", lambda self, logits: rewrite(self, logits) + 1)
    with pytest.raises(EngineError, match="changes the logits"):
        check_gate(gates[1], model.steering_state, 1)


def test_a_model_with_an_unbound_layer_is_refused(
    engines: Callable[..., Any], checkpoint: Callable[[str], Path]
) -> None:
    from vllm_steermoe_plugin.models.architectures import ARCHITECTURES
    from vllm_steermoe_plugin.worker.layers import moe_layers

    core = engine_config(engines, checkpoint).engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    shape = model.steering_state.shape
    found = moe_layers(model, shape, {0, 1, 2}, ARCHITECTURES[shape.architecture])
    assert [layer.index for layer in found] == [0, 1, 2] and all(layer.gate is not None for layer in found)
    for expected in ({0, 2}, {0, 1, 2, 3}):
        with pytest.raises(EngineError, match=r"layers \[0, 1, 2\] but expected " + re.escape(str(sorted(expected)))):
            moe_layers(model, shape, expected, ARCHITECTURES[shape.architecture])
