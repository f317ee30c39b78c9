"""The server's accounts: one record for each update, running totals, and the judgement that a run diverged."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

DIVERGED_LOSS_RATIO = 1000.0


@dataclass(frozen=True)
class Update:
    """One applied update: a line of updates.jsonl."""

    version: int
    worker: int  # in a round, the one that completed it
    lag: int
    lr: tuple[float, ...]  # one a parameter group
    gap: float | None
    gap_of: Literal["parameters", "lookahead"]
    loss: float | None
    batch: int
    round: tuple[tuple[int, int], ...] | None = None  # (worker, batch) of all that took part


@dataclass
class Figures:
    """Totals of a run so far, for summary.json."""

    updates: int = 0
    samples: int = 0
    lags: int = 0
    push_bytes: int = 0  # of the vectors alone, as they travel
    view_bytes: int = 0
    gaps: float = 0.0
    gaps_measured: int = 0
    first_loss: float | None = None
    last_losses: dict[int, float] = field(default_factory=dict)  # worker -> its latest
    refusals: Counter[str] = field(default_factory=Counter)
    reported: dict[str, float | str | None] = field(default_factory=dict)
    started_at: float | None = None
    updated_at: float | None = None

    def count(self, update: Update, samples: int, now: float) -> None:
        self.updates += 1
        self.samples += samples
        self.lags += update.lag
        self.updated_at = now
        if update.gap is not None:
            self.gaps += update.gap
            self.gaps_measured += 1
        if update.loss is not None:
            self.last_losses[update.worker] = update.loss
            if self.first_loss is None:
                self.first_loss = update.loss

    def report(self, figures: dict[str, float | str | None]) -> None:
        """Take over what a training script reports; JSON has no NaN and no infinity."""
        for name, value in figures.items():
            self.reported[name] = None if isinstance(value, float) and not isfinite(value) else value

    def lost_all_bounds(self, loss: float | None) -> bool:
        """Whether this loss means divergence."""
        if loss is None or self.first_loss is None:
            return False
        return loss > DIVERGED_LOSS_RATIO * abs(self.first_loss)

    def summary(self) -> dict[str, Any]:
        seconds = (self.updated_at or 0.0) - (self.started_at or 0.0)
        losses = self.last_losses.values()
        return {
            "updates": self.updates,
            "final_train_loss": sum(losses) / len(losses) if losses else None,
            "push_bytes_per_update": self.push_bytes / self.updates if self.updates else None,
            "view_bytes_per_update": self.view_bytes / self.updates if self.updates else None,
            "mean_lag": self.lags / self.updates if self.updates else None,
            "mean_gap": self.gaps / self.gaps_measured if self.gaps_measured else None,
            "wall_seconds": seconds,
            "updates_per_second": self.updates / seconds if seconds > 0 else None,
            "images_per_second": self.samples / seconds if seconds > 0 else None,
            "refusals": dict(self.refusals),
            **self.reported,
        }
