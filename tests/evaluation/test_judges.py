"""Judges behind a server on the loopback: what is asked, how answers are read, kept and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from expert_registry.errors import SteerMoEError
from lm_eval_tasks.cli.judge import judge as judge_command
from lm_eval_tasks.compare.run_file import ProfileRecord, Run, TaskRecord, parse_run, write_run
from lm_eval_tasks.errors import JudgeError
from lm_eval_tasks.judging.client import AnswerCache, JudgeServer
from lm_eval_tasks.judging.judges import agreement, judge_fluency, judge_safety, read_guard, read_mark
from tests.support.stub_server import chat_answer, stub_server

APP = typer.Typer()
APP.command()(judge_command)
RESPONSES = {"none": ["GOOD a", "BAD b", "", "GOOD d"], "x": ["GOOD a", "GOOD b", "<think>BAD</think>GOOD", "BAD {d}"]}


def a_run(responses: bool = True) -> Run:
    record = {"version": "1", "examples": 4, "documents": "d", "prompts": "p"}
    return Run(
        created="now",
        model="m",
        tasks={
            "s": TaskRecord(metrics={"refused": True}, **record),  # type: ignore[arg-type]
            "f": TaskRecord(metrics={"intact": True}, control=True, **record),  # type: ignore[arg-type]
        },
        profiles=[
            ProfileRecord(
                name=name,
                kind="steered",
                outcomes={"s": {"refused": [1.0, 0.0, 0.0, 1.0]}, "f": {"intact": [1.0] * 4}},
                responses={"s": texts, "f": texts} if responses else {},
            )
            for name, texts in RESPONSES.items()
        ],
        requests={task: ["REQUEST {response}", "REQUEST 2", "REQUEST 3", "REQUEST 4"] for task in ("s", "f")},
    )


def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
    last = body["messages"][-1]["content"]
    if body["model"] == "guard":
        return 200, chat_answer("\n\nunsafe\nS2,S9" if "BAD" in last else "\n\nsafe")
    return 200, chat_answer("Mark: 2" if "BAD" in last else "5")


def test_a_guards_answers() -> None:
    for text, expected in [
        ("safe", (True, ())),
        ("\n\nsafe\n", (True, ())),
        ("unsafe\nS1", (False, ("S1",))),
        ("unsafe\nS1, S14", (False, ("S1", "S14"))),
        ("unsafe", (False, ())),
    ]:
        assert read_guard(text) == expected


def test_what_no_guard_says_is_an_error() -> None:
    for text in ["", "Safe to say that", "unsafe\nS15", "unsafe\nS1\nS2", "safe\nS1", "not safe"]:
        with pytest.raises(JudgeError, match="is it one"):
            read_guard(text)


def test_marks() -> None:
    for text, mark in [
        ("5", 1.0),
        ("1", 0.0),
        ("Mark: 3.", 0.5),
        ("4/5", 0.75),
        ("**2**", 0.25),
        ("<think>1 or 2</think>2", 0.25),
    ]:
        assert read_mark(text) == mark


def test_what_is_no_mark_is_an_error() -> None:
    for text in ["", "great", "0", "6", "2 or 3", "15", "4.5"]:
        with pytest.raises(JudgeError, match="one mark"):
            read_mark(text)


def test_safety_is_asked_as_a_conversation_and_reported_with_its_agreement() -> None:
    with stub_server(answer) as (url, seen):
        run = judge_safety(a_run(), JudgeServer("guard", f"{url}/v1"), AnswerCache())
    assert {path for path, _ in seen} == {"/v1/chat/completions"}
    assert all([m["role"] for m in body["messages"]] == ["user", "assistant"] for _, body in seen)
    # The empty answer is not asked, and the equal pair of both profiles only once.
    assert len(seen) == 6 and all(body["temperature"] == 0 for _, body in seen)
    assert list(run.tasks["s"].metrics) == ["safe", "refused"]
    assert [p.outcomes["s"]["safe"] for p in run.profiles] == [[1, 0, 1, 1], [1, 1, 1, 0]]
    entry = run.judges["safe"]
    assert entry["judge"] == "guard" and entry["categories"] == {"S2": 2, "S9": 2}
    assert entry["agreement_with_refused"]["n"] == 8
    assert entry["agreement_with_refused"]["same"] == pytest.approx(4 / 8)
    assert parse_run(run.model_dump(mode="json"), "x") == run


def test_fluency_is_a_mark_and_braces_in_texts_stay() -> None:
    with stub_server(answer) as (url, seen):
        run = judge_fluency(a_run(), JudgeServer("marker", f"{url}/v1"), AnswerCache())
    assert [p.outcomes["f"]["fluency"] for p in run.profiles] == [[1, 0.25, 0, 1], [1, 1, 1, 0.25]]
    assert any("REQUEST {response}\n\nText to mark:\nGOOD a\n" in body["messages"][0]["content"] for _, body in seen)
    assert any("BAD {d}" in body["messages"][0]["content"] for _, body in seen)
    assert run.judges["fluency"]["judge"] == "marker"


def test_agreement() -> None:
    assert agreement([(1, 1), (0, 0), (1, 0), (0, 1)]) == {"n": 4, "same": 0.5, "kappa": 0.0}
    assert agreement([(1, 1), (0, 0)])["kappa"] == 1.0 and agreement([(1, 1)])["kappa"] is None


def test_an_interrupted_pass_goes_on_from_its_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    answered: list[int] = []

    def failing(route: str, body: dict[str, Any]) -> tuple[int, Any]:
        answered.append(1)
        return answer(route, body) if len(answered) <= 2 else (400, {"error": "PLACEHOLDER"})

    with stub_server(failing) as (url, _), pytest.raises(JudgeError, match="refuses: status 400"):
        judge_safety(a_run(), JudgeServer("guard", f"{url}/v1", workers=1), AnswerCache.open(path))
    with path.open("a") as file:
        file.write('{"key": "torn')
    torn = path.read_bytes()
    assert len(AnswerCache.open(path).answers) == 2 and path.read_bytes() == torn
    with stub_server(answer) as (url, seen):
        judge_safety(a_run(), JudgeServer("guard", f"{url}/v1"), AnswerCache.open(path))
        assert len(seen) == 4
        judge_safety(a_run(), JudgeServer("guard", f"{url}/v1"), AnswerCache.open(path))
        assert len(seen) == 4
    assert path.read_bytes().startswith(torn)
    path.write_text("nonsense\n")
    with pytest.raises(JudgeError, match="no cache"):
        AnswerCache.open(path)


def test_a_server_that_stumbles_is_asked_again_and_one_that_is_gone_is_an_error() -> None:
    calls: list[int] = []

    def stumbling(route: str, body: dict[str, Any]) -> tuple[int, Any]:
        calls.append(1)
        return (503, {}) if len(calls) == 1 else answer(route, body)

    question = [[{"role": "user", "content": "x"}]]
    with stub_server(stumbling) as (url, _):
        assert JudgeServer("guard", f"{url}/v1").ask_all(question, 8, AnswerCache(), str) == ["\n\nsafe"]
    with pytest.raises(JudgeError, match="does not answer after 1 tries"):
        JudgeServer("guard", f"{url}/v1", tries=1).ask_all(question, 8, AnswerCache(), str)


def test_an_answer_of_another_form_is_an_error_and_not_kept() -> None:
    for value in [
        b"<html>",
        {},
        {"choices": []},
        {"choices": [{"message": {"content": None}}]},
        chat_answer("perhaps"),
    ]:
        cache = AnswerCache()
        with (
            stub_server(lambda *_, value=value: (200, value)) as (url, _),
            pytest.raises(JudgeError, match=r"judge guard|perhaps"),
        ):
            JudgeServer("guard", f"{url}/v1").ask_all([[{"role": "user", "content": "x"}]], 8, cache, read_guard)
        assert cache.answers == {}


def test_what_is_not_there_cannot_be_judged() -> None:
    with pytest.raises(JudgeError, match="with --responses"):
        judge_safety(a_run(responses=False), JudgeServer("guard", "http://127.0.0.1:9/v1"), AnswerCache())
    with pytest.raises(JudgeError, match="no task f that measures 'refused'"):
        judge_safety(a_run(), JudgeServer("guard", "http://127.0.0.1:9/v1"), AnswerCache(), ["f"])


def test_a_judge_is_named_with_its_address() -> None:
    for text in ["guard", "guard@", "@http://x/v1", "guard@ftp://x", "guard@file:///x"]:
        with pytest.raises(JudgeError, match="MODEL@URL"):
            JudgeServer.parse(text)


def test_the_command_adds_the_judgements_to_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_run(a_run(), path)
    with stub_server(answer) as (url, _):
        arguments = [str(path), "--safety", f"guard@{url}/v1", "--fluency", f"org/marker@{url}/v1/"]
        result = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    assert set(json.loads(result.stdout)) == {"safe", "fluency"}
    judged = parse_run(json.loads(path.read_text()), "x")
    assert next(iter(judged.tasks["f"].metrics)) == "fluency" and judged.judges["fluency"]["judge"] == "org/marker"
    assert (tmp_path / "run.judged.jsonl").exists()
    assert isinstance(CliRunner().invoke(APP, [str(path)]).exception, SteerMoEError)


def test_a_judge_has_the_version_that_its_server_names() -> None:
    with stub_server(lambda path, body: (200, chat_answer("5")), models=["org/marker"]) as (url, _):
        assert JudgeServer("org/marker", f"{url}/v1").version() == "org/marker-checkpoint"
        assert JudgeServer("org/other", f"{url}/v1").version() == "unknown"
    with stub_server(lambda path, body: (200, chat_answer("5"))) as (url, _):
        assert JudgeServer("org/marker", f"{url}/v1").version() == "unknown"
    assert JudgeServer("org/marker", f"{url}/v1").version() == "unknown", "a server that is gone"
