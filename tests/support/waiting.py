"""How tests wait for a condition, or for the end of a process. Neither waits for ever."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

DEADLINE_S = 200.0  # The awaited things take seconds, but many processes may share the machine.


def until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until the condition holds; ``what`` names it in the failure."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], deadline_s: float = DEADLINE_S) -> str:
    """Return all that a process printed until its end. If it does not end in time, interrupt it and fail the test."""
    try:
        return process.communicate(timeout=deadline_s)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        raise AssertionError(f"not within {deadline_s:g} s: {process.communicate()[0]}") from None
