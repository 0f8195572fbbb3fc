"""Steering under what else vLLM does: sampling several answers, speculation, grammars, aborts, preemption, ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.support import corrected as corrected_models
from tests.support import runners
from tests.support.alone import run_alone
from tests.support.engines import model_of
from tests.support.greedy import prompt_logprobs
from tests.support.preemptions import watch_preemptions
from tests.support.random_steering import as_text, prompt, random_rules
from vllm_steermoe_plugin.compat.versions import vllm_version
from vllm_steermoe_plugin.lab.world import examples
from vllm_steermoe_plugin.models import lab_checkpoint
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.steering.wire import STEER_KEY

Engines = Callable[..., Any]
Checkpoint = Callable[[str], Path]


def steered(text: str | None, **options: Any) -> SamplingParams:
    """Greedy unless `options` say otherwise."""
    extra = {STEER_KEY: text} if text else None
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "extra_args": extra, **options})


def lab_steering(seed: int = 1) -> str:
    return as_text(random_rules(shape_in(lab_checkpoint.MODEL_DIR), seed))


def chats(number: int, behaviour: str = "digits") -> list[Any]:
    return [[{"role": "user", "content": example.prompt}] for example in examples(behaviour, "test")[:number]]


def texts(engine: Any, prompts: list[Any], params: list[SamplingParams]) -> list[list[str]]:
    return [[answer.text for answer in output.outputs] for output in engine.chat(prompts, params, use_tqdm=False)]


def test_several_answers_to_one_request_are_all_steered(lab: Any) -> None:
    text = lab_steering()
    greedy = texts(lab, chats(3), [steered(text)] * 3)
    # So low a temperature that sampling is greedy, yet vLLM fans the request out into three.
    several = texts(lab, chats(3), [steered(text, n=3, temperature=1e-4, seed=1)] * 3)
    assert [[one] * 3 for (one,) in greedy] == several


_SPECULATE = """
import json, sys
from vllm import SamplingParams
from tests.support.engines import EXACT, draft_of, start
from vllm_steermoe_plugin.lab.world import examples
draft, steerings = json.loads(sys.argv[1]), json.loads(sys.argv[2])
engine = start("steermoe-lab", **EXACT, speculative_config=draft, disable_log_stats=False)
chats = [[{"role": "user", "content": e.prompt}] for e in examples("digits", "test")[:24]]
params = [SamplingParams(temperature=0.0, max_tokens=12, extra_args={"steermoe": s} if s else None) for s in steerings]
answers = [o.outputs[0].text for o in engine.chat(chats, params, use_tqdm=False)]
drafts = sum(m.value for m in engine.get_metrics() if m.name == "vllm:spec_decode_num_drafts")
model = draft_of(engine)
print("RESULT" + json.dumps([answers, drafts, hasattr(model, "steering_state"),
                             getattr(model, "steering_state", None) is None]))
