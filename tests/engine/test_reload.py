"""vLLM's `reload_weights`: as in stock vLLM, under the same rules, and no complaint about our buffers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.alone import run_alone
from vllm_steermoe_plugin.compat.symbols.worker import ELEMENTS_TO_LOAD, LOAD_NUMEL

_RELOAD = """
import json, logging, sys
from vllm import LLM, SamplingParams
from tests.support.engines import EXACT, SMALL, TINY, model_of

said = []
class Listen(logging.Handler):
    def emit(self, record): said.append(record.getMessage())
engine = LLM(sys.argv[1], **SMALL, **TINY, **EXACT)
logging.getLogger("vllm").addHandler(Listen())
logging.getLogger("vllm").setLevel(logging.WARNING)
prompts = [{"prompt_token_ids": [3, 1, 4, 1, 5]}] * 2
params = [SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False,
                         extra_args={"steermoe": s} if s else None) for s in (None, sys.argv[2])]
def tokens(): return [list(o.outputs[0].token_ids) for o in engine.generate(prompts, params, use_tqdm=False)]
before = tokens()
model = model_of(engine)
state = getattr(model, "steering_state", None)
buffers = state.device_buffers() if state else {}
at = [buffer.data_ptr() for buffer in buffers.values()]
engine.collective_rpc("reload_weights")
kept = [getattr(model, "steermoe_" + name).data_ptr() for name in buffers] == at
print("RESULT" + json.dumps([before, tokens(), said, len(buffers), kept]))
"""


def test_weights_are_reloaded_under_steering_and_nothing_is_missed(checkpoint: Callable[[str], Path]) -> None:
    arguments = str(checkpoint("OlmoeForCausalLM")), json.dumps({"activate": {"0": [1, 2], "1": [0, 3]}})
    stock_before, stock_after, stock_said, none, _ = run_alone(_RELOAD, *arguments, VLLM_PLUGINS="")
    before, after, said, buffers, kept = run_alone(_RELOAD, *arguments)
    assert none == 0 < buffers and kept, "kernels and captured graphs read the buffers where they were"
    # What vLLM's reload makes of the weights on a CPU is not what was loaded first; here it need only be the same.
    assert [before[0], after[0]] == [stock_before[0], stock_after[0]]
    assert before[1] != before[0] and after[1] != after[0]
    assert said == stock_said


def test_the_attribute_is_the_one_that_vllm_reads() -> None:
    tensor = torch.zeros(5)
    assert LOAD_NUMEL.load()(tensor) == 5
    setattr(tensor, ELEMENTS_TO_LOAD, 0)
    assert LOAD_NUMEL.load()(tensor) == 0
