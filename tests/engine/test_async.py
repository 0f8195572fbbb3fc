"""Asynchronous scheduling: the next step is scheduled, and its inputs prepared, before the last one's tokens are known.

vLLM switches it off on the CPU, and its runner then speaks to CUDA streams and events. Here it is switched on again and
those get empty stand-ins, so scheduler, batch queue and runner are vLLM's own and run ahead as on a GPU: requests that
stop on a token get a step too many, positions of generated tokens are counted before the tokens are known. Not shown by
a CPU: that copies to the device are ordered. They are issued on the runner's own stream, in `_prepare_inputs` (V1) or
`ModelState.prepare_inputs` (V2), after the kernels of the step before and before those of their own.

What could go wrong, and does not: positions. A phase needs to know only whether a position lies in the prompt, and
counted spans lie in the prompt; both are known when a step is prepared. Only positions of generated tokens may be too
high (drafts taken for accepted), and those stay generated tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.alone import run_alone
from tests.support.random_steering import as_text, random_rules
from vllm_steermoe_plugin.models.checkpoints import shape_in

_SCRIPT = """
import contextlib, json, sys
from pathlib import Path
import torch
from vllm import SamplingParams
from vllm.platforms.cpu import CpuPlatform
from vllm_steermoe_plugin.models.checkpoints import shape_in
from tests.support.engines import EXACT, start
from vllm_steermoe_plugin.detection.engine_client import take_counts

class Nothing:
    def __init__(self, *_, **__): pass
    def __getattr__(self, name): return lambda *_, **__: True

torch.cuda.Stream = torch.cuda.Event = torch.Event = Nothing
torch.cuda.stream = lambda _: contextlib.nullcontext()
torch.cuda.current_stream = lambda *_: Nothing()
settle, ahead = CpuPlatform.check_and_update_config, False

def keep(config):
    settle(config)
    config.scheduler_config.async_scheduling = ahead

CpuPlatform.check_and_update_config = staticmethod(keep)
folder, text, other = sys.argv[1:]
steerings = [None, text, text[:-1] + ', "phase": "generation"}', other[:-1] + ', "phase": "prompt"}']

def params(i, **more):
    steer = steerings[i % 4]
    count = json.dumps({"group": 1 + i % 4, "ranges": [[2, 20]]})
    return SamplingParams(**{"temperature": 0.0, "logprobs": 1, "ignore_eos": True, "detokenize": False,
                             "max_tokens": 4 + 5 * (i % 3),
                             "extra_args": {"steermoe_count": count, **({"steermoe": steer} if steer else {})}, **more})

def prompts(n):
    return [{"prompt_token_ids": [3 + (7 * i + k) % 90 for k in range(24 + 3 * i)]} for i in range(n)]

def values(outputs):
    return [[list(o.outputs[0].token_ids), o.outputs[0].finish_reason,
             [e[t].logprob for e, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)]] for o in outputs]

kept, found, stops = [], [], None
for ahead in (False, True):
    engine = start(folder, {"count_groups": 4}, **EXACT, max_num_seqs=4, max_num_batched_tokens=24, block_size=32,
                   num_gpu_blocks_override=9, disable_log_stats=False)
    kept.append(engine)
    core = engine.llm_engine.engine_core.engine_core
    state = core.model_executor.driver_worker.worker.model_runner.model.steering_state
    mixed = engine.generate(prompts(12), [params(i) for i in range(12)], use_tqdm=False)
    # Stop tokens that greedy decoding reaches in the middle: the step after has then been scheduled already.
    stops = stops or [o.outputs[0].token_ids[min(2, len(o.outputs[0].token_ids) - 1)] for o in mixed]
    stopped = engine.generate(prompts(12), [params(i, stop_token_ids=[stops[i]]) for i in range(12)], use_tqdm=False)
    long = engine.generate(prompts(4), [params(i, max_tokens=80) for i in range(4)], use_tqdm=False)
    preempted = sum(m.value for m in engine.get_metrics() if m.name == "vllm:num_preemptions")
    for round_ in range(3):
        names = [engine.llm_engine.add_request(f"abort-{round_}-{i}", p, params(i, max_tokens=40, extra_args=None
                 if steerings[i] is None else {"steermoe": steerings[i]})) for i, p in enumerate(prompts(4))]
        for _ in range(1 + 2 * round_):
            engine.llm_engine.step()
        engine.llm_engine.abort_request(names, internal=True)
        while engine.llm_engine.has_unfinished_requests():
            engine.llm_engine.step()
    again = engine.generate(prompts(2), [params(i) for i in range(2)], use_tqdm=False)
    selections, tokens = take_counts(engine, shape_in(Path(folder)).layers)
    found.append([type(core.scheduler).__name__, core.batch_queue_size, preempted, state.num_requests, tokens.tolist(),
                  selections.tolist(), values(mixed) + values(stopped) + values(long) + values(again)])
print("RESULT" + json.dumps(found))
"""


def test_running_ahead_changes_nothing(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("Qwen3MoeForCausalLM")
    shape = shape_in(folder)
    texts = [as_text(random_rules(shape, seed)) for seed in (1, 2)]
    sync, ahead = run_alone(_SCRIPT, str(folder), *texts)
    assert sync[:2] == ["Scheduler", 1] and ahead[:2] == ["AsyncScheduler", 2], "one of them must really run ahead"
    assert sync[2] > 0 and ahead[2] > 0, "both must preempt"
    assert sync[3] <= 2 and ahead[3] <= 2, "requests that ended must be forgotten"
    assert sync[4] == ahead[4] == [18 * 8, 18 * 8, 18 * 7, 18 * 7], json.dumps([sync[4], ahead[4]])
    assert sync[5] == ahead[5]
    reasons = [reason for _, reason, _ in sync[6]]
    assert reasons.count("stop") > 6, "requests must end in the middle"
    for one, other in zip(sync[6], ahead[6], strict=True):
        assert one[:2] == other[:2]
        np.testing.assert_allclose(one[2], other[2], atol=1e-4)
