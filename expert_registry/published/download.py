"""Fetch one file whose size and sha256 are known beforehand, and go on where an earlier try was cut off."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

from expert_registry.errors import SteerMoEError

if TYPE_CHECKING:
    import httpx

TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""
MAX_SECONDS = 900.0
"""For one file, however many bytes still trickle in."""
_RANGE = re.compile(r"bytes ([0-9]{1,15})-[0-9]{1,15}/[0-9*]{1,15}")


class DownloadError(SteerMoEError):
    """A file could not be fetched, or is not the one that was expected."""

    code = "STEERMOE-E203"


def download(
    url: str,
    part: Path,
    *,
    size: int,
    sha256: str,
    advance: Callable[[int], None] = lambda _: None,
    timeout: float = TIMEOUT,
) -> bytes:
    """The bytes of a file.

    Args:
        url: http or https.
        part: where an unfinished file is kept. Two processes may use the same; one waits for the other.
        size: of the file in bytes; not one more is read.
        sha256: of the file.
        advance: is called with the number of bytes that have come in since the last call.
        timeout: see TIMEOUT.

    Raises:
        DownloadError: not reachable, cut off (what came is kept), or not the expected file (nothing is kept).
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url[:200]} is not an http or https address")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            have = os.fstat(file.fileno()).st_size
            if have > size:
                file.truncate(0)
                have = 0
            advance(have)
            if have < size:
                _fetch(url, file, size, advance, timeout)
            # Read through the open file: another process that waited for it may have stored and removed it.
            file.seek(0)
            data = file.read(size)
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DownloadError(f"cannot fetch {url} into {part}: {error.strerror or error}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise DownloadError(
            f"{url} is not the expected file: its sha256 is {found}, the index says {sha256}; nothing was stored"
        )
    return data


def _fetch(url: str, file: IO[bytes], size: int, advance: Callable[[int], None], timeout: float) -> None:
    """Append what is missing of `size` bytes to an open file."""
    # A third of a command's start, and few commands need it.
    import httpx

    def check(request: httpx.Request) -> None:
        if url.startswith("https:") and request.url.scheme != "https":
            raise DownloadError(f"{url} leads on to {str(request.url)[:200]}, which is not followed")

    have, more = os.fstat(file.fileno()).st_size, False
    give_up = time.monotonic() + MAX_SECONDS
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    options: Any = {"event_hooks": {"request": [check]}, "follow_redirects": True, "max_redirects": 5}
    # A server may close the connection behind a redirect; what follows goes through a new one.
    options["limits"] = httpx.Limits(max_keepalive_connections=0)
    try:
        with (
            httpx.Client(timeout=timeout, **options) as client,
            client.stream("GET", url, headers=headers) as response,
        ):
            if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and have:
                file.truncate(0)
                raise DownloadError(f"{url} is shorter than its beginning that was kept; run the command again")
            if not response.is_success:
                raise DownloadError(f"{url}: the server answers {response.status_code} {response.reason_phrase[:80]}")
            if have and not _goes_on_at(response, have):
                advance(-have)
                file.truncate(0)
                have = 0
            for chunk in response.iter_raw():
                part, more = chunk[: size - have], len(chunk) > size - have
                file.write(part)
                file.flush()
                have += len(part)
                advance(len(part))
                if more or time.monotonic() >= give_up:
                    break
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise DownloadError(
            f"cannot fetch {url}: {str(error)[:200] or type(error).__name__}; {have} of {size} bytes are kept, run "
            "the command again to go on. With the files at hand, `steermoe registry import DIR` needs no network"
        ) from None
    if more:
        file.truncate(0)
        raise DownloadError(f"{url} is longer than the {size} bytes that the index says; nothing was stored")
    if have < size:
        raise DownloadError(f"{url} was cut off after {have} of {size} bytes; run the command again to go on")


def _goes_on_at(response: httpx.Response, have: int) -> bool:
    """Whether the server sends what follows after `have` bytes, and not the whole file again."""
    match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return response.status_code == HTTPStatus.PARTIAL_CONTENT and match is not None and int(match[1]) == have
