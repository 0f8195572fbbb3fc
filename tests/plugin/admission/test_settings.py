"""The operator's settings: what may be asked for, where, and settings that are none."""

from __future__ import annotations

import itertools
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest

from expert_registry.errors import ConfigurationError, PolicyError
from tests.support.folders import ROOT
from tests.support.refusals import as_said, not_refused, refusal
from vllm_steermoe_plugin.admission.policy import check_policy
from vllm_steermoe_plugin.settings import Settings, read_settings
from vllm_steermoe_plugin.steering.request import parse_request

EXPERTS = '{"activate": {"3": [5]}}'
NEEDS: dict[str, tuple[str, ...]] = {
    "digits": (),
    "digits@2": (),
    "digits+refusal": (),
    "digits:phase=prompt": (),
    "none": (),
    "digits:reverse": ("allow_reverse",),
    "refusal+digits:reverse": ("allow_reverse",),
    EXPERTS: ("allow_experts",),
    "digits:activate=4": ("allow_experts",),
    "digits:deactivate=0": ("allow_experts",),
    "refusal+digits:activate=0": ("allow_experts",),
    "digits:reverse:activate=4": ("allow_reverse", "allow_experts"),
    "digits:strength=0.5": (),
    "digits:strength=0": (),
    '{"bias": {"3": {"5": 0}}}': (),
    "digits:strength=-0.5": ("allow_reverse",),
    "digits:strength=0.5:top=9": ("allow_experts",),
    "digits:strength=0.5:by=sign": ("allow_experts",),
    '{"bias": {"3": {"5": 0.5}}}': ("allow_experts",),
}
"""Request -> what a server must allow for it."""
SWITCHES = ("enabled", "allow_override", "allow_reverse", "allow_experts")


def refused_by(text: str, settings: Settings, *, served: bool) -> set[str]:
    """Settings of which one must be named by the refusal; empty if the request is allowed."""
    if not settings.enabled:
        return {"enabled"}
    if not settings.allow_override and (settings.default is not None or parse_request(text)):
        return {"allow_override"}
    return {need for need in NEEDS[text] if served and not getattr(settings, need)}


def test_strengths_are_bounded_over_http_in_both_directions() -> None:
    for most, text, allowed in [
        (2.0, "digits:strength=2", True),
        (2.0, "digits:strength=2.1", False),
        (2.0, "refusal+digits:strength=-2.1", False),
        (0.0, "digits:strength=0.1", False),
        (16.0, "digits:strength=16", True),
    ]:
        settings, request = Settings(max_strength=most, allow_reverse=True), parse_request(text)
        error = refusal(lambda: check_policy(request, settings, served=True))  # noqa: B023
        assert error is None if allowed else as_said(error, PolicyError, f"up to {most:g}.*max_strength"), text
        check_policy(request, settings, served=False)
    assert Settings().max_strength == 2.0 and Settings.model_validate({"max_strength": 16}).max_strength == 16


def test_the_whole_matrix() -> None:
    cases = itertools.product(
        NEEDS, (False, True), (None, "refusal", "none"), itertools.product((False, True), repeat=4)
    )
    for text, served, default, values in cases:
        settings = Settings(default=default, **dict(zip(SWITCHES, values, strict=True)))
        # An engine that does not steer need not refuse a request not to be steered.
        unsteered = not parse_request(text)
        allowing = set() if unsteered and not settings.enabled else refused_by(text, settings, served=served)
        error = refusal(lambda: check_policy(parse_request(text), settings, served=served))  # noqa: B023
        named = set(re.findall(r"'(\w+)'", str(error))) & set(Settings.model_fields)
        assert bool(named) == bool(allowing) == isinstance(error, PolicyError) and named <= allowing, (text, settings)


def test_the_defaults_are_safe_for_a_public_server() -> None:
    for text, needs in NEEDS.items():
        error = refusal(lambda: check_policy(parse_request(text), Settings(), served=True))  # noqa: B023
        assert as_said(error, PolicyError, needs[0]) if needs else error is None
        check_policy(parse_request(text), Settings(), served=False)


def test_a_refusal_names_the_behaviour_that_it_is_about() -> None:
    with pytest.raises(PolicyError, match=r"^digits:reverse"):
        check_policy(parse_request("refusal+digits:reverse"), Settings(), served=True)


