"""Several ranks in the real engine, against one: pipeline parallel 2 and data parallel 2; and what is refused at start.

Tensor parallel 2 is in `test_engine_mixes.py`. Where vLLM's CPU build falls short:
* Pipeline parallel: eager workers skip the dummy run in which the second rank makes its receive buffers; the test
  asks for that run by vLLM's own `execute_dummy_batch`.
* Data parallel: its communicator lacks the two collectives by which MoE layers trade tokens; `dp_worker.py` adds them.
* Expert parallel: its fused kernel ends the process with a segmentation fault at the first expert of another rank,
  without this plugin too, so it cannot be run here. Gates are whole on every rank and come before tokens are traded,
  as under data parallelism below.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expert_registry.errors import EngineError
from tests.support.alone import run_alone
from tests.support.engines import model_of
from tests.support.greedy import answer, asking, generate
from tests.support.random_steering import as_text, prompt, random_rules
from vllm_steermoe_plugin.compat.symbols.worker import MOE_RUNNER
from vllm_steermoe_plugin.detection.engine_client import take_counts
from vllm_steermoe_plugin.models.architectures import ARCHITECTURES
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.models.engine_limits import refuse_unsupported
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.counted_spans import CountedSpans
from vllm_steermoe_plugin.steering.wire import COUNT_KEY, STEER_KEY
from vllm_steermoe_plugin.worker.layers import moe_layers

ARCHITECTURE = "Qwen3MoeForCausalLM"
LENGTH = 24
REQUESTS = 8

_PIPELINE = """
import json, sys
from pathlib import Path
from tests.support.engines import EXACT, start
from tests.support.greedy import answer, asking, generate
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.detection.engine_client import take_counts
if __name__ == "__main__":
    folder, prompts, extras = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    engine = start(folder, {"count_groups": 4}, **EXACT, pipeline_parallel_size=2)
    engine.collective_rpc("execute_dummy_batch")
    params = [asking(max_tokens=6, logprobs=1, ignore_eos=True, extra_args=e) for e in extras]
    answers = [answer(output) for output in generate(engine, prompts, params)]
    selections, tokens = take_counts(engine, shape_in(Path(folder)).layers)
    status = engine.collective_rpc("steermoe_status")
    print("RESULT" + json.dumps([[s["layers"] for s in status], [s["steered_requests"] for s in status],
        selections.tolist(), tokens.tolist(), [[ids, logprobs.tolist()] for ids, logprobs in answers]]))
"""

_DATA = """
import asyncio, json, sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from tests.support.engines import EXACT, SMALL, TINY
from tests.support.greedy import answer, asking
from vllm_steermoe_plugin.engine import engine_options

