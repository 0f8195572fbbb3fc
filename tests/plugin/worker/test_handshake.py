"""Every worker says whether it steers, before any request is steered; a user's own worker methods stay."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from expert_registry.errors import EngineError
from tests.support.alone import run_alone
from vllm_steermoe_plugin.compat.handshake import (
    EXTENSION,
    extension_beside,
    release,
    users_extension,
    why_not_all,
    worker_status,
)
from vllm_steermoe_plugin.models.engine_config import preparing
from vllm_steermoe_plugin.worker import extension
from vllm_steermoe_plugin.worker.extension import SteerMoEWorker

HERE = worker_status(steers=True)
ABSENT = worker_status(steers=False)
OLDER = HERE | {"release": "vllm-steermoe-plugin 0.0.1"}


def test_all_are_present() -> None:
    assert [why_not_all(answers) for answers in ([[HERE]], [[HERE, HERE]], [[HERE], [HERE]])] == [None] * 3


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        ([[ABSENT]], "worker 0 of engine 0 (its model is vLLM's own"),
        ([[HERE], [ABSENT, HERE]], "worker 0 of engine 1 (its model is vLLM's own"),
        ([[OLDER, HERE]], "worker 0 of engine 0 (vllm-steermoe-plugin 0.0.1)"),
        ([[ABSENT] * 20], "worker 7 of engine 0 (its model is vLLM's own: the plugin is not loaded) and others"),
        ([[HERE], []], "all"),
    ],
)
def test_who_is_absent_is_named_with_what_to_do(answers: list[list[Any]], named: str) -> None:
    why = why_not_all(answers)
    assert why is not None and named in why and f"workers without {release()}" in why and "VLLM_PLUGINS" in why


def test_a_runner_that_would_not_report_stops_the_start() -> None:
    with pytest.raises(EngineError, match="worker 1 of engine 0: another runner"):
        why_not_all([[HERE, worker_status(steers=False, fault="another runner")]])


def answer_of(model: Any, **runner: Any) -> Any:
    worker = SteerMoEWorker()
    worker.model_runner = SimpleNamespace(get_model=lambda: model, **runner)
    return worker.steermoe_handshake()


def test_a_worker_answers_for_its_model() -> None:
    assert answer_of(SimpleNamespace(modules=lambda: [])) == ABSENT, "vLLM's own class"
    unbound = SimpleNamespace(steering_state=None)
    unbound.modules = lambda: [unbound]
    assert "not bound" in answer_of(unbound)["fault"]
    unbound._steermoe_unbound = ""
    assert answer_of(unbound) == ABSENT | {"why": ""}, "left to vLLM on purpose"
    unbound._steermoe_unbound = "transformers routes"
    assert why_not_all([[HERE], [answer_of(unbound)]]) == "transformers routes"
    bound = SimpleNamespace(steering_state="a state")
    bound.modules = lambda: [bound]
    config = SimpleNamespace(use_v2_model_runner=False)
    assert "neither vLLM's Model Runner V1 nor V2" in answer_of(bound, vllm_config=config)["fault"]


class Own:
    """A user's own worker methods."""

    def mine(self) -> str:
        return "mine"

    def init_worker_extension(self) -> None:
        """A hook that vLLM 0.33 looks up on the class."""


class Derived(SteerMoEWorker):
    """A user's own, made for this plugin."""


def test_a_users_own_extension_keeps_its_methods_beside_ours() -> None:
    assert extension_beside("") == EXTENSION == extension_beside(EXTENSION)
    name = extension_beside(f"{Own.__module__}.Own")
    assert extension_beside(name) == name and users_extension("SteerMoEWorker") is None
    module, _, attribute = name.rpartition(".")
    assert module == extension.__name__
    both = getattr(extension, attribute)
    assert both is getattr(extension, attribute) and both().mine() == "mine" and issubclass(both, SteerMoEWorker)
    assert both.init_worker_extension is Own.init_worker_extension
    assert getattr(extension, extension_beside(f"{Derived.__module__}.Derived").rpartition(".")[2]) is Derived
    with pytest.raises(AttributeError, match="Nothing"):
        _ = extension.Nothing  # type: ignore[attr-defined]
    with pytest.raises(ModuleNotFoundError):
        getattr(extension, extension_beside("no.such.Class").rpartition(".")[2])


def test_the_configuration_is_prepared_after_what_vllm_does_for_the_architecture(monkeypatch: Any) -> None:
    done: list[Any] = []
    monkeypatch.setattr("vllm_steermoe_plugin.models.engine_config.prepare", lambda config: done.append("ours"))

    class Theirs:
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            done.append("theirs")

    made: Any = preparing(Theirs)
    made.verify_and_update_config(None)
    assert done == ["theirs", "ours"] and preparing(made) is made


_HALF = """
import asyncio, json, sys
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_steermoe_plugin.engine import engine_options

async def main():
    options = engine_options(sys.argv[1], {"allow_experts": True}, dtype="float32", enforce_eager=True,
        skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=64 << 20,
        gpu_memory_utilization=0.2, tensor_parallel_size=2, worker_cls="tests.support.absent_worker.AbsentWorker",
        worker_extension_cls="tests.plugin.worker.test_handshake.Own",
        additional_config={"another plugin's": {"key": 1}})
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    async def ask(name, steer):
        params = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False, ignore_eos=True,
                                extra_args={"steermoe": steer} if steer else None)
        try:
            async for output in engine.generate({"prompt_token_ids": [3, 4, 5]}, params, name):
                last = output.outputs[0]
        except Exception as error:
            return [type(error).__name__, str(error)]
        return ["answered", len(last.token_ids)]

    experts = '{"activate": {"0": [1]}}'
    asked = [await ask("one", experts), await ask("two", None), await ask("three", experts), await ask("four", "none")]
    said = [await engine.collective_rpc("steermoe_handshake"), await engine.collective_rpc("mine")]
    print("RESULT" + json.dumps([asked, said, engine.vllm_config.additional_config]), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_worker_that_does_not_load_the_plugin_is_noticed_by_the_front_end(checkpoint: Any) -> None:
    (steered, plain, again, none), (said, mine), config = run_alone(
        _HALF,
        str(checkpoint("OlmoeForCausalLM")),
        drop=["VLLM_ENABLE_V1_MULTIPROCESSING"],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    assert said == [HERE, ABSENT] and mine == ["mine", "mine"], "the user's own methods are there, too"
    assert config["another plugin's"] == {"key": 1} and config["steermoe"]["allow_experts"]
    for refused in (steered, again):
        assert refused[0] == "VLLMValidationError" and "worker 1 of engine 0 (its model is vLLM's own" in refused[1]
    assert plain == none == ["answered", 3]
