"""From pairs to a steered evaluation, on a model whose router selects by sigmoids and a bias in groups of experts.

What is counted, attributed and measured is held against transformers with a slow loop in its router.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner
from vllm.exceptions import VLLMValidationError

from expert_registry import Registry, read_ranking
from expert_registry.errors import ProfileError
from expert_registry.registry import Found, publish
from lm_eval_tasks.evaluation import Options, steerings, task_manager
from lm_eval_tasks.tuning.bench import Bench
from lm_eval_tasks.tuning.log import TuneLog
from lm_eval_tasks.tuning.run import Goal, run_search
from lm_eval_tasks.tuning.search import Limits
from lm_eval_tasks.tuning.settings import CountSpace, DialSpace
from tests.support.corrected import EXPERTS, CorrectedReference, make_checkpoint
from tests.support.engines import SMALL
from tests.support.greedy import generate, scoring
from tests.support.oracle import Rules
from vllm_steermoe_plugin.cli import app
from vllm_steermoe_plugin.detection.attribution import attribute
from vllm_steermoe_plugin.detection.pairs import PairSet, read_pairs
from vllm_steermoe_plugin.detection.token_spans import encode_side
from vllm_steermoe_plugin.frontend.attached import front_end_of
from vllm_steermoe_plugin.lab.vocabulary import number_word
from vllm_steermoe_plugin.models.checkpoints import names_of
from vllm_steermoe_plugin.models.lab_checkpoint import MODEL_DIR
from vllm_steermoe_plugin.steering.profile import SteeringProfile

pytestmark = pytest.mark.engine
ARCHITECTURE, NAME, BEHAVIOUR, TASK = "Glm4MoeForCausalLM", "org/Tiny-GLM", "figures", "figures_or_words"
STEERINGS = ("none", BEHAVIOUR, f"{BEHAVIOUR}:reverse", f"{BEHAVIOUR}:weight=own")
OPTIONS: dict[str, Any] = SMALL | {
    "dtype": "float32",
    "max_model_len": 128,
    "max_num_seqs": 16,
    "additional_config": {"steermoe": {"count_groups": 16}},
}
TOLERANCE = 1e-3
"""Of the log-likelihood of a few tokens: vLLM and transformers compute in float32, in an order of their own."""
TASK_FILE = """\
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/documents.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[figures, words]}}}}"
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


@dataclass(frozen=True)
class Flow:
    """What the steps hand on: the model in its engine, its slow reference, the pairs, and the ranking of them."""

    model: Any
    reference: CorrectedReference
    pairs: PairSet
    found: Found
    folder: Path

    @property
    def tokenizer(self) -> Any:
        return self.model.model.get_tokenizer()


def documents(number: int) -> list[dict[str, str]]:
    runs = [range(first, first + 3) for first in range(2, 2 + number)]
    return [
        {
            "prompt": f"Count from {run[0]} to {run[-1]}.",
            "figures": " ".join(map(str, run)),
            "words": " ".join(map(number_word, run)),
        }
        for run in runs
    ]


