"""Which model runner is live is checked when a worker starts; on the wrong one nothing runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.worker.cpu.model_runner import CPUModelRunner as RunnerV2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner as RunnerV1
from vllm.v1.worker.gpu.model_states.interface import ModelState

from expert_registry.errors import EngineError
from expert_registry.shape import MoEShape
from tests.support import runners
from tests.support.alone import run_alone
from vllm_steermoe_plugin.compat.symbols.worker import V1_METHODS
from vllm_steermoe_plugin.device.steering_state import SteeringState
from vllm_steermoe_plugin.worker.runners.guard import guard_model, lift_guard
from vllm_steermoe_plugin.worker.runners.lookup import check_live_runner, state_of
from vllm_steermoe_plugin.worker.runners.v1 import install_v1_hooks
from vllm_steermoe_plugin.worker.runners.v2 import with_steering

SHAPE = MoEShape("OlmoeForCausalLM", (0, 1), 4, 2)


def new_state() -> SteeringState:
    return SteeringState(SHAPE, (0, 1), max_requests=4, max_tokens=8, count_groups=0, device=torch.device("cpu"))


def runner_of(cls: type, **attributes: Any) -> Any:
    """An instance of a runner's class as the check sees it, without the engine that building one takes."""
    runner = object.__new__(cls)
    vars(runner).update(attributes)
    return runner


@pytest.fixture(autouse=True)
def hooks() -> None:
    install_v1_hooks()


