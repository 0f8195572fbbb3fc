"""LoRA beside steering, in the real engine: the adapter shifts the router logits first, the rewrite comes after.

vLLM wraps every gate that an adapter may target and adds the adapter's part to what the gate returned. Two things
about the CPU build shape this test. It has no expert kernel that takes LoRA, so the kernel without is chosen by
hand and only gates and attention are adapted. And its mixed batches give requests without an adapter the last slot's
weights, so there is one slot more than adapters, which stays zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.adapters import merge_adapter, write_adapter
from tests.support.alone import run_alone
from tests.support.oracle import ReferenceModel, Rules
from tests.support.random_steering import as_text, prompt, random_rules
from vllm_steermoe_plugin.models.checkpoints import shape_in

ARCHITECTURE = "Qwen3MoeForCausalLM"
LENGTH = 40

_SCRIPT = """
import dataclasses, json, sys
from pathlib import Path
import vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method as experts
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm_steermoe_plugin.models.checkpoints import shape_in
from tests.support.engines import model_of, start
from vllm_steermoe_plugin.detection.engine_client import take_counts
select = experts.select_unquantized_moe_backend
experts.select_unquantized_moe_backend = lambda moe_config: select(
    dataclasses.replace(moe_config, is_lora_enabled=False))
folder, adapter, ids, steer = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
engine = start(folder, {"count_groups": 4}, dtype="float32", enable_prefix_caching=True, block_size=32,
               enable_lora=True, max_lora_rank=8, max_loras=2, lora_target_modules=["gate", "o_proj"])
wrapped = [type(m).__name__ for n, m in model_of(engine).named_modules() if n.endswith("mlp.gate")]
lora = LoRARequest("adapter", 1, adapter)
mixes = [(None, None), (steer, None), (None, lora), (steer, lora)]

def scored(outputs):
    return [[entry[t].logprob for entry, t in zip(o.prompt_logprobs[1:], ids[1:])] for o in outputs]

def ask(mixes, counted):
    params = [SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args={
                  **({"steermoe": s} if s else {}),
                  **({"steermoe_count": json.dumps({"group": g, "ranges": [[0, len(ids)]]})} if counted else {})},
                  **({"prompt_logprobs": 0} if counted else {"logprobs": 1}))
              for g, (s, _) in enumerate(mixes, 1)]
    return engine.generate([{"prompt_token_ids": ids}] * len(mixes), params, use_tqdm=False,
                           lora_request=[adapter for _, adapter in mixes])

together = ask(mixes, True)
selections, tokens = take_counts(engine, shape_in(Path(folder)).layers)
cache = []
for _ in range(2):
    for mix in mixes:
        output = ask([mix], False)[0]
        first = output.outputs[0]
        cache.append([output.num_cached_tokens, first.token_ids[0], first.logprobs[0][first.token_ids[0]].logprob])
print("RESULT" + json.dumps({"wrapped": wrapped, "logprobs": scored(together), "selections": selections.tolist(),
                             "tokens": tokens.tolist(), "cache": cache}))
"""


@pytest.fixture(scope="module")
def adapted(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, an adapter for it, and both merged."""
    folder = checkpoint(ARCHITECTURE)
    into = tmp_path_factory.mktemp("lora")
    shapes = {f"model.layers.{layer}.mlp.gate": (64, 8) for layer in shape_in(folder).layers}
    shapes |= {f"model.layers.{layer}.self_attn.o_proj": (64, 64) for layer in range(3)}
    adapter = write_adapter(into / "adapter", shapes)
    return folder, adapter, merge_adapter(folder, adapter, into / "merged")


def test_adapters_and_steering_in_one_batch_equal_the_reference(adapted: tuple[Path, Path, Path]) -> None:
    folder, adapter, merged = adapted
    shape = shape_in(folder)
    rules = random_rules(shape, 1)
    ids = prompt(3, LENGTH)
    found = run_alone(_SCRIPT, str(folder), str(adapter), json.dumps(ids), as_text(rules))
    assert found["wrapped"] == ["ReplicatedLinearWithLoRA"] * len(shape.layers), "the gates must be adapted"
    assert found["tokens"] == [LENGTH] * 4
    last = []
    mixes: list[tuple[Path, Rules]] = [(folder, {}), (folder, rules), (merged, {}), (merged, rules)]
    for group, (weights, mine) in enumerate(mixes):
        expected, chosen = ReferenceModel(weights).run(ids, mine)
        np.testing.assert_allclose(
            found["logprobs"][group], [expected[i, t] for i, t in enumerate(ids[1:])], atol=2e-3, err_msg=str(group)
        )
        for row, layer in enumerate(shape.layers):
            counts = np.bincount(np.concatenate(chosen[layer]), minlength=shape.num_experts)
            assert found["selections"][group][row] == counts.tolist(), (group, layer)
        last.append(float(expected[-1].max()))
    by_mix = [np.array(logprobs) for logprobs in found["logprobs"]]
    for one in range(4):
        for other in range(one):
            assert np.abs(by_mix[one] - by_mix[other]).max() > 0.05, "the four must differ for this to show anything"

    cold, warm = found["cache"][:4], found["cache"][4:]
    assert [hit for hit, _, _ in cold] == [0] * 4, "adapter or steering read another's cached blocks"
    assert [hit for hit, _, _ in warm] == [32] * 4, "each must find its own again"
    for asked in (cold, warm):
        np.testing.assert_allclose([logprob for _, _, logprob in asked], last, atol=2e-3)
