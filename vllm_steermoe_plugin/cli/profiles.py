"""`steermoe profiles`: list, load and drop the profiles of a running server, as its operator."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
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
    typer.echo(f"{answer['name']}: {answer['activated']} activated, {answer['deactivated']} deactivated")


@profiles.command()
def drop(name: str, server: Server = LOCAL) -> None:
    """Drop a profile."""
    typer.echo(f"{call(server, 'DELETE', f'profiles/{quoted(name)}')['name']}: dropped")


@profiles.command()
def refresh(server: Server = LOCAL) -> None:
    """Have the server look its rankings up anew."""
    call(server, "POST", "rankings/refresh")
    typer.echo("rankings are looked up anew")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Answers a redirection as an error: the key must not follow it to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        """No request is made."""
        return None


def quoted(name: str) -> str:
    """A name as one segment of a URL."""
    return urllib.parse.quote(name, safe="")


def call(server: str, method: str, path: str, body: bytes | None = None) -> Any:
    """The server's answer.

    Raises:
        ConfigurationError: there is no key.
        EngineError: the server cannot be reached, or it refuses; with its reason.
    """
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        raise ConfigurationError(f"set {KEY_VARIABLE} to the operator's key of the server")
    url = f"{server.rstrip('/')}/steermoe/{path}"
    try:
        request = urllib.request.Request(url, body, {"Authorization": f"Bearer {key}"}, method=method)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_SECONDS) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        text = error.read(1 << 16).decode(errors="replace")
        try:
            text = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            text = f"{text[:200]}; is the setting 'manage' on?" if error.code == 404 else text[:200]
        raise EngineError(f"{method} {url}: status {error.code}: {text}") from None
    except (OSError, ValueError) as error:
        raise EngineError(f"{url} cannot be reached: {error}") from None