async def main():
    folder, prompts, extras = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    options = engine_options(folder, {"allow_experts": True}, **SMALL, **TINY, **EXACT, data_parallel_size=2)
    options["worker_extension_cls"] = "tests.support.dp_worker.DataParallelWorker"
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**options))

    async def one(number, ids, extra):
        params = asking(max_tokens=6, logprobs=1, ignore_eos=True, extra_args=extra)
        # Five on the first rank and three on the second: the first goes on alone, the second runs dummy batches.
        rank = 0 if number < 5 else 1
        async for output in engine.generate({"prompt_token_ids": ids}, params, str(number), data_parallel_rank=rank):
            last = output
        ids, logprobs = answer(last)
        return [ids, logprobs.tolist()]

    answers = await asyncio.gather(*(one(i, p, e) for i, (p, e) in enumerate(zip(prompts, extras))))
    # One more alone: the other rank must keep step without being steered.
    answers.append(await one(REQUESTS, prompts[1], extras[1]))
    print("RESULT" + json.dumps(answers), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture
def batch(checkpoint: Callable[[str], Path]) -> tuple[list[list[int]], list[dict[str, str]]]:
    """Prompts, and what each asks for: every steering beside every other, and two of four unsteered."""
    shape = shape_in(checkpoint(ARCHITECTURE))
    texts = [as_text(random_rules(shape, seed)) for seed in (1, 2)]
    steerings = [None, texts[0], texts[1][:-1] + ', "phase": "generation"}', None] * 2
    return [prompt(i, LENGTH) for i in range(REQUESTS)], [{STEER_KEY: s} if s else {} for s in steerings]


def on_one_rank(
    tiny: Callable[[str], Any], folder: Path, prompts: list[list[int]], extras: list[dict[str, str]]
) -> tuple[list[Any], list[Any]]:
    """The same batch on a single rank: answers and counts."""
    engine = tiny(ARCHITECTURE)
    engine.collective_rpc("steermoe_reset_counts")
    params = [asking(max_tokens=6, logprobs=1, ignore_eos=True, extra_args=extra) for extra in extras]
    answers = [answer(output) for output in generate(engine, prompts, params)]
    selections, tokens = take_counts(engine, shape_in(folder).layers)
    return answers, [selections.tolist(), tokens.tolist()]


def assert_same(one: list[Any], other: list[Any]) -> None:
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(one, other, strict=True):
        assert list(tokens) == list(other_tokens)
        np.testing.assert_allclose(logprobs, other_logprobs, atol=1e-4)


@pytest.mark.nightly
def test_pipeline_ranks_steer_and_count_their_own_layers(
    tiny: Callable[[str], Any], checkpoint: Callable[[str], Path], batch: tuple[list[list[int]], list[dict[str, str]]]
) -> None:
    folder = checkpoint(ARCHITECTURE)
    prompts, extras = batch
    counted = [extra | {COUNT_KEY: CountedSpans(1 + i % 4, ((0, LENGTH),)).to_json()} for i, extra in enumerate(extras)]
    layers, steered, selections, tokens, answers = run_alone(
        _PIPELINE,
        str(folder),
        json.dumps(prompts),
        json.dumps(counted),
        drop=["VLLM_ENABLE_V1_MULTIPROCESSING"],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    assert layers == [[0], [2]], "layer 1 is dense; each rank binds what it holds"
    assert steered == [4, 4], "the second rank must be told of every request too"
    expected, counts = on_one_rank(tiny, folder, prompts, counted)
    assert_same(expected, answers)
    assert counts == [selections, tokens]


@pytest.mark.nightly
def test_data_parallel_ranks_steer_their_own_requests(
    tiny: Callable[[str], Any], checkpoint: Callable[[str], Path], batch: tuple[list[list[int]], list[dict[str, str]]]
) -> None:
    folder = checkpoint(ARCHITECTURE)
    prompts, extras = batch
    answers = run_alone(
        _DATA.replace("REQUESTS", str(REQUESTS)),
        str(folder),
        json.dumps(prompts),
        json.dumps(extras),
        drop=["VLLM_ENABLE_V1_MULTIPROCESSING"],
        VLLM_CPU_OMP_THREADS_BIND="0|1",
    )
    expected, _ = on_one_rank(tiny, folder, prompts, extras)
    assert_same([*expected, expected[1]], answers)


def config(**changes: Any) -> Any:
    """An engine configuration in which nothing stands against steering, but for `changes`."""
    parallel = {
        "use_ubatching": False,
        "enable_elastic_ep": False,
        "data_parallel_size": 1,
        "prefill_context_parallel_size": 1,
    }
    parallel |= {key: value for key, value in changes.items() if key in parallel}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        additional_config={},
        kernel_config=SimpleNamespace(),
        aux_output_config=SimpleNamespace(enabled=changes.get("routed_experts", False)),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=changes.get("fast_prefill", False)),
        kv_transfer_config=changes.get("connector"),
        speculative_config=None,
    )


REFUSALS: dict[str, tuple[dict[str, Any], int, str]] = {
    "micro-batching": ({"use_ubatching": True}, 0, "micro-batching"),
    "elastic expert parallelism": ({"enable_elastic_ep": True}, 0, "elastic expert parallelism starts workers later"),
    "counting on several replicas": ({"data_parallel_size": 2}, 1, "counting under data parallelism"),
    "counting beside routed experts": ({"routed_experts": True}, 1, "enable_return_routed_experts"),
    "counting beside a KV connector": ({"connector": object()}, 1, "counting with a KV connector"),
    "fast prefill": ({"fast_prefill": True}, 0, "kv_sharing_fast_prefill"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_would_run_unsteered_is_refused_at_start(name: str) -> None:
    changes, groups, reason = REFUSALS[name]
    refuse_unsupported(config(), Settings(count_groups=groups))
    with pytest.raises(EngineError, match=reason) as caught:
        refuse_unsupported(config(**changes), Settings(count_groups=groups))
    assert '"enabled": false' in str(caught.value), "the message must say what to do"
    if groups:
        refuse_unsupported(config(**changes), Settings())


def test_the_refused_settings_are_vllms_own(tiny: Callable[[str], Any], checkpoint: Callable[[str], Path]) -> None:
    """The stand-ins above have the attributes that vLLM's configuration really has."""
    real, stand_in = tiny(ARCHITECTURE).llm_engine.vllm_config, config()
    for name, value in vars(stand_in.parallel_config).items():
        assert getattr(real.parallel_config, name) == value, name
    assert real.cache_config.kv_sharing_fast_prefill is stand_in.cache_config.kv_sharing_fast_prefill is False
    assert real.kv_transfer_config is stand_in.kv_transfer_config is None
    assert real.aux_output_config.enabled is stand_in.aux_output_config.enabled is False


def test_a_shared_expert_fused_into_the_gate_is_refused(
    tiny: Callable[[str], Any], checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tiny(ARCHITECTURE))
    shape = model.steering_state.shape
    rest = shape, set(shape.layers), ARCHITECTURES[ARCHITECTURE]
    assert [layer.index for layer in moe_layers(model, *rest)] == list(shape.layers)
    runner = next(m for m in model.modules() if isinstance(m, MOE_RUNNER.load()))
    monkeypatch.setattr(runner, "_fse_fuse_gate", True)
    with pytest.raises(EngineError, match="shared expert's gate"):
        moe_layers(model, *rest)
