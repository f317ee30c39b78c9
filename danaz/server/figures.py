"""The server's accounts: one record for each update, running totals, and the judgement that a run diverged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from statistics import median_high, median_low
from typing import Any, Literal

DIVERGED_LOSS_RATIO = 1000.0


@dataclass(frozen=True)
class Update:
    """One applied update: a line of updates.jsonl."""

    version: int
    worker: int  # in a round, the one that completed it
    lag: int
    lr: tuple[float, ...]  # one a parameter group
    gap: float | None  # with several shards, that of the worker's update before, which is known only now
    gap_of: Literal["parameters", "lookahead"]
    loss: float | None
    batch: int
    round: tuple[tuple[int, int], ...] | None = None  # (worker, batch) of all that took part
    samples: int = 0
    earlier: tuple[int, ...] = ()  # batches of local steps that the push told of
    incarnation: int = 0  # of the worker, and the number of its push: what was applied is known after a restart
    request: int = 0
    life: int = 0  # of the server


@dataclass
class RunTotals:
    """Totals of a run so far, for summary.json."""

    updates: int = 0
    samples: int = 0
    lags: int = 0
    push_bytes: int = 0  # of the vectors alone, as they travel
    view_bytes: int = 0
    gaps: float = 0.0
    gaps_measured: int = 0
    first_losses: dict[int, float] = field(default_factory=dict)  # worker -> its first, whatever process it was
    last_losses: dict[int, float] = field(default_factory=dict)  # worker -> its latest
    refusals: Counter[str] = field(default_factory=Counter)
    reported: dict[str, float | str | None] = field(default_factory=dict)
    started_at: float | None = None
    updated_at: float | None = None
    restarts: int = 0  # of the server
    lost_updates: int = 0  # that a restart took back
    skipped_batches: int = 0  # that made no step, because a script or its GradScaler said so

    def count(self, update: Update, now: float) -> None:
        self.updates += 1
        self.samples += update.samples
        self.lags += update.lag
        self.updated_at = now
        if update.gap is not None:
            self.gaps += update.gap
            self.gaps_measured += 1

    def hear_loss(self, worker: int, loss: float) -> None:
        """Take note of the loss of one worker's push that was applied."""
        self.first_losses.setdefault(worker, loss)
        self.last_losses[worker] = loss

    def report(self, figures: dict[str, float | str | None]) -> None:
        """Take over what a script reports, beside the server's own figures; JSON has no NaN and no infinity."""
        for name, value in figures.items():
            self.reported[name] = None if isinstance(value, float) and not isfinite(value) else value

    def divergence(self, workers: Iterable[int]) -> str:
        """Why the losses of these workers, those that take part, mean that training has diverged, or nothing.

        The median of their latest is compared with the median of their first: no worker alone can end a run of
        several. Of an even number, the two in the middle must both say so. A first loss of zero is no measure.
        """
        measures = [worker for worker in workers if self.first_losses.get(worker)]
        if not measures:
            return ""
        first = median_high(abs(self.first_losses[worker]) for worker in measures)
        latest = median_low(self.last_losses[worker] for worker in measures)
        if latest <= DIVERGED_LOSS_RATIO * first:
            return ""
        return f"the loss rose to {latest:.4g}, over {DIVERGED_LOSS_RATIO:.0f} times the first"

    @property
    def seconds(self) -> float:
        """From the start to the last update; the time without a server does not count."""
        return (self.updated_at or 0.0) - (self.started_at or 0.0)

    def facts(self) -> dict[str, Any]:
        """Everything as JSON has it. Clocks do not outlive a process, durations do."""
        losses = {name: list(getattr(self, name).items()) for name in ("first_losses", "last_losses")}
        values = {**vars(self), **losses, "seconds": self.seconds}
        return {name: value for name, value in values.items() if name not in ("started_at", "updated_at")}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], now: float) -> RunTotals:
        """The inverse of facts."""
        values = dict(facts)
        started_at = now - values.pop("seconds")
        last, refusals = dict(values.pop("last_losses")), Counter(values.pop("refusals"))
        # Checkpoints of earlier versions hold the first loss of the run alone.
        first_of_run = values.pop("first_loss", None)
        before = dict.fromkeys(last, first_of_run) if first_of_run is not None else {}
        first = dict(values.pop("first_losses", before))
        values |= {"first_losses": first, "last_losses": last, "refusals": refusals}
        return cls(**values, started_at=started_at, updated_at=now)

    def summary(self) -> dict[str, Any]:
        seconds = self.seconds
        return {
            "updates": self.updates,
            "final_train_loss": mean(self.last_losses.values()),
            "push_bytes_per_update": self.push_bytes / self.updates if self.updates else None,
            "view_bytes_per_update": self.view_bytes / self.updates if self.updates else None,
            "mean_lag": self.lags / self.updates if self.updates else None,
            "mean_gap": self.gaps / self.gaps_measured if self.gaps_measured else None,
            "wall_seconds": seconds,
            "updates_per_second": self.updates / seconds if seconds > 0 else None,
            "images_per_second": self.samples / seconds if seconds > 0 else None,
            "refusals": dict(self.refusals),
            "restarts": self.restarts,
            "lost_updates": self.lost_updates,
            "skipped_batches": self.skipped_batches,
            "reported": dict(self.reported),
        }


def mean(losses: Collection[float]) -> float | None:
    """Their mean, which is finite if they are; None if there are none."""
    return sum(loss / len(losses) for loss in losses) if losses else None
