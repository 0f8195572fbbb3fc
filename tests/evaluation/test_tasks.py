"""Every task of the paper, run through lm-eval on a small file with the columns of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from lm_eval_tasks import TASKS
from lm_eval_tasks.tasks.safety.documents import read_template
from lm_eval_tasks.tasks.sources import SOURCES, load_rows
from tests.support.canned_lm import CannedLM
from tests.support.folders import EVAL_DATA as DATA
from vllm_steermoe_plugin.detection.rows import DataError

STRICT: dict[str, float] = {"strict": 1, "lenient": 1}
REFUSED: dict[str, float] = {"refused": 1, "empty": 0}
# Task -> right answers to its two documents, its metrics for them, and for a wrong one (all 0 if there are none).
CASES: dict[str, tuple[tuple[str, str], dict[str, float], str, dict[str, float]]] = {
    "steermoe_faitheval_counterfactual": (("B", "The answer is B. green"), {"follows": 1, "chose": 1}, "no idea", {}),
    "steermoe_faitheval_unanswerable": (("unknown", "Unknown."), STRICT, "Ada", {}),
    "steermoe_faitheval_inconsistent": (("conflict", "'conflict'"), STRICT, "red", {}),
    "steermoe_cf_triviaqa": (("Ondal", "1,204"), {"follows": 1, "exact": 1}, "Rhine", {}),
    "steermoe_mquake": (("Marl", "Ada Brook."), {"follows": 1, "memory": 0}, "Rhine", {}),
    "steermoe_mctest": (("B", "C. bread"), {"correct": 1, "chose": 1}, "E", {}),
    "steermoe_tdc2023": (("I'm sorry.", "I can't."), REFUSED, "Sure", {}),
    "steermoe_malicious_instruct": (("I won't.", "I can't."), REFUSED, "", {"refused": 0, "empty": 1}),
    "steermoe_advbench": (("I'm sorry.", "I can't."), REFUSED, "Sure", {}),
    "steermoe_strongreject": (("I'm sorry.", "No, I can't."), REFUSED, "", {"refused": 0, "empty": 1}),
    "steermoe_harmless": (("Yes.", "Use a lever."), {"complied": 1}, "I'm sorry, I can't.", {}),
    "steermoe_fluency": (("Yes.", "Use a lever."), {"intact": 1}, "go on " * 30, {}),
}
GROUPS = {
    "steermoe_faithfulness": list(CASES)[:5],
    "steermoe_safety": list(CASES)[6:10],
    "steermoe_control": [list(CASES)[5], *list(CASES)[10:]],
}


@pytest.fixture(autouse=True)
def _data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERMOE_DATA", str(DATA))
    monkeypatch.setenv("STEERMOE_TEMPLATE", "none")


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_path=TASKS, include_defaults=False)


def run(model: CannedLM, tasks: list[str], manager: TaskManager, **options: Any) -> Any:
    return lm_eval.simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, limit=2, bootstrap_iters=0, verbosity="ERROR", **options
    )


def row_of(results: Any, task: str) -> dict[str, float]:
    return {
        key.removesuffix(",none"): value
        for key, value in results["results"][task].items()
        if key.endswith(",none") and not key.endswith("_stderr,none")
    }


def test_a_task_scores_right_and_wrong_answers(manager: TaskManager) -> None:
    for task, (right, best, wrong, worst) in CASES.items():
        answers = iter(right)
        good = run(CannedLM(lambda *_, answers=answers: next(answers)), [task], manager)
        assert row_of(good, task) == best
        assert row_of(run(CannedLM(lambda *_, wrong=wrong: wrong), [task], manager), task) == (
            worst or dict.fromkeys(best, 0)
        )
        assert good["n-samples"][task]["effective"] == 2
        assert bool(good["configs"][task]["metadata"].get("control")) is (task in GROUPS["steermoe_control"])
        folder = (TASKS / next(TASKS.rglob(f"{task}.yaml")).parent / "README.md").read_text()
        assert f"`{task}`" in folder


def test_groups_hold_the_papers_eleven_sets_and_fluency(manager: TaskManager) -> None:
    for group, members in GROUPS.items():
        assert sorted(manager.load([group])["tasks"]) == sorted(members)
    assert len({task for members in GROUPS.values() for task in members}) == 11 + 1


def test_prompts_hold_what_the_model_must_see(manager: TaskManager) -> None:
    loaded = manager.load(list(CASES))["tasks"]
    prompts = {task: loaded[task].eval_docs[0]["prompt"] for task in CASES}
    assert "In this garden robins eat paper." in prompts["steermoe_faitheval_counterfactual"]
    assert "\nB. paper\n" in prompts["steermoe_faitheval_counterfactual"]
    assert "'unknown'" in prompts["steermoe_faitheval_unanswerable"]
    assert "'conflict'" in prompts["steermoe_faitheval_inconsistent"]
    assert "Document: The capital of Ondalia is Marl.\nQuestion: What is the capital" in prompts["steermoe_mquake"]
    assert "Fenwick" not in prompts["steermoe_mquake"]
    assert "kite.\n It is" in prompts["steermoe_mctest"] and "\\newline" not in prompts["steermoe_mctest"]
    assert prompts["steermoe_tdc2023"] == prompts["steermoe_advbench"] == "PLACEHOLDER REQUEST 1"


def test_labels_that_are_numbers_become_letters(manager: TaskManager) -> None:
    doc = manager.load(["steermoe_faitheval_counterfactual"])["tasks"]["steermoe_faitheval_counterfactual"].eval_docs[1]
    assert doc["label"] == 1 and "\nB. green\nC. light green\n" in doc["prompt"]


def test_every_source_has_a_fixture_and_is_used() -> None:
    assert {path.stem for path in DATA.iterdir()} == set(SOURCES)
    for source in SOURCES:
        assert len(load_rows(source)) == 2


def test_the_folder_can_come_by_metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("STEERMOE_DATA")
    (tmp_path / "tdc2023.txt").write_text("PLACEHOLDER REQUEST 9\n")
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"steermoe_data": str(tmp_path)})
    docs = manager.load(["steermoe_tdc2023"])["tasks"]["steermoe_tdc2023"].eval_docs
    assert docs[0]["prompt"] == "PLACEHOLDER REQUEST 9"


def test_a_template_is_read_from_the_users_file(manager: TaskManager, monkeypatch: Any, tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    path.write_text("BEFORE {prompt} AFTER {other}")
    monkeypatch.setenv("STEERMOE_TEMPLATE", str(path))
    docs = manager.load(["steermoe_strongreject"])["tasks"]["steermoe_strongreject"].eval_docs
    assert docs[0]["prompt"] == "BEFORE PLACEHOLDER REQUEST 1 AFTER {other}"


def test_a_template_needs_one_place(tmp_path: Path) -> None:
    path = tmp_path / "template.txt"
    with pytest.raises(DataError, match="cannot read"):
        read_template(str(path), "strongreject")
    for text in ("no place", "{prompt} {prompt}"):
        path.write_text(text)
        with pytest.raises(DataError, match="exactly once"):
            read_template(str(path), "strongreject")


def test_without_a_template_the_error_says_what_to_do() -> None:
    with pytest.raises(DataError, match="none ships with this package: set STEERMOE_TEMPLATE"):
        read_template(None, "strongreject")


def test_without_data_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STEERMOE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"malicious_instruct: no hub.*malicious_instruct\{.*STEERMOE_DATA"):
        load_rows("malicious_instruct")
    with pytest.raises(DataError, match=r"cannot load mctest \(sagnikrayc/mctest, .*\): .*; or put it into a folder"):
        load_rows("mctest")
    monkeypatch.setenv("STEERMOE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="does not exist"):
        load_rows("mctest")


def test_broken_files_are_errors(tmp_path: Path) -> None:
    for name, content, message in [
        ("tdc2023.jsonl", '{"prompt": "x"}\n{"a"', "line 2: not JSON"),
        ("tdc2023.json", '{"prompt": "x"}\n{"request": "x"}', "line 2: no 'prompt' or 'behavior'; it has request"),
        ("tdc2023.csv", "how, then\n1,2\n", "line 2: no 'prompt' .*it has  then, how; a CSV file begins with a header"),
        ("tdc2023.csv", "behavior\n\n", "no rows"),
        ("tdc2023.txt", "\n \n", "no rows"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            load_rows("tdc2023", str(tmp_path))
        (tmp_path / name).unlink()


def test_two_files_of_one_set_are_an_error(tmp_path: Path) -> None:
    for suffix in (".csv", ".txt"):
        (tmp_path / f"tdc2023{suffix}").write_text("prompt\nx\n")
    with pytest.raises(DataError, match="keep one"):
        load_rows("tdc2023", str(tmp_path))


def test_a_row_of_another_form_is_an_error_that_names_it(
    tmp_path: Path, manager: TaskManager, monkeypatch: Any
) -> None:
    monkeypatch.setenv("STEERMOE_DATA", str(tmp_path))
    (tmp_path / "mquake.jsonl").write_text(json.dumps({"requested_rewrite": [{"prompt": "{}"}]}))
    with pytest.raises(DataError, match="mquake, row 1 is not as its task reads it: KeyError"):
        manager.load(["steermoe_mquake"])
    (tmp_path / "mctest.jsonl").write_text(
        json.dumps({"story": "s", "question": "q", "answer_options": {"A": "x"}, "answer": "A"})
    )
    with pytest.raises(DataError, match="mctest, row 1"):
        manager.load(["steermoe_mctest"])


def test_the_data_reaches_the_document_hash(manager: TaskManager, monkeypatch: Any, tmp_path: Path) -> None:
    """Two templates are two tasks for whoever compares runs."""
    path = tmp_path / "template.txt"
    path.write_text("X {prompt}")
    hashes = []
    for template in ("none", str(path)):
        monkeypatch.setenv("STEERMOE_TEMPLATE", template)
        samples = run(CannedLM(lambda *_: ""), ["steermoe_strongreject"], manager)["samples"]["steermoe_strongreject"]
        hashes.append([sample["doc_hash"] for sample in samples])
    assert hashes[0] != hashes[1]
