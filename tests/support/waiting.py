"""How tests wait: for a condition, and for the end of a process; neither waits for ever."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable

DEADLINE_S = 200.0  # What is awaited takes seconds, but many processes may share the machine.


def until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Wait until the condition holds; ``what`` names it in the failure."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {what}"
        time.sleep(0.02)


def ended(process: subprocess.Popen[str], deadline_s: float = DEADLINE_S) -> str:
    """All that a process printed until its end; one that does not end in time is interrupted, and the test fails."""
    try:
        return process.communicate(timeout=deadline_s)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        raise AssertionError(f"not within {deadline_s:g} s: {process.communicate()[0]}") from None
