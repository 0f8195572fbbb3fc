"""Ask a running server, before anything is measured, whether it steers: one without the plugin ignores the request."""

from __future__ import annotations

from typing import Any

import httpx

from expert_registry.errors import ConfigurationError, EngineError
from vllm_steermoe_plugin.steering.wire import STEER_KEY

BODY_KEY = "vllm_xargs"
"""Where vLLM's OpenAI-compatible server takes arguments for plugins."""
USER = "steermoe-probe"
"""The OpenAI field `user` of probes, so that a server's log tells them from the run's requests."""
MALFORMED = "?"
"""No steering request; a server with the plugin answers 400 and says so."""
TIMEOUT_SECONDS = 120.0


def check_server(url: str, headers: dict[str, str], model: str, steering: str) -> None:
    """Make sure that the server behind `url` steers, and accepts `steering`.

    Args:
        url: of `/v1/completions` or `/v1/chat/completions`.
        headers: such as the authorisation.
        model: its name there.
        steering: the request text that the run will send.

    Raises:
        EngineError: it cannot be reached, has no plugin, or refuses the steering; with its reason.
    """
    status, reason = _ask(url, headers, model, MALFORMED)
    if status != 400 or STEER_KEY not in reason:
        raise ConfigurationError(
            f"the server at {url} does not steer: it answered a malformed steering request with status {status}, where "
            f"the plugin refuses it; is the plugin installed and loaded there? {reason[:200]}"
        )
    status, reason = _ask(url, headers, model, steering)
    if status != 200:
        raise EngineError(f"the server at {url} refuses {steering!r:.80} with status {status}: {reason[:1000]}")


def _ask(url: str, headers: dict[str, str], model: str, steering: str) -> tuple[int, str]:
    body: dict[str, Any] = {"model": model, "max_tokens": 1, "temperature": 0, "user": USER}
    body |= {"messages": [{"role": "user", "content": "a"}]} if "/chat/" in url else {"prompt": "a"}
    body[BODY_KEY] = {STEER_KEY: steering}
    # lm-eval's `Bearer ` without a key ends in a space, which httpx does not send.
    headers = {name: value.strip() for name, value in headers.items()}
    try:
        reply = httpx.post(url, json=body, headers=headers, timeout=TIMEOUT_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineError(f"the server at {url} cannot be reached: {error}") from None
    return reply.status_code, "" if reply.is_success else reply.text