class SomeState(ModelState):
    """A ModelState that reports to nobody."""

    def __init__(self, *_: Any) -> None:
        return None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        return None

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}

    def prepare_inputs_embeds(self, *args: Any) -> None:
        return None

    def prepare_attn(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


def test_vllms_own_runners_pass() -> None:
    state = new_state()
    check_live_runner(runner_of(RunnerV1), state, configured_v2=False)
    reporting = object.__new__(with_steering(SomeState, state))
    check_live_runner(runner_of(RunnerV2, model_state=reporting), state, configured_v2=True)


def test_a_runner_is_looked_at_once_and_its_model_runs_then() -> None:
    model = torch.nn.Linear(1, 1)
    model.steering_state = new_state()
    loaded: list[str] = []
    guard_model(model, lambda: loaded.append("now"))
    runner = runner_of(RunnerV1, model=model, vllm_config=SimpleNamespace(use_v2_model_runner=False))
    assert state_of(runner) is model.steering_state and "forward" not in vars(model)
    runner.model = torch.nn.Linear(1, 1)
    assert state_of(runner) is model.steering_state, "remembered, for it is asked in every step"
    assert loaded == ["now"]


def test_a_runner_that_makes_its_model_state_may_run_its_model() -> None:
    model, state = torch.nn.Linear(1, 1), new_state()
    guard_model(model, lambda: None)
    with_steering(SomeState, state)(None, model)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("cls", [RunnerV1, RunnerV2])
def test_another_runner_than_the_configuration_says_is_an_error(cls: type) -> None:
    state = new_state()
    runner = runner_of(cls, model_state=object.__new__(with_steering(SomeState, state)))
    with pytest.raises(EngineError, match="but the configuration says"):
        check_live_runner(runner, state, configured_v2=cls is RunnerV1)


@pytest.mark.parametrize("method", V1_METHODS)
def test_a_runner_with_a_method_of_its_own_is_an_error(method: str) -> None:
    own = type("OwnRunner", (RunnerV1,), {method: lambda self, *args: None})
    below = type("BelowOwnRunner", (own,), {})
    for cls in (own, below):
        with pytest.raises(EngineError, match=f"OwnRunner has a {method} of its own"):
            check_live_runner(runner_of(cls), new_state(), configured_v2=False)


def test_a_model_state_that_does_not_report_to_this_model_is_an_error() -> None:
    state = new_state()
    for found in (object.__new__(SomeState), object.__new__(with_steering(SomeState, new_state())), None):
        with pytest.raises(EngineError, match="does not report"):
            check_live_runner(runner_of(RunnerV2, model_state=found), state, configured_v2=True)
    with pytest.raises(EngineError, match="NoneType, does not report"):
        check_live_runner(runner_of(RunnerV2), state, configured_v2=True)


@pytest.mark.parametrize("configured_v2", [False, True])
def test_a_runner_that_is_neither_is_an_error(configured_v2: bool) -> None:
    with pytest.raises(EngineError, match=r"Stranger.*neither.*\"enabled\": false"):
        check_live_runner(runner_of(type("Stranger", (), {})), new_state(), configured_v2=configured_v2)


def test_a_guarded_model_does_not_run() -> None:
    model = torch.nn.Linear(2, 2)
    guard_model(model, lambda: None)
    with pytest.raises(EngineError, match="no supported model runner"):
        model(torch.zeros(1, 2))
    with pytest.raises(EngineError, match="no supported model runner"):
        model.forward(torch.zeros(1, 2))  # As wrappers that are compiled or captured call it.
    for _ in range(2):
        lift_guard(model)
    assert model(torch.zeros(1, 2)).shape == model.forward(torch.zeros(1, 2)).shape == (1, 2)
    assert "forward" not in vars(model)


def test_a_model_that_is_called_in_its_own_way_cannot_be_guarded() -> None:
    class Compiled(torch.nn.Linear):
        def __call__(self, *args: Any) -> Any:
            return torch.nn.Linear.forward(self, *args)

    with pytest.raises(EngineError, match=r"Compiled has a __call__ of its own.*\"enabled\": false"):
        guard_model(Compiled(2, 2), lambda: None)


_STARTS = """
import json, sys
import vllm.v1.worker.cpu_worker as workers
from vllm import SamplingParams
from vllm.model_executor.models.registry import ModelRegistry
from vllm_steermoe_plugin.engine import start_engine
from vllm_steermoe_plugin.worker import binding, variants
V1 = workers.CPUModelRunner

class Skipping(V1):
    def _prepare_inputs(self, *args, **kwargs):
        return super()._prepare_inputs.__wrapped__(self, *args, **kwargs)

class Custom(workers.CPUWorker):
    def get_kv_cache_spec(self):
        return self.model_runner.get_kv_cache_spec()

    def check_health(self):
        return None

workers.Custom = Custom
Custom.__module__ = "vllm.v1.worker.cpu_worker"

def attempt(runner=V1, worker="auto", settings=None, unbound=False, absent=False):
    workers.CPUModelRunner = runner
    if absent:  # vLLM remembers the class, but not for another `model_impl`.
        ModelRegistry.register_model("OlmoeForCausalLM", variants.upstream_class("OlmoeForCausalLM"))
    # As if a model were left out by mistake.
    binding.bind_model = variants.bind_model = (lambda *_: None) if unbound else bind_model
    steered = {"steermoe": '{"activate": {"0": [1]}}'}
    try:
        engine = start_engine(sys.argv[1], settings, dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
                              max_model_len=64, kv_cache_memory_bytes=64 << 20, gpu_memory_utilization=0.2,
                              worker_cls=worker, model_impl="vllm" if absent else "auto")
    except Exception as error:
        return ["start", type(error).__name__, str(error)]
    kept.append(engine)
    try:
        params = SamplingParams(max_tokens=1, detokenize=False, extra_args=None if settings else steered)
        engine.generate({"prompt_token_ids": [3, 4]}, params, use_tqdm=False)
    except Exception as error:
        return ["request", type(error).__name__, str(error)]
    return ["answered", "", ""]

kept, bind_model = [], binding.bind_model
# The derived worker first: vLLM mixes the plugin's methods into each worker class once.
print("RESULT" + json.dumps([
    attempt(worker="vllm.v1.worker.cpu_worker.Custom"), attempt(), attempt(Skipping),
    attempt(Skipping, settings={"enabled": False}), attempt(unbound=True),
    attempt(absent=True),
]))
"""


def test_engines_with_the_wrong_runner_do_not_start_or_do_not_answer(checkpoint: Any) -> None:
    custom, right, skipping, switched_off, unbound, absent = run_alone(_STARTS, str(checkpoint("OlmoeForCausalLM")))
    assert right == custom == ["answered", "", ""]
    if runners.V2:
        assert skipping == right, "V2 has no such method, and reports by its ModelState"
    else:
        assert skipping[:2] == ["start", "UnsupportedFeatureError"] and "_prepare_inputs of its own" in skipping[2]
    assert switched_off == ["answered", "", ""], "without steering the runner is nobody's business"
    assert unbound[:2] == ["start", "UnsupportedFeatureError"] and "not bound" in unbound[2]
    assert absent[:2] == ["request", "VLLMValidationError"] and "its model is vLLM's own" in absent[2]