def test_without_a_section_the_defaults_hold() -> None:
    for config in [None, {}, {"other": 1}, {"steermoe": {}}]:
        assert read_settings(config) == Settings()


def test_settings_that_cannot_be_looked_up_are_not_passed_over() -> None:
    with pytest.raises(ConfigurationError, match="additional_config is a SimpleNamespace"):
        read_settings(SimpleNamespace(steermoe={"enabled": False}))


def test_a_section_is_read() -> None:
    values: dict[str, Any] = {
        "enabled": False,
        "default": "digits:reverse",
        "allow_override": False,
        "allow_reverse": True,
        "allow_experts": True,
        "max_strength": 0.5,
        "base_model": "org/base",
        "lock": "steermoe.lock",
        "profiles": {"terse": "digits:reverse"},
        "manage": "env:STEERMOE_MANAGE_KEY",
        "profile_store": "profiles.json",
        "external_routing": True,
        "count_groups": 64,
    }
    assert read_settings({"steermoe": values, "other": 1}).model_dump() == values


def test_what_is_no_setting_is_refused_by_name() -> None:
    rows: list[tuple[Any, ...]] = [
        ({"allow_revers": True}, r"'allow_revers'.*known settings: .*allow_reverse"),
        ({"allow_reverse": "yes"}, r"'allow_reverse'"),
        ({"allow_reverse": 1}, r"'allow_reverse'"),
        ({"enabled": None}, r"'enabled'"),
        ({"default": 3}, r"'default'"),
        ({"default": {"activate": {}}}, r"'default'"),
        ({"profiles": ["terse"]}, r"'profiles'"),
        ({"profiles": {"Terse": "digits"}}, r"'profiles\.Terse"),
        ({"profiles": {"terse\n": "digits"}}, r"'profiles"),
        ({"profiles": {"terse": {"activate": {}}}}, r"'profiles\.terse'"),
        ({"manage": True}, r"'manage'"),
        ({"manage": "open-sesame"}, r"'manage'"),
        ({"manage": "env:"}, r"'manage'"),
        ({"manage": "file:"}, r"'manage'"),
        ({"profile_store": 3}, r"'profile_store'"),
        ({"count_groups": True}, r"'count_groups'"),
        ({"count_groups": -1}, r"'count_groups'"),
        ({"count_groups": 1025}, r"'count_groups'"),
        ({"count_groups": 2.0}, r"'count_groups'"),
        ([], r"'steermoe'.*known settings"),
        (True, r"'steermoe'"),
        (None, r"'steermoe'"),
        ("digits", r"'steermoe'"),
    ]
    assert not_refused(lambda section: read_settings({"steermoe": section}), rows, ConfigurationError) == []


def test_settings_do_not_change_while_the_engine_runs() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.allow_reverse = True  # type: ignore[misc]


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_lists_every_setting_with_its_default() -> None:
    """Errors tell operators to set them."""
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", README, flags=re.MULTILINE)
    shown = {name: default.strip("`") for name, default in rows if default != "|"}
    defaults = {name: getattr(Settings(), name) for name in Settings.model_fields}
    assert shown == {name: json.dumps(value) if value not in (None, {}) else "none" for name, value in defaults.items()}


def test_the_readme_lists_the_option_of_each_setting() -> None:
    from typer.main import get_command

    from vllm_steermoe_plugin.cli import app

    command: Any = get_command(app)
    options = command.commands["serve"].params
    known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)}
    rows = re.findall(r"^\| `(\w+)` \| \S+ \| `(--[\w-]+)", README, flags=re.MULTILINE)
    assert len(rows) == len(Settings.model_fields) - 2 and {flag for _, flag in rows} <= known


def test_the_readme_lists_every_environment_variable() -> None:
    packages = ("expert_registry", "vllm_steermoe_plugin", "lm_eval_tasks")
    texts = [path.read_text(encoding="utf-8") for package in packages for path in (ROOT / package).rglob("*.py")]
    read = {name for text in texts for name in re.findall(r'"(STEERMOE_[A-Z_]+)"', text)}
    assert read and read <= set(re.findall(r"`(STEERMOE_[A-Z_]+)`", README))
