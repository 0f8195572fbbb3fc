"""Fetch one file whose size and sha256 are known beforehand, and go on where an earlier try was cut off."""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from expert_registry.errors import SteerMoEError

TIMEOUT = 30.0
"""Seconds without a byte after which a connection is given up."""
MAX_SECONDS = 900.0
"""For one file, however many bytes still trickle in."""
_CHUNK = 1 << 16
_RANGE = re.compile(r"bytes ([0-9]{1,15})-[0-9]{1,15}/[0-9*]{1,15}")


class DownloadError(SteerMoEError):
    """A file could not be fetched, or is not the one that was expected."""

    code = "STEERMOE-E203"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https down to http."""

    max_redirections = 5

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new != "https" and (old, new) != ("http", "http"):
            raise DownloadError(f"{req.full_url} leads on to {newurl[:200]}, which is not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


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
    have = os.fstat(file.fileno()).st_size
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    opener = urllib.request.build_opener(_Redirects)
    give_up = time.monotonic() + MAX_SECONDS
    try:
        with opener.open(request, timeout=timeout) as response:
            if have and not _goes_on_at(response, have):
                advance(-have)
                file.truncate(0)
                have = 0
            while have < size and time.monotonic() < give_up:
                chunk = response.read(min(_CHUNK, size - have))
                if not chunk:
                    break
                file.write(chunk)
                file.flush()
                have += len(chunk)
                advance(len(chunk))
            more = have == size and response.read(1)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            file.truncate(0)
            raise DownloadError(f"{url} is shorter than its beginning that was kept; run the command again") from None
        raise DownloadError(f"{url}: the server answers {error.code} {str(error.reason)[:80]}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise DownloadError(
            f"cannot fetch {url}: {str(reason)[:200] or type(error).__name__}; {have} of {size} bytes are kept, run "
            "the command again to go on. With the files at hand, `steermoe registry import DIR` needs no network"
        ) from None
    if have < size:
        raise DownloadError(f"{url} was cut off after {have} of {size} bytes; run the command again to go on")
    if more:
        file.truncate(0)
        raise DownloadError(f"{url} is longer than the {size} bytes that the index says; nothing was stored")


def _goes_on_at(response: Any, have: int) -> bool:
    """Whether the server sends what follows after `have` bytes, and not the whole file again."""
    match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return response.status == http.client.PARTIAL_CONTENT and match is not None and int(match[1]) == have