"""
DRAFTS: dict[str, dict[str, Any]] = {
    "n-grams": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
    "model": {"method": "draft_model", "model": str(lab_checkpoint.MODEL_DIR), "num_speculative_tokens": 3},
}


@pytest.mark.parametrize("method", DRAFTS)
def test_speculative_decoding_gives_the_same_answers(method: str, lab: Any) -> None:
    """In a process of its own: vLLM's speculation on CPU replaces kernels for the whole process.

    The drafting model is the same mixture of experts; it must stay vLLM's own, since no runner reports to it.
    """
    text = lab_steering(2)
    # Unsteered, steered, and steered only while generating: drafts must carry the rules of their positions.
    steerings = [None, text, text[:-1] + ', "phase": "generation"}'] * 8
    speculated, drafts, steerable, unsteered = run_alone(_SPECULATE, json.dumps(DRAFTS[method]), json.dumps(steerings))
    plain = [answer for (answer,) in texts(lab, chats(24), [steered(s) for s in steerings])]
    assert plain == speculated
    assert len(set(plain)) > 3 and drafts > 0, "the test must really speculate"
    assert steerable == (method == "model") and unsteered


def test_structured_output_beside_steering(lab: Any) -> None:
    choice = StructuredOutputsParams(choice=["digits", "words"])
    params = [steered(lab_steering(), structured_outputs=choice), steered(lab_steering()), steered(None)]
    constrained, free, _ = texts(lab, chats(3), params)
    assert constrained[0] in ("digits", "words")
    assert [free] == texts(lab, chats(3)[1:2], [steered(lab_steering())])


def test_aborted_requests_leave_nothing_behind(tiny: Callable[[str], Any], checkpoint: Checkpoint) -> None:
    engine, shape = tiny("OlmoeForCausalLM"), shape_in(checkpoint("OlmoeForCausalLM"))
    model = model_of(engine)
    state = model.steering_state
    assert any(name.startswith("steermoe_") for name, _ in model.named_buffers()), "vLLM's sleep mode saves those only"
    text = as_text(random_rules(shape, 5))
    params = steered(text, max_tokens=40, ignore_eos=True, detokenize=False)
    expected = engine.generate({"prompt_token_ids": prompt(1)}, params, use_tqdm=False)[0].outputs[0].token_ids
    core = engine.llm_engine
    for round_ in range(3):
        ids = [core.add_request(f"abort-{round_}-{i}", {"prompt_token_ids": prompt(i, 30)}, params) for i in range(6)]
        for _ in range(1 + round_):
            core.step()
        core.abort_request(ids, internal=True)
        while core.has_unfinished_requests():
            core.step()
    again = engine.generate({"prompt_token_ids": prompt(1)}, params, use_tqdm=False)[0].outputs[0].token_ids
    assert list(again) == list(expected)
    assert state.num_requests <= 1, "aborted requests must be forgotten"
    plain = engine.generate(
        {"prompt_token_ids": prompt(1)}, steered(None, max_tokens=2, detokenize=False), use_tqdm=False
    )
    assert plain and not bool(state.active.any())


def test_preempted_requests_stay_steered(lab: Any, tight: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted = watch_preemptions(tight, monkeypatch)
    prompts: list[Any] = [{"prompt_token_ids": [5 + i, *range(10, 49)]} for i in range(4)]
    params = [steered(lab_steering(i) if i else None, max_tokens=80, ignore_eos=True) for i in range(4)]
    want, got = (
        [list(o.outputs[0].token_ids) for o in engine.generate(prompts, params, use_tqdm=False)]
        for engine in (lab, tight)
    )
    assert preempted, "the test must really preempt"
    assert want == got


def test_logprobs_of_the_prompt_are_steered_too(lab: Any) -> None:
    """Log-likelihood scoring, as lm-eval does it."""

    def score(text: str | None) -> np.ndarray:
        params = steered(text, max_tokens=1, prompt_logprobs=0)
        output = lab.generate("Count from 3 to 6.", params, use_tqdm=False)[0]
        return prompt_logprobs(output)

    assert np.abs(score(None) - score(lab_steering())).max() > 1e-3
    np.testing.assert_array_equal(score(None), score("none"))


_COMPILED = """
import json, sys
from vllm import SamplingParams
from vllm_steermoe_plugin.models.checkpoints import shape_in
from tests.support.engines import EXACT, start
from vllm_steermoe_plugin.detection.engine_client import take_counts
from pathlib import Path
folder, steerings = sys.argv[1], json.loads(sys.argv[2])
found = []
for eager in (False, True):
    engine = start(folder, {"count_groups": 4}, **EXACT, enforce_eager=eager)
    params = [SamplingParams(temperature=0.0, max_tokens=6, logprobs=1, ignore_eos=True, detokenize=False, extra_args={
                  **({"steermoe": s} if s else {}),
                  "steermoe_count": json.dumps({"group": i, "ranges": [[0, 12]]})}) for i, s in enumerate(steerings, 1)]
    outputs = engine.generate([{"prompt_token_ids": list(range(5, 17))}] * len(params), params, use_tqdm=False)
    selections, tokens = take_counts(engine, shape_in(Path(folder)).layers)
    found.append([str(engine.llm_engine.vllm_config.compilation_config.mode), selections.tolist(), tokens.tolist(),
                  [[e[t].logprob for e, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)] for o in outputs]])
    globals()[f"engine_{eager}"] = engine
print("RESULT" + json.dumps(found))
"""


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"])
def test_a_compiled_graph_steers_and_counts_like_eager_execution(
    architecture: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    if runners.V2 and not vllm_version().startswith("0.32."):
        pytest.skip("Triton's interpreter cannot run the top-k/top-p kernel of vLLM 0.33, which warms up with a graph")
    # The second is steered at its selection.
    corrected = architecture in corrected_models.MODELS
    folder = corrected_models.make_checkpoint(architecture, tmp_path / "m") if corrected else checkpoint(architecture)
    shape = shape_in(folder)
    steerings = [None, as_text(random_rules(shape, 1)), as_text(random_rules(shape, 2)), None]
    # A cache of its own, so that the graph is compiled here and now.
    compiled, eager = run_alone(
        _COMPILED, str(folder), json.dumps(steerings), drop=["TORCH_COMPILE_DISABLE"], VLLM_CACHE_ROOT=str(tmp_path)
    )
    assert compiled[0] != eager[0], "one of them must really be compiled"
    assert compiled[1:3] == eager[1:3]
    np.testing.assert_allclose(compiled[3], eager[3], atol=1e-4)
    assert eager[3][0] == eager[3][3] != eager[3][1]
