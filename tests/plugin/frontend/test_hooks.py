"""What stands in vLLM's way: where every request passes, and what its callers are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.exceptions import GracefulHTTPError, VLLMValidationError

from expert_registry import Registry
from expert_registry.errors import EngineError
from expert_registry.registry import publish
from tests.support.front_ends import DIGITS, MODEL, SHAPE, front_end
from vllm_steermoe_plugin.admission.request_admission import FrontEnd
from vllm_steermoe_plugin.compat.handshake import release, worker_status
from vllm_steermoe_plugin.frontend.attached import _FRONT_END, attach_front_end
from vllm_steermoe_plugin.frontend.hooks import _engine_init, _process_inputs, _tasks_of_server
from vllm_steermoe_plugin.settings import Settings
from vllm_steermoe_plugin.steering.wire import SALT_PREFIX, STEER_KEY


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    publish(DIGITS, tmp_path)
    return Registry((tmp_path,))


def original(*_: Any, **__: Any) -> SimpleNamespace:
    """vLLM's `process_inputs`: the request of a caller with a salt of his own."""
    return SimpleNamespace(prompt_token_ids=[3], sampling_params=SimpleNamespace(), cache_salt="mine")


def ask(
    there: FrontEnd, extra_args: Any, beams: bool = False, allowed: list[int] | None = None, **options: Any
) -> SimpleNamespace:
    logprobs: dict[str, Any] = {"logprobs": 4} if allowed is None else {"logprob_token_ids": allowed}
    params = SamplingParams(n=1, extra_args=extra_args, skip_clone=beams, max_tokens=1, **logprobs)
    return _process_inputs(original)(SimpleNamespace(**{_FRONT_END: there}), "id", "prompt", params, **options)


def test_streaming_input_is_not_steered(registry: Registry) -> None:
    def pieces(settings: Settings, extra_args: Any, resumable: bool = True) -> Any:
        return ask(front_end(registry, settings, served=True), extra_args, resumable=resumable).cache_salt

    assert pieces(Settings(), {STEER_KEY: "digits"}, resumable=False).startswith(SALT_PREFIX)
    assert pieces(Settings(), {STEER_KEY: "none"}) == pieces(Settings(), None) == "mine"
    for settings, extra_args in ((Settings(), {STEER_KEY: "digits"}), (Settings(default="digits"), None)):
        with pytest.raises(VLLMValidationError, match="streaming input"):
            pieces(settings, extra_args)


def test_a_step_of_beam_search_is_not_steered_by_phase(registry: Registry) -> None:
    by_phase = front_end(registry, Settings(default="digits:phase=prompt"))
    with pytest.raises(VLLMValidationError, match="beam search"):
        ask(by_phase, None, beams=True)
    # As vLLM 0.33 asks where the tokens are restricted.
    with pytest.raises(VLLMValidationError, match="beam search"):
        ask(by_phase, None, beams=True, allowed=[5, 6])
    assert ask(by_phase, None).cache_salt != "mine"
    assert ask(front_end(registry, Settings(default="digits")), None, beams=True).cache_salt != "mine"


def test_pooling_is_let_by(registry: Registry) -> None:
    there = SimpleNamespace(**{_FRONT_END: front_end(registry, Settings(default="digits"))})
    assert _process_inputs(original)(there, "id", "p", SimpleNamespace()).cache_salt == "mine"


def test_a_damaged_ranking_is_the_operators_fault_and_a_server_keeps_its_folders_to_itself(registry: Registry) -> None:
    for path in registry.folders[0].rglob("digits/*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    for served in (True, False):
        with pytest.raises(GracefulHTTPError, match="digits") as caught:
            ask(front_end(registry, served=served), {STEER_KEY: "digits"})
        assert caught.value.http_status == 500
        assert (str(registry.folders[0]) in str(caught.value)) == (not served)


def test_a_default_that_cannot_be_applied_any_more_is_not_the_callers_fault(registry: Registry) -> None:
    there = front_end(registry, Settings(default="digits"), served=True)
    there.resolver.refuse("the workers are gone")
    with pytest.raises(GracefulHTTPError, match=r"default steering.*the workers are gone") as caught:
        ask(there, None)
    assert caught.value.http_status == 500
    with pytest.raises(VLLMValidationError, match="the workers are gone"):
        ask(there, {STEER_KEY: "refusal"})


STEERS, ABSENT = worker_status(steers=True), worker_status(steers=False)


def in_process(there: FrontEnd, answer: Any) -> None:
    def init(self: Any) -> None:
        self.input_processor = SimpleNamespace(**{_FRONT_END: there})

    engine = SimpleNamespace(collective_rpc=lambda method: [answer])
    _engine_init(init)(engine)
    assert not there.served


def in_a_server(there: FrontEnd, answer: Any) -> None:
    async def tasks(self: Any) -> tuple[str, ...]:
        return ("generate",)

    async def everyone(*asked: Any) -> list[list[Any]]:
        assert asked[:2] == ("collective_rpc", "steermoe_handshake")
        return [[STEERS], [answer]]

    core = SimpleNamespace(call_utility_all_async=everyone)
    engine = SimpleNamespace(input_processor=SimpleNamespace(**{_FRONT_END: there}), engine_core=core)
    assert asyncio.run(_tasks_of_server(tasks)(engine)) == ("generate",)
    assert there.served


@pytest.mark.parametrize("start", [in_process, in_a_server])
def test_the_workers_are_asked_when_an_engine_starts(
    registry: Registry, start: Callable[[FrontEnd, Any], None]
) -> None:
    def waiting(**settings: Any) -> FrontEnd:
        values: dict[str, Any] = {"shape": SHAPE, "models": [MODEL], "registry": registry, "served": True}
        return FrontEnd(settings=Settings(**settings), awaits_workers=True, **values)

    there = waiting()
    start(there, STEERS)
    assert ask(there, {STEER_KEY: "digits"}).cache_salt != "mine"
    there = waiting()
    start(there, ABSENT)
    with pytest.raises(VLLMValidationError, match="the plugin is not loaded"):
        ask(there, {STEER_KEY: "digits"})
    assert ask(there, None).cache_salt == "mine"
    with pytest.raises(EngineError, match=release()):
        start(waiting(default="digits"), ABSENT)
    with pytest.raises(EngineError, match="another runner"):
        start(waiting(), worker_status(steers=False, fault="another runner"))
    start(waiting(enabled=False), None)


def test_an_engine_whose_workers_lack_the_extension_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_steermoe_plugin.frontend import attached

    monkeypatch.setattr(attached, "_shape", lambda config: SHAPE)
    monkeypatch.setattr(attached, "refuse_unsupported", lambda *_: None)

    def start(extension: str) -> None:
        model = SimpleNamespace(served_model_name=None, model="org/model", hf_config=None)
        parallel = SimpleNamespace(worker_extension_cls=extension)
        config = SimpleNamespace(model_config=model, parallel_config=parallel, additional_config={})
        attach_front_end(SimpleNamespace(vllm_config=config))

    start("vllm_steermoe_plugin.worker.extension.SteerMoEWorker+my:Own")
    for lost in ("", "my.Own"):
        with pytest.raises(EngineError, match="worker_extension_cls"):
            start(lost)
