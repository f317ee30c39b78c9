"""One server at a time writes a run folder."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import BinaryIO

LOCK = ".server.lock"
WAIT_S = 20.0  # the server of a launcher that was killed may take its grace to end
POLL_S = 0.05


class RunLockedError(RuntimeError):
    """Another server is at work."""


def lock_run(run: Path, wait_s: float = WAIT_S) -> BinaryIO:
    """Wait until no other server writes ``run``, and keep others away as long as the returned file is open.

    The kernel closes it with the process, however that ends. Raises RunLockedError.
    """
    file = (run / LOCK).open("ab")
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise RunLockedError(
                    f"another server writes {run}; end that run first, or choose another folder"
                ) from None
            time.sleep(POLL_S)
        else:
            return file
