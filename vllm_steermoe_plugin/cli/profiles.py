"""`steermoe profiles`: list, load and drop the profiles of a running server, as its operator."""

from __future__ import annotations

import json
import os
import urllib.parse
from pathlib import Path
from typing import Annotated, Any

import typer

from expert_registry.errors import ConfigurationError, EngineError, UsageError
from vllm_steermoe_plugin.steering.profile import MAX_TEXT

KEY_VARIABLE = "STEERMOE_MANAGE_KEY"
TIMEOUT_SECONDS = 60.0

profiles = typer.Typer(
    no_args_is_help=True, help=f"Profiles of a running server; the operator's key is read from ${KEY_VARIABLE}."
)
Server = Annotated[str, typer.Option(help="Base URL of the server.")]
LOCAL = "http://localhost:8000"


@profiles.command("list")
def list_profiles(server: Server = LOCAL) -> None:
    """All loaded profiles, as JSON."""
    typer.echo(json.dumps(call(server, "GET", "profiles"), indent=1))


@profiles.command()
def show(name: str, server: Server = LOCAL) -> None:
    """One profile with its experts, as JSON."""
    typer.echo(json.dumps(call(server, "GET", f"profiles/{quoted(name)}"), indent=1))


@profiles.command()
def load(
    name: str,
    text: Annotated[str, typer.Argument(help="As a request writes it; @FILE reads it from a file.")],
    server: Server = LOCAL,
) -> None:
    """Load or replace a profile."""
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read {text[1:]}: {error}") from None
    if len(text) > MAX_TEXT:
        raise UsageError(f"the profile has {len(text)} characters; at most {MAX_TEXT}")
    answer = call(server, "PUT", f"profiles/{quoted(name)}", text.encode())
    numbers = ", ".join(f"{answer[what]} {what}" for what in ("activated", "deactivated", "biased"))
    typer.echo(f"{answer['name']}: {numbers}")


@profiles.command()
def drop(name: str, server: Server = LOCAL) -> None:
    """Drop a profile."""
    typer.echo(f"{call(server, 'DELETE', f'profiles/{quoted(name)}')['name']}: dropped")


@profiles.command()
def refresh(server: Server = LOCAL) -> None:
    """Have the server look its rankings up anew."""
    call(server, "POST", "rankings/refresh")
    typer.echo("rankings are looked up anew")


def quoted(name: str) -> str:
    """A name as one segment of a URL."""
    return urllib.parse.quote(name, safe="")


def call(server: str, method: str, path: str, body: bytes | None = None) -> Any:
    """The server's answer.

    Raises:
        ConfigurationError: there is no key.
        EngineError: the server cannot be reached, or it refuses; with its reason.
    """
    import httpx

    key = os.environ.get(KEY_VARIABLE)
    if not key:
        raise ConfigurationError(f"set {KEY_VARIABLE} to the operator's key of the server")
    url = f"{server.rstrip('/')}/steermoe/{path}"
    try:
        # The key must not follow a redirection to another host.
        reply = httpx.request(
            method,
            url,
            content=body,
            headers={"Authorization": f"Bearer {key}"},
            timeout=TIMEOUT_SECONDS,
            follow_redirects=False,
        )
        if reply.is_success:
            return reply.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise EngineError(f"{url} cannot be reached: {error}") from None
    try:
        text = reply.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        text = reply.text[:200] + ("; is the setting 'manage' on?" if reply.status_code == 404 else "")
    raise EngineError(f"{method} {url}: status {reply.status_code}: {text}")
