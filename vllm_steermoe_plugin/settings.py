"""The operator's settings: the `steermoe` key of vLLM's `--additional-config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expert_registry.card import Slug
from expert_registry.errors import ConfigurationError
from expert_registry.weights import MAX_WEIGHT

KEY = "steermoe"
SWITCH_OFF = '--additional-config \'{"steermoe": {"enabled": false}}\''
"""How an operator leaves a model to vLLM; errors at start say it."""


class Settings(BaseModel):
    """What the operator allows. The defaults are safe for a public server."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enabled: bool = True
    """False: every request that asks for steering is refused."""
    default: str | None = None
    """Steering of requests that name none, as such text; None leaves them untouched."""
    allow_override: bool = True
    """Whether a request may name its steering, `none` included; if not, only the default steers."""
    allow_reverse: bool = False
    """Over HTTP: may a request steer away from a behaviour?"""
    allow_experts: bool = False
    """Over HTTP: may a request list experts, or choose their number or what their weights are made of?"""
    max_strength: Annotated[float, Field(ge=0, le=MAX_WEIGHT)] = 2.0
    """Over HTTP: the largest strength that a request may name, in either direction."""
    base_model: str | None = None
    """The model is a fine-tune of this one, whose rankings may be used if they have its shape."""
    lock: str | None = None
    """Path of a lock file: only the rankings that it pins may be used."""
    profiles: dict[Slug, str] = Field(default_factory=dict)
    """Name -> request text: profiles that requests may name as `@NAME`, resolved once, at start. Whatever
    `allow_reverse` and `allow_experts` say, any caller may use them."""
    manage: Annotated[str, Field(pattern=r"^(?:env:[A-Za-z_][A-Za-z0-9_]*|file:.+)$")] | None = None
    """Who may list, load, replace and drop profiles over HTTP while serving: whoever has the key in the
    environment variable of `env:NAME` or in the file of `file:PATH`. None: nobody. The key itself never stands
    here, since vLLM logs its configuration."""
    profile_store: str | None = None
    """Path of a file that keeps the profiles loaded over HTTP: over restarts, and for all front-end processes
    that share it. None: they live in the memory of the one front-end process."""
    external_routing: bool = False
    """Have vLLM take MoE kernels that leave the selection of experts to its router, where its first choice selects by
    itself. Unsteered requests are then as of a vLLM with those kernels."""
    count_groups: Annotated[int, Field(ge=0, le=1024)] = 0
    """Groups of tokens whose routing is counted; 0 leaves counting out of the model."""


def read_settings(additional_config: object) -> Settings:
    """The settings in vLLM's `additional_config`.

    Raises:
        ConfigurationError: an unknown key or a value of the wrong type, named; or no dict at all.
    """
    if not isinstance(additional_config, Mapping):
        if additional_config:
            raise ConfigurationError(
                f"additional_config is a {type(additional_config).__name__}, in which {KEY!r} cannot be looked up; "
                "give a dict"
            )
        additional_config = {}
    section = additional_config.get(KEY, {})
    try:
        return Settings.model_validate(section)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or KEY
        known = ", ".join(Settings.model_fields)
        raise ConfigurationError(
            f"additional_config {KEY!r}, {where!r}: {first['msg']}; known settings: {known}"
        ) from None
