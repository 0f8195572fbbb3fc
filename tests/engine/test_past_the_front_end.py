"""Requests that came past the front end, in vLLM's own server engine: its core is another process, with the plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.alone import run_alone

_SCRIPT = """
import asyncio, json, sys
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

LAUNCHER = "vllm.entrypoints.launchers.app"
EXPERTS = '{"activate": {"0": [1]}, "deactivate": {"2": [3]}}'

def params(**extra_args):
    return SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False,
                          extra_args=extra_args or None, output_kind=RequestOutputKind.FINAL_ONLY)

async def main():
    found = {"loaded before": LAUNCHER in sys.modules}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=64, max_num_seqs=4,
        block_size=32, num_gpu_blocks_override=9, kv_cache_memory_bytes=64 << 20, gpu_memory_utilization=0.2,
        additional_config={"steermoe": {"allow_experts": True}}))

    async def ask(name, prompt, **extra_args):
        try:
            async for output in engine.generate(prompt, params(**extra_args), name):
                last = output.outputs[0]
            found[name] = list(last.token_ids) if last.finish_reason == "length" else last.finish_reason
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    prompt = {"prompt_token_ids": [3, 7, 9, 11]}
    await ask("plain", prompt)
    await ask("steered", prompt, steermoe=EXPERTS)
    process = InputProcessor.process_inputs
    tasks = await engine.get_supported_tasks()
    found["bodies are looked at"] = hasattr(sys.modules[LAUNCHER].init_entrypoints_middleware, "__steermoe__")
    stock = lambda name, **extra: process.__wrapped__(engine.input_processor, name, prompt, params(**extra),
                                                      supported_tasks=tasks)
    await ask("made, plain", stock("made, plain"))
    await ask("made, steered", stock("made, steered", steermoe=EXPERTS))
    await ask("made and checked", process(engine.input_processor, "made and checked", prompt, params(steermoe=EXPERTS),
                                          supported_tasks=tasks))
    # A front end without the plugin.
    InputProcessor.process_inputs = process.__wrapped__
    engine.input_processor.process_inputs_async = lambda *args, **more: asyncio.to_thread(
        process.__wrapped__, engine.input_processor, *args, **more)
    await asyncio.gather(ask("neighbour", prompt), ask("experts", prompt, steermoe=EXPERTS),
                         ask("name", prompt, steermoe="digits"),
                         ask("forged", prompt, steermoe=EXPERTS, steermoe_checked=1),
                         ask("forged name", prompt, steermoe="digits", steermoe_checked=True),
                         ask("forged layer", prompt, steermoe='{"activate": {"99": [1]}}', steermoe_checked=True),
                         ask("forged experts", prompt, steermoe=EXPERTS, steermoe_checked=True),
                         ask("forged count", prompt, steermoe_count="nothing", steermoe_checked=True))
    await ask("after", prompt)
    engine.shutdown()
    print("RESULT" + json.dumps(found))

asyncio.run(main())
"""


def test_nothing_that_came_past_the_front_end_is_steered_or_ends_the_engine(checkpoint: Callable[[str], Path]) -> None:
    found = run_alone(_SCRIPT, str(checkpoint("Qwen3MoeForCausalLM")), drop=["VLLM_ENABLE_V1_MULTIPROCESSING"])
    assert not found["loaded before"] and found["bodies are looked at"]
    assert len(found["plain"]) == 8 and found["steered"] != found["plain"]
    assert found["made, plain"] == found["neighbour"] == found["after"] == found["plain"]
    assert found["made and checked"] == found["steered"]
    # vLLM 0.32 says no more of what its core refuses; 0.33 says what.
    refused = [name for name in found if name.startswith("forged")] + ["made, steered", "experts", "name"]
    assert len(refused) == 8
    for name in refused:
        assert found[name] == "error" or "VLLMValidationError: steermoe: " in found[name], name
