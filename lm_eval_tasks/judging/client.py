"""Questions to a judge behind an OpenAI-compatible server: in parallel, and each only once."""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lm_eval_tasks.data_files import read_text
from lm_eval_tasks.errors import JudgeError
from vllm_steermoe_plugin.detection.datasets import DataError

Messages = list[dict[str, str]]
KEY_VARIABLE = "STEERMOE_JUDGE_KEY"
"""Environment variable with the server's key, if it wants one."""
MAX_ANSWER = 1 << 20
MAX_CACHE = 1 << 30


@dataclass(slots=True)
class AnswerCache:
    """Answers by the hash of their question; a JSONL file that only grows, so an interrupted pass goes on."""

    path: Path | None = None
    answers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None) -> AnswerCache:
        """Read a cache, or begin one; None keeps answers in memory.

        Raises:
            JudgeError: the file is no such cache.
        """
        cache = cls(path)
        if path is None or not path.exists():
            return cache
        try:
            whole, _, _ = read_text(path, MAX_CACHE).rpartition("\n")
            for line in filter(None, whole.split("\n")):
                value = json.loads(line)
                cache.answers[str(value["key"])] = str(value["answer"])
        except (DataError, ValueError, KeyError, TypeError) as error:
            raise JudgeError(f"{path} is no cache of judged answers: {error!r:.200}") from None
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
        return cache

    def add(self, key: str, answer: str) -> None:
        """Remember one answer."""
        self.answers[key] = answer
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "answer": answer}) + "\n")


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
        with ThreadPoolExecutor(max_workers=self.workers) as pool:
            waiting = {pool.submit(self._ask, messages, max_tokens): key for key, messages in missing.items()}
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
        request = urllib.request.Request(f"{self.url}/models", headers=self._headers())
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                listed = json.loads(response.read(MAX_ANSWER)).get("data", [])
            mine: dict[str, object] = next((entry for entry in listed if entry.get("id") == self.model), {})
            return str(mine.get("root") or "unknown")[:200]
        except (OSError, ValueError, AttributeError, TypeError):
            return "unknown"

    @staticmethod
    def _headers() -> dict[str, str]:
        key = os.environ.get(KEY_VARIABLE)
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def _key(self, messages: Messages, max_tokens: int) -> str:
        text = json.dumps([self.model, messages, max_tokens], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _ask(self, messages: Messages, max_tokens: int) -> str:
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens, "seed": 0}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), self._headers())
        for attempt in range(1, self.tries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return self._text(response.read(MAX_ANSWER + 1))
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {error.read(300).decode(errors='replace')}"
                if error.code < 500 and error.code != 429:
                    raise JudgeError(f"judge {self.model} at {self.url} refuses: {reason}") from None
            except OSError as error:
                reason = str(error)
            if attempt < self.tries:
                time.sleep(0.2 * 4**attempt)
        raise JudgeError(f"judge {self.model} at {self.url} does not answer after {self.tries} tries: {reason}")

    def _text(self, data: bytes) -> str:
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise JudgeError(f"judge {self.model} at {self.url}: no chat completion, but {data[:200]!r}") from None
        if not isinstance(text, str):
            raise JudgeError(f"judge {self.model} at {self.url}: an answer without text")
        return text
