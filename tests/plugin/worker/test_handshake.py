"""Every worker must say that it steers, before any request is steered; stock vLLM's workers cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm_steermoe_plugin.worker.handshake import _say_so, present, why_not_all

from tests.support.alone import run_alone
from tests.support.folders import ROOT

HERE = present()


@pytest.mark.parametrize("answers", [[[HERE]], [[HERE, HERE]], [[HERE], [HERE]]])
def test_all_are_present(answers: list[list[object]]) -> None:
    assert why_not_all(answers) is None


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        ([[None]], "worker 0 of engine 0 (without the plugin)"),
        ([[HERE, None]], "worker 1 of engine 0 (without the plugin)"),
        ([[HERE], [None, HERE]], "worker 0 of engine 1 (without the plugin)"),
        ([["vllm-steermoe-plugin 0.0.1", HERE]], "worker 0 of engine 0 (vllm-steermoe-plugin 0.0.1)"),
        ([[True]], "worker 0 of engine 0 (True)"),
        ([[None] * 20], "worker 7 of engine 0 (without the plugin) and others"),
        ([[]], "any worker"),
        ([[HERE], []], "any worker"),
    ],
)
def test_who_is_absent_is_named_with_what_to_do(answers: list[list[object]], named: str) -> None:
    why = why_not_all(answers)
    assert why is not None and named in why and f"install {HERE}" in why and "VLLM_PLUGINS" in why


@pytest.mark.parametrize(("state", "said"), [("a state", HERE), (None, f"{HERE}, whose model is vLLM's own")])
def test_a_worker_whose_model_is_not_bound_says_so(state: str | None, said: str) -> None:
    model = SimpleNamespace(modules=lambda: [SimpleNamespace(steering_state=state)])
    worker = SimpleNamespace(model_runner=SimpleNamespace(get_model=lambda: model))
    asked: list[Any] = []
    assert _say_so(asked.append)(worker) == said and asked == [worker], "vLLM's own check is made all the same"


_HALF = """
import asyncio, json, sys
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_steermoe_plugin.engine import engine_options

async def main():
    options = engine_options(sys.argv[1], {"allow_experts": True}, dtype="float32", enforce_eager=True,
        skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4, kv_cache_memory_bytes=64 << 20,
        gpu_memory_utilization=0.2, tensor_parallel_size=2, worker_cls="tests.support.absent_worker.AbsentWorker")
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
    print("RESULT" + json.dumps([asked, await engine.collective_rpc("check_health")]), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_remote_worker_without_the_package_is_noticed_by_the_front_end(checkpoint: Any) -> None:
    (steered, plain, again, none), said = run_alone(
        _HALF,
        str(checkpoint("OlmoeForCausalLM")),
        drop=["VLLM_ENABLE_V1_MULTIPROCESSING"],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
        PYTHONPATH=str(ROOT),
    )
    assert said == [HERE, None]
    for refused in (steered, again):
        assert refused[0] == "VLLMValidationError" and "worker 1 of engine 0 (without the plugin)" in refused[1]
    assert plain == none == ["answered", 3]