def write_lines(path: Path, lines: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory, kept_alive: list[Any]) -> Iterator[Flow]:
    folder = tmp_path_factory.mktemp("flow")
    # The lab model's tokenizer, for both.
    checkpoint = make_checkpoint(ARCHITECTURE, folder / "Tiny-GLM", vocab_size=878)
    for path in (*MODEL_DIR.glob("tokenizer*"), *MODEL_DIR.glob("*.jinja")):
        shutil.copy(path, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"_name_or_path": NAME}))
    reference = CorrectedReference(ARCHITECTURE, checkpoint)
    write_lines(
        folder / "pairs.jsonl",
        [
            {
                "text_1": f"{one['prompt']} {one['figures']}",
                "text_2": f"{one['prompt']} {one['words']}",
                "target_1": one["figures"],
                "target_2": one["words"],
            }
            for one in documents(8)
        ],
    )
    write_lines(folder / "documents.jsonl", documents(16))
    (folder / "task.yaml").write_text(TASK_FILE.format(task=TASK, folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEERMOE_REGISTRY", str(folder / "registry"))
        from lm_eval_tasks.models.in_process import SteerMoEVLLM

        model = SteerMoEVLLM(pretrained=str(checkpoint), **OPTIONS)
        kept_alive.append(model)
        arguments = ("--model", str(checkpoint), "--pairs", str(folder / "pairs.jsonl"), "--behaviour", BEHAVIOUR)
        numbers = ("--activate", "4", "--deactivate", "6", "--permutations", "99")
        out = folder / "ranking.safetensors"
        with pytest.MonkeyPatch.context() as same:
            same.setattr("vllm_steermoe_plugin.engine.start_engine", lambda *_, **__: model.model)
            CliRunner().invoke(app, ["detect", *arguments, *numbers, "--out", str(out)], catch_exceptions=False)
        publish(read_ranking(out), folder / "registry")
        found = Registry.default().find(names_of(str(checkpoint)), BEHAVIOUR)
        yield Flow(model, reference, read_pairs(folder / "pairs.jsonl"), found, folder)


def test_the_ranking_has_the_counts_of_the_slow_reference_and_says_what_the_router_is(flow: Flow) -> None:
    ranking = flow.found.ranking
    assert (ranking.card.model.id, flow.found.entry.name) == (NAME, "org--tiny-glm/figures@1")
    expected = np.zeros((2, len(flow.reference.routers), EXPERTS), dtype=np.int64)
    tokens = [0, 0]
    for pair in flow.pairs.pairs:
        for number, side in enumerate((pair.side_1, pair.side_2)):
            span = encode_side(side, flow.tokenizer, pair.origin)
            _, chosen = flow.reference.run(list(span.token_ids), {})
            tokens[number] += span.stop - span.start
            for row, layer in enumerate(chosen):
                for experts in chosen[layer][span.start : span.stop]:
                    expected[number, row, experts] += 1
    assert ranking.shape.layers == tuple(flow.reference.routers)
    assert ranking.counts.tokens.tolist() == tokens and min(tokens) > 20
    np.testing.assert_array_equal([ranking.counts.activations_1, ranking.counts.activations_2], expected)
    assert (
        "Router: sigmoid + bias, 2 of 4 groups, renormalized; the selection is corrected, where "
        "an activated expert weighs as the model's strongest choice." in ranking.card.note
    )


def test_a_text_is_attributed(flow: Flow) -> None:
    ranking = flow.found.ranking
    text = "Count from 3 to 5. 3 4 5, three four five; one, two, three."
    found = attribute(flow.model.model, ranking, text)
    ids = flow.tokenizer(text)["input_ids"]
    _, chosen = flow.reference.run(ids, {})
    assert len(ids) == len(found) > 16, "more than one pass"
    difference = ranking.counts.risk_difference()
    for position, token in enumerate(found):
        scores = [difference[row, chosen[layer][position]].sum() for row, layer in enumerate(chosen)]
        assert token.score == pytest.approx(np.mean(scores))


def likelihoods(flow: Flow, profile: SteeringProfile | None) -> list[list[float]]:
    """Of the choices of each document, by the reference."""
    rules: Rules = {}
    if profile is not None:
        rules = dict.fromkeys(profile.activate, 1) | dict.fromkeys(profile.deactivate, -1)
    own = profile is not None and profile.weight == "own"
    found = []
    for one in documents(16):
        begin = len(flow.tokenizer(one["prompt"])["input_ids"])
        row = []
        for choice in (one["figures"], one["words"]):
            ids = flow.tokenizer(f"{one['prompt']} {choice}")["input_ids"]
            logprobs, _ = flow.reference.run(ids, rules, own=own)
            row.append(sum(float(logprobs[at - 1, ids[at]]) for at in range(begin, len(ids))))
        found.append(row)
    return found


def test_lm_eval_measures_what_the_slow_reference_computes_and_each_steering_differs(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.models.vllm_causallms.LLM", lambda **_: flow.model.model)
    manager = TaskManager(include_path=str(flow.folder), include_defaults=False)
    measured, accuracies = {}, {}
    for steer in STEERINGS:
        results: Any = lm_eval.simple_evaluate(
            model="steermoe-vllm",
            model_args=f"pretrained={flow.folder / 'Tiny-GLM'},steer={steer}",
            tasks=[TASK],
            task_manager=manager,
            bootstrap_iters=0,
        )
        info = results["config"]["steermoe"]
        assert info["request"] == steer
        assert (info["requests"], info["steered_requests"]) == (32, 0 if steer == "none" else 32)
        profile = None if steer == "none" else SteeringProfile.from_json(info["profile"])
        samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
        accuracies[steer] = results["results"][TASK]["acc,none"]
        measured[steer] = np.array([[resps[0][0] for resps in sample["resps"]] for sample in samples])
        np.testing.assert_allclose(measured[steer], likelihoods(flow, profile), atol=TOLERANCE, err_msg=steer)
    for one, other in ((one, other) for one in STEERINGS for other in STEERINGS if one < other):
        assert np.abs(measured[one] - measured[other]).max() > 10 * TOLERANCE, (one, other)
    assert accuracies["none"] != accuracies[BEHAVIOUR] != accuracies[f"{BEHAVIOUR}:weight=own"]


def test_random_experts_keep_the_weight_of_what_they_stand_beside(flow: Flow) -> None:
    plan = steerings([f"{BEHAVIOUR}:weight=own", BEHAVIOUR], flow.model, draws=1)
    random = [SteeringProfile.from_json(one.text).weight for one in plan if one.kind == "random"]
    assert random == ["own", "top"]


def test_numbers_of_experts_and_strengths_are_searched(flow: Flow, tmp_path: Path) -> None:
    dials = DialSpace((0.5, 2.0), (None,), (None,), flow.found.ranking.counts.activations_1.size, ("both",))
    for name, space in (("counts", CountSpace(2, 2, ("both",))), ("dials", dials)):
        goal = Goal(BEHAVIOUR, False, (TASK,), (), Limits(0.03), (space,), 2)
        log = TuneLog.open(tmp_path / f"{name}.jsonl", {"model": NAME})
        options = Options(chat_template=False, responses=False, include_path=str(flow.folder))
        bench = Bench(flow.model, [TASK], task_manager([TASK], options), options, [], log)
        tried = run_search(bench, goal, flow.found, lambda _: None)
        assert len(tried) == 2 and {setting for setting, _ in log.runs} >= {None, *(one.setting for one in tried)}


def test_weights_of_their_own_are_refused_where_a_softmax_selects(tiny: Callable[[str], Any]) -> None:
    engine = tiny("OlmoeForCausalLM")
    text = '{"activate": {"0": [1]}, "weight": "own"}'
    reason = "weight=own: the routers of this model select by what they weigh"
    with pytest.raises(ProfileError, match=reason):
        front_end_of(engine.llm_engine.input_processor).resolve(text)
    with pytest.raises(VLLMValidationError, match=reason):
        generate(engine, [[3, 4]], [scoring(text)])
