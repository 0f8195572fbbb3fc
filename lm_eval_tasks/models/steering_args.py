"""From lm-eval's model arguments to the one text that asks the engine for steering.

lm-eval parses the values of `--model_args` on its own, so a text may arrive as a number,
a truth value, None or a dict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from expert_registry.errors import UsageError, one_of
from vllm_steermoe_plugin.steering.profile import MAX_TEXT, PHASES, SteeringProfile
from vllm_steermoe_plugin.steering.request import NONE, Named, SteeringRequest, parse_request

DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringArgs:
    """The steering arguments of `--model_args`, as they arrive.

    Attributes:
        steer: a request in the grammar of `vllm_steermoe_plugin/steering/request.py`; None is `none`.
        experts: instead of `steer`, an expert set: the path of a JSON file, or the JSON itself.
        direction: `forward` or `reverse`. This and the following change the one behaviour in `steer`.
        activate: number of experts.
        deactivate: number of experts.
        registry_version: of the ranking, or `latest`.
        phase: `both`, `prompt` or `generation`.
    """

    steer: object = None
    experts: object = None
    direction: object = None
    activate: object = None
    deactivate: object = None
    registry_version: object = None
    phase: object = None

    def text(self) -> str:
        """The request in canonical form: equal requests have equal texts.

        Raises:
            UsageError: a value is not what its argument takes, or two arguments say the same thing.
            ProfileError: an expert set that contradicts itself.
        """
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        changes = [name for name in given if name not in ("steer", "experts")]
        if self.experts is not None:
            other = [name for name in given if name != "experts"]
            if other:
                raise UsageError(f"experts= is a complete expert set; it does not go together with {other[0]}=")
            return SteeringRequest(explicit=SteeringProfile.from_json(_experts_text(self.experts)) or None).text()
        stated = _steer_text(self.steer)
        request = parse_request(stated)
        if not changes:
            return request.text()
        if len(request.named) != 1 or request.profiles:
            raise UsageError(
                f"{changes[0]}= changes one named behaviour, but steer={stated:.80}; "
                "write options behind each behaviour instead, such as digits:reverse+refusal"
            )
        already = _stated_options(stated) & set(changes)
        if already:
            name = sorted(already)[0]
            raise UsageError(f"{name}= says again what steer={stated:.80} already says; leave one of them out")
        return self._changed(request.named[0]).text()

    def _changed(self, named: Named) -> Named:
        if self.direction is not None:
            named = replace(named, reverse=_choice("direction", self.direction, DIRECTIONS) == "reverse")
        if self.registry_version not in (None, "latest"):
            named = replace(named, version=_number("registry_version", self.registry_version, least=1))
        if self.activate is not None:
            named = replace(named, activate=_number("activate", self.activate))
        if self.deactivate is not None:
            named = replace(named, deactivate=_number("deactivate", self.deactivate))
        if self.phase is not None:
            phase = _choice("phase", self.phase, PHASES)
            named = replace(named, phase=next(known for known in PHASES if known == phase))
        return named


def _stated_options(text: str) -> set[str]:
    """Names of the model arguments that a request for one behaviour already answers."""
    head, *options = text.split(":")
    names = {"direction" if option in DIRECTIONS else option.partition("=")[0] for option in options}
    return names | ({"registry_version"} if "@" in head else set())


def _steer_text(value: object) -> str:
    if value is None:
        return NONE
    if isinstance(value, Mapping):
        return json.dumps(value)
    if not isinstance(value, str):
        raise _not_a_text("steer", value, "a behaviour's name begins with a letter, such as digits or digits@2")
    if not value.strip():
        raise UsageError(f"steer= is empty; name a behaviour, or write steer={NONE}")
    return value


def _experts_text(value: object) -> str:
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return value
    if not isinstance(value, str | Path) or not str(value).strip():
        raise _not_a_text("experts", value, "give the path of a JSON file, or JSON")
    try:
        with Path(value).open(encoding="utf-8") as file:
            # One more than allowed: the reader of the text then says that it is too long.
            return file.read(MAX_TEXT + 1)
    except OSError as error:
        raise UsageError(f"experts={value}: cannot read it: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"experts={value}: it is not UTF-8 text") from None


def _not_a_text(name: str, value: object, hint: str) -> UsageError:
    return UsageError(f"{name}= arrived as {type(value).__name__} {value!r:.80}; {hint}")


def _number(name: str, value: object, *, least: int = 0) -> int:
    text = str(value) if type(value) is int or isinstance(value, str) else ""
    if not text.isascii() or not text.isdigit() or len(text) > 6 or int(text) < least:
        raise UsageError(f"{name}= needs a whole number from {least} to 999999, got {value!r:.40}")
    return int(text)


def _choice(name: str, value: object, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UsageError(one_of(str(value), known, name))
    return str(value)
