"""Keep vLLM's start-up chatter out of the demo's terminal: it goes to a log instead."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def stderr_to(log: Path) -> Iterator[None]:
    """Append what this process writes to standard error, C++ libraries included, to `log`.

    If the block fails, the end of the log is shown, so that nothing is hidden.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
            yield
    except BaseException:
        os.write(saved, b"".join(log.read_bytes().splitlines(keepends=True)[-30:]))
        raise
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
