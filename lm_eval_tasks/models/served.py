"""lm-eval's models for a running server (`vllm serve` with this plugin), each of whose requests is steered.

lm-eval builds the bodies of log-likelihood requests without `--gen_kwargs`, so steering that is
given there reaches generation only. Here every body carries it, whatever it is for.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

from expert_registry.errors import UsageError
from lm_eval_tasks.models.response_cache import claim_cache
from lm_eval_tasks.models.server_probe import BODY_KEY, check_server
from lm_eval_tasks.models.steering_args import SteeringArgs
from vllm_steermoe_plugin.compat.versions import tool_versions
from vllm_steermoe_plugin.steering.request import NONE
from vllm_steermoe_plugin.steering.wire import STEER_KEY


class _Steered:
    """Mixed into an API model of lm-eval: the arguments of `SteeringArgs`, sent with every request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take the model's own arguments and the fields of `SteeringArgs`.

        Raises:
            SteerMoEError: the steering cannot be read, or the server does not steer or refuses it.
        """
        steering = {field.name: kwargs.pop(field.name) for field in fields(SteeringArgs) if field.name in kwargs}
        self._text = SteeringArgs(**steering).text()
        self._sent = 0
        super().__init__(*args, **kwargs)
        if self._text != NONE:
            served: Any = self
            check_server(served.base_url, dict(served.header or {}), served.model, self._text)

    @property
    def steering(self) -> str:
        """The request text that every body carries; also `none`, which lifts the server's default."""
        return self._text

    def _create_payload(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The one place where lm-eval makes bodies, for all kinds of requests."""
        body: dict[str, Any] = super()._create_payload(*args, **kwargs)  # type: ignore[misc]
        given = body.get(BODY_KEY) or {}
        if STEER_KEY in given:
            raise UsageError(
                f"a task or --gen_kwargs asks for steering {given[STEER_KEY]!r:.80}, the model arguments for "
                f"{self._text!r:.80}; it is set in the model arguments only"
            )
        body[BODY_KEY] = {**given, STEER_KEY: self._text}
        self._sent += 1
        return body

    def get_model_info(self) -> dict[str, Any]:
        """For `config` in lm-eval's results. What the server made of the request is not known here."""
        return {
            "steermoe": {
                "model": getattr(self, "model", None),
                "server": getattr(self, "base_url", None),
                "request": self._text,
                "profile": None if self._text == NONE else self._text,
                "digest": None,
                "versions": tool_versions(),
                "requests": self._sent,
            }
        }

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Take a response cache, unless it was made with another model or steering.

        Raises:
            UsageError: it was, or nobody knows.
        """
        server = getattr(self, "base_url", None), getattr(self, "model", None)
        claim_cache(cache_hook.dbdict, repr({"server": server, "request": self._text}))
        super().set_cache_hook(cache_hook)  # type: ignore[misc]


class SteerMoECompletions(_Steered, LocalCompletionsAPI):  # type: ignore[misc]
    """`lm_eval --model steermoe-completions`: log-likelihood and generation through /v1/completions."""


class SteerMoEChatCompletions(_Steered, LocalChatCompletion):  # type: ignore[misc]
    """`lm_eval --model steermoe-chat-completions`: generation through /v1/chat/completions."""
