"""Where a caller may ask for steering, and where vLLM would drop it without a word: refused.

It knows no vLLM. `frontend/http_checks.py` puts it in vLLM's way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from expert_registry.errors import RequestError
from vllm_steermoe_plugin.steering.wire import STEER_KEY

READ_XARGS = (
    "/v1/chat/completions",
    "/v1/chat/completions/batch",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
)
"""Endpoints that generate and read `vllm_xargs`."""
_SPEECH = ("/v1/audio/transcriptions", "/v1/audio/translations")
"""Forms; in batch files their fields may hold `vllm_xargs`."""
_HANDS_ON = "/invocations"
"""It hands bodies to some of them."""
_HARMLESS = (*(f"{path}/render" for path in READ_XARGS), "/tokenize", "/detokenize", "/count_tokens")
"""Endpoints that pass it on, or generate nothing."""
_TOKENS_IN = "/inference/v1/generate"
_AFTERWARDS = "/derender"
"""Endpoints that are shown a request, steered or not, of which the tokens have been generated."""
_BY_DEFAULT = ("/v2/chat", "/v1/decisions", "/v1/systemone", "/generative_scoring")
"""These generate as the default says, only: they have no place in which a request could ask for steering."""

_BEAMS = "use_beam_search"

Place = tuple[str, ...]
"""Keys that lead from a body to the text that asks."""
XARGS: Place = ("vllm_xargs", STEER_KEY)
_IN_TOKENS_IN: Place = ("sampling_params", "extra_args", STEER_KEY)
_USERS_OWN = frozenset(
    {"content", "criteria", "data", "documents", "functions", "guided_json", "input", "json_schema", "output_config"}
    | {"output_format", "prompt", "questions", "response_format", "schema", "state", "structured_outputs", "text"}
    | {"tools"}
)
"""Keys under which the user's own data stands, or a schema of it: there any key may be meant."""


def check_body(path: str, body: object) -> None:
    """Raise RequestError if `body`, sent to `path`, asks for steering where nothing reads it.

    Args:
        path: of the URL; there may be a prefix before that of the endpoint.
        body: as parsed from JSON, or the fields of a form.
    """
    reads = _read_at(path)
    for place in _asking(body) if isinstance(body, dict) and not path.endswith(_AFTERWARDS) else ():
        if place != reads:
            raise _refusal(path, ".".join(place)[:160], reads)


def check_names(path: str, kind: str, names: Iterable[str]) -> None:
    """Raise RequestError if a header or a query parameter, which nothing reads, asks for steering.

    Args:
        path: as above.
        kind: what the names are of.
        names: theirs.
    """
    wrong = next((name for name in names if _asks(name)), None)
    if wrong is not None:
        raise _refusal(path, f"the {kind} {wrong:.80}", _read_at(path))


def check_beams(path: str, body: object) -> None:
    """Raise RequestError if a request asks for steering and for beam search, which drops it."""
    if has_beams(body) and STEER_KEY in (asked_at(path, body) or {}):
        raise RequestError("vLLM's beam search does not carry a request's steering; ask without beam search")


def has_beams(body: object) -> bool:
    """Whether a body asks for beam search, as pydantic reads booleans."""
    asked = body.get(_BEAMS) if isinstance(body, dict) else None
    return str(asked).strip().lower() not in ("none", "false", "0", "0.0", "off", "no", "n", "f")


def asked_at(path: str, body: object) -> Mapping[str, object] | None:
    """The object from which the endpoint takes what is asked for, if it is there."""
    read = _read_at(path)
    for key in read[:-1] if read is not None else ():
        body = body.get(key) if isinstance(body, dict) else None
    return body if read is not None and isinstance(body, dict) else None


def generates(path: str) -> bool:
    """Whether an endpoint generates, as asked for or by default."""
    return path.endswith((*READ_XARGS, *_SPEECH, _HANDS_ON, _TOKENS_IN, *_BY_DEFAULT))


def _read_at(path: str) -> Place | None:
    if path.endswith(_TOKENS_IN):
        return _IN_TOKENS_IN
    return XARGS if path.endswith((*READ_XARGS, *_SPEECH, _HANDS_ON, *_HARMLESS)) else None


def _refusal(path: str, place: str, reads: Place | None) -> RequestError:
    # Keys may have half a surrogate in them, with which no answer could be written.
    shown = "".join(letter if letter.isprintable() else "?" for letter in place)
    return RequestError(
        f"vLLM's {path:.80} does not read {shown}, so this request would not be steered; "
        + (f"write {'.'.join(reads)}" if reads is not None else f"ask at one of {', '.join(READ_XARGS)}")
    )


def _asking(body: Mapping[str, Any]) -> Iterator[Place]:
    pending: list[tuple[_Path | None, Mapping[str, Any]]] = [(None, body)]
    pending += [((None, f"messages[{i}]"), message) for i, message in enumerate(_messages(body))]
    while pending:
        path, found = pending.pop()
        for key, value in found.items():
            if value is None:
                continue  # Null asks for nothing, here as everywhere.
            if _asks(key):
                yield _place((path, key))
            elif isinstance(value, dict) and _plain(key) not in _USERS_OWN:
                pending.append(((path, key), value))


_Path = tuple[Any, str]
"""What leads to an object, and its key there: a body of a million nested objects takes no longer than another."""


def _place(path: _Path | None) -> Place:
    keys: list[str] = []
    while path is not None:
        path, key = path
        keys.append(key)
    return tuple(reversed(keys))


def _messages(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of a chat, or of several."""
    found = body.get("messages")
    for message in found if isinstance(found, list) else ():
        yield from (one for one in (message if isinstance(message, list) else [message]) if isinstance(one, dict))


def _plain(key: str) -> str:
    return key.strip().lower()


def _asks(key: str) -> bool:
    """Whether a key means ours, also as forms and headers write it: `vllm_xargs[steermoe]`, `X-SteerMoE`."""
    plain = _plain(key)
    if STEER_KEY not in plain:
        return False
    last = plain.rstrip("]").replace("[", ".").rpartition(".")[2]
    return last.removeprefix("x-").strip(" '\"") == STEER_KEY
