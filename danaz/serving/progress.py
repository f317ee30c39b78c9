"""Tells people who watch a live run how far it is, with a sentence from time to time, less often in a long run."""

from __future__ import annotations

import time
from collections.abc import Callable

from danaz.run.units import duration
from danaz.server.core import ServerCore
from danaz.server.records import Update

FIRST_S = 5.0  # wait for the first sentence; each wait is twice the one before
LONGEST_S = 60.0  # the longest wait


class ProgressMeter:
    """Sums up the updates between two sentences. ``now`` is in seconds on any monotonic clock."""

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None  # when the first update came, and at which epoch
        self._wait_s = FIRST_S
        self._start_over(0.0)

    def _start_over(self, now: float) -> None:
        self._since = now
        self._updates = self._samples = self._lags = 0
        self._losses: list[float] = []

    def add(self, update: Update, epoch: float, epochs: int, now: float) -> str | None:
        """Add an update, made at ``epoch`` of ``epochs``. Return a sentence if one is due."""
        if self._began is None:
            self._began = (now, epoch)
            self._start_over(now)
            return None
        self._updates += 1
        self._samples += update.samples
        self._lags += update.lag
        if update.loss is not None:
            self._losses.append(update.loss)
        if now - self._since < self._wait_s or epoch >= epochs:
            return None
        sentence = self._sentence(epoch, epochs, now)
        self._wait_s = min(2 * self._wait_s, LONGEST_S)
        self._start_over(now)
        return sentence

    def _sentence(self, epoch: float, epochs: int, now: float) -> str:
        assert self._began is not None
        since, first_epoch = self._began
        parts = [f"epoch {epoch:.1f} of {epochs}"]
        if self._losses:
            parts.append(f"loss {sum(self._losses) / len(self._losses):.4g}")
        parts.append(f"{self._samples / (now - self._since):,.0f} samples/s")
        parts.append(f"lag {self._lags / self._updates:.1f}")
        if epoch > first_epoch:
            left_s = (epochs - epoch) * (now - since) / (epoch - first_epoch)
            parts.append(f"about {duration(left_s)} to go")
        return ", ".join(parts)


def with_progress(core: ServerCore, record: Callable[[Update], None]) -> Callable[[Update], None]:
    """Return a function that calls ``record``, and prints from time to time how far the run of ``core`` is."""
    meter = ProgressMeter()

    def note(update: Update) -> None:
        record(update)
        sentence = meter.add(update, core.leases.epoch, core.job.plan.epochs, time.monotonic())
        if sentence is not None:
            print(sentence, flush=True)

    return note
