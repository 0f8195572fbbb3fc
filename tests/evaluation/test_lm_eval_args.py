"""From lm-eval's model arguments to the request text. No engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expert_registry.errors import ProfileError, RequestError, UsageError
from lm_eval_tasks.models.response_cache import claim_cache
from lm_eval_tasks.models.steering_args import SteeringArgs
from tests.support.refusals import not_refused
from vllm_steermoe_plugin.steering.request import parse_request

EXPERTS = {"activate": {"3": [7, 5]}, "deactivate": {"0": [1]}}
EXPERTS_TEXT = '{"activate":{"3":[5,7]},"deactivate":{"0":[1]}}'


def text(**args: Any) -> str:
    found = SteeringArgs(**args).text()
    parse_request(found)
    return found


def test_text() -> None:
    for args, expected in [
        ({}, "none"),
        ({"steer": "none"}, "none"),
        ({"steer": "digits"}, "digits"),
        ({"steer": " digits + refusal:reverse "}, "digits+refusal:reverse"),
        ({"steer": "digits@latest:forward:phase=both"}, "digits"),
        ({"steer": "digits:deactivate=0:activate=4"}, "digits:activate=4:deactivate=0"),
        ({"steer": "digits", "direction": "reverse"}, "digits:reverse"),
        ({"steer": "digits", "direction": "forward"}, "digits"),
        ({"steer": "digits", "activate": 4, "deactivate": "0"}, "digits:activate=4:deactivate=0"),
        ({"steer": "digits", "registry_version": 2, "phase": "prompt"}, "digits@2:phase=prompt"),
        ({"steer": "digits@2", "direction": "reverse", "registry_version": None}, "digits@2:reverse"),
        ({"steer": "digits:reverse", "registry_version": "latest"}, "digits:reverse"),
        ({"steer": "@terse"}, "@terse"),
        ({"steer": " @terse + digits@2:forward + @house "}, "digits@2+@terse+@house"),
        ({"steer": json.dumps(EXPERTS)}, EXPERTS_TEXT),
        ({"steer": EXPERTS}, EXPERTS_TEXT),
        ({"experts": json.dumps(EXPERTS)}, EXPERTS_TEXT),
        # As lm-eval reads `experts={3: ...}` on its command line.
        ({"experts": {"activate": {3: [5, 7]}, "deactivate": {0: [1]}}}, EXPERTS_TEXT),
    ]:
        assert text(**args) == expected


def test_equal_requests_have_equal_texts() -> None:
    said = text(steer="digits@3:activate=2:reverse:phase=generation")
    assert said == text(steer="digits", registry_version=3, activate=2, direction="reverse", phase="generation")
    assert said == text(steer=said)


def test_experts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    path.write_text(json.dumps(EXPERTS))
    assert text(experts=str(path)) == text(experts=path) == EXPERTS_TEXT


def test_errors_say_what_is_wrong() -> None:
    several = ({"steer": "digits+@terse", "direction": "reverse"}, {"steer": "@terse", "direction": "reverse"})
    rows: list[tuple[dict[str, Any], str]] = [
        ({"steer": 123}, "steer= arrived as int 123"),
        ({"steer": float("inf")}, "steer= arrived as float inf"),
        ({"steer": True}, "steer= arrived as bool True"),
        ({"steer": ["a", "b"]}, "steer= arrived as list"),
        ({"steer": "  "}, "steer= is empty"),
        ({"steer": "Digits"}, "is no steering request"),
        ({"steer": "digits:revers"}, "did you mean 'reverse'"),
        ({"direction": "reverse"}, "direction= changes one named behaviour, but steer=none"),
        ({"steer": "digits+refusal", "activate": 2}, "activate= changes one named behaviour"),
        *((args, "direction= changes one named behaviour") for args in several),
        ({"steer": EXPERTS_TEXT, "phase": "prompt"}, "phase= changes one named behaviour"),
        ({"steer": "digits:forward", "direction": "reverse"}, "direction= says again"),
        *(({"steer": f"digits@{v}", "registry_version": 1}, "registry_version= says again") for v in ("1", "latest")),
        ({"steer": "digits:activate=2", "activate": 2}, "activate= says again"),
        ({"steer": "digits:phase=both", "phase": "prompt"}, "phase= says again"),
        *(({"steer": "digits", "direction": v}, f"unknown direction '{v}'") for v in ("backward", True)),
        ({"steer": "digits", "phase": "decode"}, "unknown phase 'decode'"),
        *(({"steer": "digits", "activate": v}, "activate= needs a whole number from 0") for v in (-1, 2.0, True, "²")),
        ({"steer": "digits", "deactivate": "many"}, "deactivate= needs a whole number"),
        ({"steer": "digits", "registry_version": 0}, "registry_version= needs a whole number from 1"),
        *(({"steer": v, "experts": EXPERTS}, "does not go together with steer=") for v in ("digits", "none")),
        ({"activate": 0, "experts": EXPERTS}, "does not go together with activate="),
        ({"experts": 5}, "experts= arrived as int 5"),
        ({"experts": ""}, "experts= arrived as str"),
        ({"experts": "/no/such/file.json"}, "cannot read it: No such file"),
        ({"experts": '{"boost": {}}'}, "unknown key 'boost'"),
    ]
    assert not_refused(lambda args: SteeringArgs(**args).text(), rows, (RequestError, UsageError)) == []


def test_an_empty_expert_set_is_refused() -> None:
    with pytest.raises(ProfileError, match="names no expert"):
        SteeringArgs(experts={"activate": {}}).text()


def test_files_that_are_no_expert_set(tmp_path: Path) -> None:
    path = tmp_path / "experts.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        SteeringArgs(experts=path).text()
    path.write_text("[1, 2]")
    with pytest.raises(RequestError, match="is a JSON object, got list"):
        SteeringArgs(experts=path).text()
    path.write_text(" " * ((1 << 20) + 5))
    with pytest.raises(RequestError, match="at most"):
        SteeringArgs(experts=path).text()


def test_a_cache_belongs_to_the_first_that_claims_it() -> None:
    claim_cache(None, "me")
    cache: dict[str, Any] = {}
    claim_cache(cache, "me")
    cache["0123"] = "response"
    claim_cache(cache, "me")
    with pytest.raises(UsageError, match="responses of me, but this run is you"):
        claim_cache(cache, "you")


def test_a_cache_of_unknown_origin_is_refused() -> None:
    with pytest.raises(UsageError, match="nobody can tell"):
        claim_cache({"0123": "response"}, "me")


def test_the_former_import_path_still_works() -> None:
    import lm_eval_tasks
    from lm_eval_tasks.model import SteerMoEVLLM

    assert lm_eval_tasks.SteerMoEVLLM is SteerMoEVLLM
    with pytest.raises(AttributeError, match="Nothing"):
        _ = lm_eval_tasks.Nothing
