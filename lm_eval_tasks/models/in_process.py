"""`lm_eval --model steermoe-vllm`: lm-eval's vLLM model, each of whose requests is steered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from expert_registry.errors import EngineError, UnsupportedFeatureError, UsageError
from expert_registry.shape import MoEShape
from lm_eval_tasks.models.response_cache import claim_cache
from lm_eval_tasks.models.steering_args import SteeringArgs
from lm_eval_tasks.models.vllm_backend import load_vllm_backend
from vllm_steermoe_plugin.compat.plugin_allowlist import check_plugin_allowed
from vllm_steermoe_plugin.compat.versions import tool_versions
from vllm_steermoe_plugin.engine import engine_options
from vllm_steermoe_plugin.frontend.attached import front_end_of
from vllm_steermoe_plugin.models.architectures import shape_of
from vllm_steermoe_plugin.steering.resolve import Resolved, Source
from vllm_steermoe_plugin.steering.wire import STEER_KEY

_VLLM: Any = load_vllm_backend().VLLM

from lm_eval.api.model import CacheHook  # noqa: E402
from vllm import SamplingParams  # noqa: E402


class SteerMoEVLLM(_VLLM):  # type: ignore[misc]
    """lm-eval's `vllm` model with the model arguments of `SteeringArgs` added.

    Steering is resolved when it is set, so what cannot be applied fails before any request.
    All kinds of requests (log-likelihood, rolling, generation) are steered, and after each
    batch the engine's own count of steered requests is compared with what was sent.
    """

    def __init__(
        self, pretrained: str, *, batch_size: int | str = "auto", data_parallel_size: int | str = 1, **kwargs: Any
    ) -> None:
        """Start the engine.

        Args:
            pretrained: a hub id, a folder, or `steermoe-lab`.
            batch_size: the number 1 counts as `auto`, because the `lm_eval` command passes it when
                nobody asked for it; the text "1" (what `--batch_size 1` passes) is 1.
            data_parallel_size: only 1.
            kwargs: fields of `SteeringArgs`, model arguments of lm-eval's `vllm`, arguments of `vllm.LLM`.

        Raises:
            SteerMoEError: the steering cannot be read, found or applied, or the engine cannot steer.
        """
        steering = {field.name: kwargs.pop(field.name) for field in fields(SteeringArgs) if field.name in kwargs}
        text = SteeringArgs(**steering).text()
        # Also for `none`: that nothing was steered is checked, and steering may be set later.
        check_plugin_allowed()
        if str(data_parallel_size) != "1":
            raise UnsupportedFeatureError(
                f"data_parallel_size={data_parallel_size}: steermoe-vllm counts steered requests in one engine; "
                "use tensor_parallel_size, or one run per device"
            )
        if kwargs.get("max_length") is not None and kwargs.get("max_model_len") is None:
            # lm-eval's second name for it, which must not meet the lab's default.
            kwargs["max_model_len"] = kwargs.pop("max_length")
        options = engine_options(pretrained, **kwargs)
        super().__init__(
            pretrained=options.pop("model"),
            batch_size="auto" if batch_size == 1 else batch_size,
            **options,
        )
        self._name = pretrained
        # First: the front end knows best why a model cannot be steered.
        self._set(text)
        self._layers = self._bound_layers()

    def use_steering(self, steer: object = None, **args: object) -> None:
        """Steer all further requests in another way, in the same engine.

        A response cache is detached: its answers belong to the steering that it was opened with.

        Args:
            steer: a request, or None for `none`.
            args: the other fields of `SteeringArgs`.

        Raises:
            SteerMoEError: it cannot be read, found or applied; the steering then stays as it was.
        """
        self._set(SteeringArgs(steer=steer, **args).text())

    @property
    def steering(self) -> str:
        """The request text in effect; assigning one is `use_steering`."""
        return self._text

    @steering.setter
    def steering(self, steer: object) -> None:
        self.use_steering(steer)

    @property
    def shape(self) -> MoEShape:
        """Layers and experts of the model, by which random experts are drawn."""
        config = self.model.llm_engine.model_config
        return shape_of(config.hf_config, config.architecture)

    def get_model_info(self) -> dict[str, Any]:
        """For `config` in lm-eval's results; the counts are since the steering was set."""
        resolved = self._resolved
        return {
            "steermoe": {
                "model": self._name,
                "request": self._text,
                "profile": None if resolved is None else resolved.profile.to_json(),
                "digest": None if resolved is None else resolved.profile.digest,
                "activated": 0 if resolved is None else len(resolved.profile.activate),
                "deactivated": 0 if resolved is None else len(resolved.profile.deactivate),
                "biased": 0 if resolved is None else len(resolved.profile.bias),
                "sources": [] if resolved is None else [_source(source) for source in resolved.sources],
                "versions": tool_versions(),
                "layers": self._layers,
                # What lm-eval itself records is the 1 that its command passes.
                "batch_size": self.batch_size,
                "requests": self._requests,
                "steered_requests": self._steered_requests,
            }
        }

    def next_tokens(self, prompts: Sequence[str], texts: Sequence[str]) -> list[list[dict[int, float]]]:
        """How likely the next token is after each prompt under each steering, all in one batch.

        The steering that is set stays, and its counts.

        Args:
            prompts: as they go to the model; the end of one that is too long is used.
            texts: steering expressions.

        Returns:
            For each text, for each prompt: token -> log-probability, of as many tokens as the engine's `max_logprobs`
            allows (-1: the whole vocabulary).

        Raises:
            SteerMoEError: one cannot be read, found or applied.
        """
        ids = [one[-(self.max_length - 1) :] for one in self.tok_encode(list(prompts))]
        most = self.model.llm_engine.model_config.max_logprobs
        front_end = front_end_of(self.model.llm_engine.input_processor)
        steered = sum(front_end.resolve(text) is not None for text in texts)
        params = [
            SamplingParams(temperature=0, max_tokens=1, logprobs=most, detokenize=False, extra_args={STEER_KEY: text})
            for text in texts
            for _ in ids
        ]
        before = self._counts()
        outputs = self.model.generate(
            [{"prompt_token_ids": one} for _ in texts for one in ids],
            sampling_params=params,
            use_tqdm=False,
            lora_request=self.lora_request,
        )
        self._check_counts(before, self._counts(), steered * len(ids))
        found = [{token: one.logprob for token, one in output.outputs[0].logprobs[0].items()} for output in outputs]
        return [found[at : at + len(ids)] for at in range(0, len(found), len(ids))]

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take a response cache, unless it was made with another model or steering.

        Raises:
            UsageError: it was, or nobody knows.
        """
        digest = None if self._resolved is None else self._resolved.profile.digest
        identity = json.dumps({"model": self._name, "revision": self.model_args.get("revision"), "profile": digest})
        claim_cache(cache_hook.dbdict, identity)
        super().set_cache_hook(cache_hook)

    def _set(self, text: str) -> None:
        resolved: Resolved | None = front_end_of(self.model.llm_engine.input_processor).resolve(text)
        self._text = text
        self._resolved = resolved
        self._requests = 0
        self._steered_requests = 0
        self.cache_hook = CacheHook(None)

    def _model_generate(self, requests: Any, generate: bool = False, sampling_params: Any = None) -> Any:
        """The one place through which lm-eval's vLLM model sends requests."""
        if not generate or sampling_params is None:
            # As in the overridden method, which would drop ours.
            sampling_params = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
        if not isinstance(sampling_params, list):
            sampling_params = [sampling_params] * len(requests)
        steered = [self._with_steering(params) for params in sampling_params]
        before = self._counts()
        outputs = super()._model_generate(requests, generate=True, sampling_params=steered)
        # vLLM makes `n` requests of one that asks for n answers.
        sent = sum(params.n for params in steered)
        self._check_counts(before, self._counts(), 0 if self._resolved is None else sent)
        self._requests += sent
        self._steered_requests += 0 if self._resolved is None else sent
        return outputs

    def _with_steering(self, params: Any) -> Any:
        extra_args = params.extra_args or {}
        if STEER_KEY in extra_args:
            raise UsageError(
                f"a task or --gen_kwargs asks for steering {extra_args[STEER_KEY]!r:.80}, the model arguments "
                f"for {self._text!r:.80}; it is set in the model arguments only"
            )
        steered = params.clone()
        # Also `none`: it lifts a default that the engine may have.
        steered.extra_args = {**extra_args, STEER_KEY: self._text}
        return steered

    def _statuses(self) -> list[dict[str, Any]]:
        statuses: list[dict[str, Any]] = self.model.collective_rpc("steermoe_status")
        return statuses

    def _bound_layers(self) -> list[int]:
        return sorted({layer for status in self._statuses() for layer in status["layers"]})

    def _counts(self) -> list[int]:
        """Steered requests that each worker has seen so far."""
        return [status["steered_requests"] for status in self._statuses()]

    @staticmethod
    def _check_counts(before: Sequence[int], after: Sequence[int], expected: int) -> None:
        for worker, (old, new) in enumerate(zip(before, after, strict=True)):
            if new - old != expected:
                raise EngineError(
                    f"{expected} steered requests were sent, but worker {worker} has seen {new - old}; "
                    "the responses are not what was asked for and were thrown away"
                )


def _source(source: Source) -> dict[str, Any]:
    return source.to_dict() | {"direction": "reverse" if source.reverse else "forward"}
