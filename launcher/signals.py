"""Notes signals so that a loop can handle them when it is ready, instead of being interrupted anywhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

__all__ = ["ENDING_SIGNALS", "NotedSignals", "noted_signals"]

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class NotedSignals:
    """The signals received so far. `wakeup_fd` becomes readable when a new one arrives."""

    def __init__(self, wakeup_fd: int) -> None:
        self.wakeup_fd = wakeup_fd
        self.received: list[signal.Signals] = []

    def rest(self) -> None:
        """Empty `wakeup_fd`, so that it becomes readable at the next signal."""
        os.read(self.wakeup_fd, 4096)

    def take(self) -> list[signal.Signals]:
        """Return the signals received since the last call."""
        taken, self.received = self.received, []
        return taken


@contextmanager
def noted_signals(*signums: signal.Signals) -> Iterator[NotedSignals]:
    """Note these signals. One that is ignored (`nohup`) stays ignored. Raises ValueError outside the main thread."""
    wakeup_fd, signal_fd = os.pipe()
    for fd in (wakeup_fd, signal_fd):
        os.set_blocking(fd, False)
    noted = NotedSignals(wakeup_fd)
    with ExitStack() as undo:
        undo.callback(os.close, wakeup_fd)
        undo.callback(os.close, signal_fd)
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(signal_fd, warn_on_full_buffer=False))
        for signum in signums:
            previous = signal.getsignal(signum)
            if previous != signal.SIG_IGN:
                signal.signal(signum, lambda got, _frame: noted.received.append(signal.Signals(got)))
                undo.callback(signal.signal, signum, previous)
        yield noted
