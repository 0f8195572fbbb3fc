"""The tasks that ship with the package, and how lm-eval comes to know of them. No engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from lm_eval_tasks import TASKS
from lm_eval_tasks.register import add_tasks
from tests.support.folders import EVAL_DATA as DATA
from vllm_steermoe_plugin.lab import world
from vllm_steermoe_plugin.models.lab_checkpoint import MODEL_DIR

GROUPS = ["steermoe_control", "steermoe_faithfulness", "steermoe_lab", "steermoe_safety"]
LAB = [f"steermoe_lab_{behaviour}{part}" for behaviour in world.BEHAVIOURS for part in ("", "_control")]


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=TASKS, include_defaults=False)


@pytest.fixture(scope="module")
def lab(manager: TaskManager) -> dict[str, Any]:
    return dict(manager.load(["steermoe_lab"])["tasks"])


@pytest.fixture(scope="module")
def render() -> Callable[..., str]:
    """The chat template as lm-eval's vLLM model applies it."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def apply(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))

    return apply


@pytest.fixture(autouse=True)
def _data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: all data sets are the tests' small files."""
    monkeypatch.setenv("STEERMOE_DATA", str(DATA))
    monkeypatch.setenv("STEERMOE_TEMPLATE", "none")


@pytest.fixture
def task_manager_init() -> Iterator[None]:
    original = TaskManager.__init__
    yield
    TaskManager.__init__ = original


def yaml_files() -> list[Path]:
    """All but the parts that others include."""
    return [path for path in TASKS.rglob("*.yaml") if not path.name.startswith("_")]


def test_every_yaml_file_is_a_task_or_a_group_that_loads(manager: TaskManager) -> None:
    assert {path.stem for path in yaml_files()} == set(manager.all_subtasks) | set(manager.all_groups)
    loaded = manager.load(list(manager.all_subtasks))["tasks"]
    assert set(loaded) == set(manager.all_subtasks)


def test_names_cannot_clash_with_those_of_lm_eval(manager: TaskManager) -> None:
    assert manager.all_tasks
    assert [name for name in manager.all_tasks if not name.startswith("steermoe_")] == []


def test_every_task_says_its_version_and_has_a_readme() -> None:
    for path in yaml_files():
        text = "\n".join(line for line in path.read_text().splitlines() if "!function" not in line)
        assert yaml.safe_load(text)["metadata"]["version"]
        assert (path.parent / "README.md").is_file()


def test_the_group_has_all_lab_tasks(lab: dict[str, Any]) -> None:
    assert sorted(lab) == sorted(LAB)


def test_documents_are_the_test_split(lab: dict[str, Any]) -> None:
    readme = (TASKS / "lab" / "README.md").read_text()
    for name in LAB:
        behaviour = name.removeprefix("steermoe_lab_").removesuffix("_control")
        make = world.controls if name.endswith("_control") else world.examples
        assert [dict(doc) for doc in lab[name].eval_docs] == [
            {field: getattr(example, field) for field in example.__dataclass_fields__}
            for example in make(behaviour, "test")
        ]
        assert f"| `{name}` | {len(lab[name].eval_docs)} |" in readme


def _prompts(task: Any, **chat: Any) -> list[str]:
    task.build_all_requests(limit=5, **chat)
    return [instance.args[0] for instance in task.instances]


def test_prompts_are_chats_with_and_without_the_flag(lab: dict[str, Any], render: Callable[..., str]) -> None:
    for system in [None, "Use digits."]:
        task = lab["steermoe_lab_digits"]
        expected = [render(world.chat(doc["prompt"], system or "")) for doc in list(task.eval_docs)[:5]]
        assert _prompts(task, system_instruction=system) == expected
        with_flag = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": render}
        assert _prompts(task, system_instruction=system, **with_flag) == expected


def test_answers_score_one_and_fit(lab: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    for name in LAB:
        task = lab[name]
        (metric,) = task.higher_is_better()
        for doc in list(task.eval_docs):
            assert task.process_results(doc, [doc["answer"]]) == {metric: 1.0}
            assert task.process_results(doc, [doc["other"]]) == {metric: 0.0}
            for answer in (doc["answer"], doc["other"]):
                # One more for the end of the turn.
                assert len(tokenizer(answer).input_ids) < task.config.generation_kwargs["max_gen_toks"]


@pytest.mark.usefixtures("task_manager_init")
def test_add_tasks_leaves_the_users_folders_in_place(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\ndataset_path: json\n")
    ours = set(TaskManager(include_path=TASKS, include_defaults=False).all_subtasks)
    assert ours > set(LAB)
    add_tasks()
    once = TaskManager.__init__
    add_tasks()
    assert TaskManager.__init__ is once
    for include_path, expected in (
        (None, set()),
        (str(tmp_path), {"mine"}),
        ([tmp_path, TASKS], {"mine"}),
    ):
        found = set(TaskManager(None, include_path, include_defaults=False).all_subtasks)
        assert found == {*ours, *expected}


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)


def test_a_new_interpreter_knows_the_model_and_the_tasks_and_imports_nothing_heavy() -> None:
    done = _python(
        "import sys, json\n"
        "before = sorted(m for m in sys.modules if 'lm_eval' in m)\n"
        "import lm_eval.models, lm_eval_tasks.register\n"
        "light = not {'torch', 'vllm'} & set(sys.modules)\n"
        "from lm_eval.api.registry import model_registry\n"
        "from lm_eval.tasks import TaskManager\n"
        "tasks = TaskManager(include_defaults=False).all_groups\n"
        "print(json.dumps([before, light, 'steermoe-vllm' in model_registry, 'hf' in model_registry, tasks]))\n"
    )
    before, light, ours, theirs, groups = json.loads(done.stdout.splitlines()[-1])
    assert before == ["_steermoe_lm_eval_autoload"]
    assert (light, ours, theirs, groups) == (True, True, True, GROUPS)


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'vllm', 'lm_eval', 'datasets', 'numpy'}"
    assert _python(f"import sys, lm_eval_tasks; print({heavy} & set(sys.modules))").stdout.strip() == "set()"


def test_a_failing_autoload_says_so_and_lets_lm_eval_go_on() -> None:
    done = _python("import sys; sys.modules['lm_eval_tasks.register'] = None; import lm_eval.models; print('alive')")
    assert done.stdout.strip() == "alive"
    assert "steermoe: lm_eval_tasks.register.add_model failed" in done.stderr


def test_installed_autoload_is_that_of_the_checkout() -> None:
    import _steermoe_lm_eval_autoload as installed

    assert installed.__file__ is not None
    assert (
        Path(installed.__file__).read_text()
        == (TASKS.parent / "autoload" / "_steermoe_lm_eval_autoload.py").read_text()
    )
