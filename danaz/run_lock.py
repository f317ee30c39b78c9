"""One server at a time writes a run folder."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

LOCK = ".server.lock"
WAIT_S = 20.0  # the server of a launcher that was killed may take its grace to end
POLL_S = 0.05


class RunLockedError(RuntimeError):
    """Another server is at work."""


def lock_run(run: Path, wait_s: float = WAIT_S, shard: int = 0) -> int:
    """Wait until no other server of this shard writes ``run``, and keep others away until this process ends somehow.

    Returns the descriptor that holds the lock. Raises RunLockedError.
    """
    fd = os.open(run / (f"{LOCK}.{shard}" if shard else LOCK), os.O_WRONLY | os.O_CREAT, 0o644)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(fd)
                raise RunLockedError(f"another server writes {run}; end that run, or choose another folder") from None
            time.sleep(POLL_S)
        else:
            return fd
