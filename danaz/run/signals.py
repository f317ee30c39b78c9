"""Signals that ask a process to end, noted so that it can end in good order."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


def note_ending_signals() -> Callable[[], bool]:
    """From now on SIGTERM and SIGINT end nothing; what is returned says whether one has come."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return lambda: bool(received)
