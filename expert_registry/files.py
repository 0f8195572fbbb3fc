"""Bounded reading and atomic writing of small files."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from expert_registry.errors import FileError


def is_folder(path: Path) -> bool:
    """Whether there is a folder that can be looked at; a name that no path can be is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_bounded(path: Path, limit: int, *, head: bool = False, inside: Path | None = None) -> bytes:
    """The bytes of a regular file, of which no more than `limit` are ever read.

    Args:
        path: the file.
        limit: in bytes; a longer file is refused.
        head: give the first `limit` bytes of a longer file instead of refusing it.
        inside: a folder in which the file must really lie, links resolved.

    Raises:
        FileError: it cannot be read, is no regular file, too large, or a link out of `inside`.
    """
    try:
        if inside is not None and not path.resolve(strict=True).is_relative_to(inside.resolve()):
            raise FileError(f"{path} is a link out of the registry folder {inside}; copy the file instead")
        # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FileError(f"cannot read {path}: it is not a regular file")
            data = file.read(limit if head else limit + 1)
    except FileError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        # RuntimeError: a ring of links. ValueError: a null byte in the path.
        raise FileError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > limit:
        raise FileError(f"{path} is larger than the {limit} bytes that such a file may have")
    return data


def write_atomic(path: Path, data: bytes, *, overwrite: bool) -> None:
    """Write a file so that a reader sees the whole of it or nothing, whoever else writes.

    Raises:
        FileExistsError: the file exists and `overwrite` is not given.
        FileError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        if overwrite:
            temporary.replace(path)
        else:
            # A hard link fails if the name is taken, so two writers cannot both win.
            os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
