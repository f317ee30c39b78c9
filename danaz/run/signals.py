"""Notes the signals that ask a process to end, so that it can end in good order."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


def note_ending_signals() -> Callable[[], bool]:
    """Keep SIGTERM and SIGINT from ending this process. Return a function that says whether one of them has come."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return lambda: bool(received)
