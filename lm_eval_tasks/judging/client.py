"""Questions to a judge behind an OpenAI-compatible server: in parallel, and each only once."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from lm_eval_tasks.errors import JudgeError
from lm_eval_tasks.line_log import LineLog
from vllm_steermoe_plugin.detection.rows import DataError

Messages = list[dict[str, str]]
KEY_VARIABLE = "STEERMOE_JUDGE_KEY"
"""Environment variable with the server's key, if it wants one."""


@dataclass(slots=True)
class AnswerCache:
    """Answers by the hash of their question, with their log, so that an interrupted pass goes on."""

    log: LineLog | None = None
    answers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None) -> AnswerCache:
        """Read a cache, or begin one; None keeps answers in memory.

        Raises:
            JudgeError: the file is no such cache.
        """
        if path is None:
            return cls()
        log = LineLog(path)
        try:
            return cls(log, {str(value["key"]): str(value["answer"]) for value in log.read()})
        except (DataError, KeyError, TypeError) as error:
            raise JudgeError(f"{path} is no cache of judged answers: {error!r:.200}") from None

    def add(self, key: str, answer: str) -> None:
        """Remember one answer."""
        self.answers[key] = answer
        if self.log is not None:
            self.log.append({"key": key, "answer": answer})


@dataclass(frozen=True, slots=True)
class JudgeServer:
    """A model behind a server.

    Attributes:
        model: its name there.
        url: up to and with `/v1`.
        workers: questions at once.
    """

    model: str
    url: str
    workers: int = 16
    timeout: float = 300.0
    tries: int = 3

    @classmethod
    def parse(cls, text: str) -> JudgeServer:
        """From `MODEL@URL`, such as `meta-llama/Llama-Guard-3-8B@http://127.0.0.1:8000/v1`.

        Raises:
            JudgeError: it is not of this form.
        """
        model, at, url = text.partition("@http")
        if not model or not at or not url.startswith(("://", "s://")):
            raise JudgeError(f"judge {text!r:.120}: write MODEL@URL, such as name@http://127.0.0.1:8000/v1")
        return cls(model, ("http" + url).rstrip("/"))

    def ask_all(
        self,
        questions: Sequence[Messages],
        max_tokens: int,
        cache: AnswerCache,
        read: Callable[[str], Any],
    ) -> list[Any]:
        """The answers as `read` reads them, in the order of the questions; equal questions are asked once.

        Raises:
            JudgeError: the server cannot be reached or refuses, or an answer cannot be read. What was
                answered until then is in the cache; an answer that cannot be read is not.
        """
        keys = [self._key(messages, max_tokens) for messages in questions]
        missing = {key: messages for key, messages in zip(keys, questions, strict=True) if key not in cache.answers}
        with self._client() as client, ThreadPoolExecutor(max_workers=self.workers) as pool:
            waiting = {pool.submit(self._ask, client, messages, max_tokens): key for key, messages in missing.items()}
            try:
                for done in as_completed(waiting):
                    answer = done.result()
                    read(answer)
                    cache.add(waiting[done], answer)
            except JudgeError:
                pool.shutdown(cancel_futures=True)
                raise
        return [read(cache.answers[key]) for key in keys]

    def version(self) -> str:
        """What the server says of the checkpoint behind the judge's name, or `unknown` if it says nothing.

        vLLM's `/v1/models` names the checkpoint (`root`); other servers may have no such route.
        """
        try:
            with self._client() as client:
                listed = client.get(f"{self.url}/models").raise_for_status().json().get("data", [])
            mine: dict[str, object] = next((entry for entry in listed if entry.get("id") == self.model), {})
            return str(mine.get("root") or "unknown")[:200]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, AttributeError, TypeError):
            return "unknown"

    def _client(self) -> httpx.Client:
        key = os.environ.get(KEY_VARIABLE)
        limits = httpx.Limits(max_connections=self.workers)
        return httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=self.timeout, limits=limits
        )

    def _key(self, messages: Messages, max_tokens: int) -> str:
        text = json.dumps([self.model, messages, max_tokens], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _ask(self, client: httpx.Client, messages: Messages, max_tokens: int) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens, "seed": 0}
        for attempt in range(1, self.tries + 1):
            try:
                reply = client.post(f"{self.url}/chat/completions", json=body)
                if reply.is_success:
                    return self._text(reply)
                reason = f"status {reply.status_code}: {reply.text[:300]}"
                if reply.status_code < 500 and reply.status_code != 429:
                    raise JudgeError(f"judge {self.model} at {self.url} refuses: {reason}")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = str(error) or repr(error)
            if attempt < self.tries:
                time.sleep(0.2 * 4**attempt)
        raise JudgeError(f"judge {self.model} at {self.url} does not answer after {self.tries} tries: {reason}")

    def _text(self, reply: httpx.Response) -> str:
        try:
            text = reply.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise JudgeError(
                f"judge {self.model} at {self.url}: no chat completion, but {reply.text[:200]!r}"
            ) from None
        if not isinstance(text, str):
            raise JudgeError(f"judge {self.model} at {self.url}: an answer without text")
        return text
