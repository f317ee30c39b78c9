"""What the server records: each update, and the totals of a run, which show whether it has diverged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from statistics import median_high, median_low
from typing import Any, Literal

from danaz.protocol.messages import NOTHING_SPENT, UNKNOWN_MACHINE, Machine, Spent

DIVERGED_LOSS_RATIO = 1000.0


@dataclass(frozen=True)
class Update:
    """One applied update: a line of updates.jsonl."""

    version: int
    worker: int  # in a round, the last worker of it
    lag: int
    lr: tuple[float, ...]  # one for each parameter group
    gap: float | None  # with several shards, the gap of the worker's previous update, which is known only now
    gap_of: Literal["parameters", "lookahead"]
    loss: float | None
    batch: int
    round: tuple[tuple[int, int], ...] | None = None  # (worker, batch) of each worker that took part
    samples: int = 0
    earlier: tuple[int, ...] = ()  # batches of the local steps before the push
    incarnation: int = 0  # the worker's incarnation; with request, it identifies the push after a restart
    request: int = 0
    life: int = 0  # the server's life
    seconds: float | None = None  # since training began, without the time during which no server ran


@dataclass
class WorkerTotals:
    """What one worker has done in a run so far, over all its processes."""

    machine: Machine = UNKNOWN_MACHINE  # that of its newest process
    processes: int = 0  # number of its processes that joined
    updates: int = 0  # number of its applied pushes
    samples: int = 0
    refused_pushes: int = 0
    lags: Counter[int] = field(default_factory=Counter)  # lag -> number of its pushes with this lag
    gaps: float = 0.0
    gaps_measured: int = 0
    push_bytes: int = 0
    view_bytes: int = 0
    spent: Spent = NOTHING_SPENT  # by its newest process
    spent_before: Spent = NOTHING_SPENT  # by its earlier processes

    def enter(self, machine: Machine) -> None:
        """Note that a new process of the worker has joined, on ``machine``."""
        self.machine, self.processes = machine, self.processes + 1
        self.spent_before, self.spent = added(self.spent_before, self.spent), NOTHING_SPENT

    def count(self, samples: int, update: Update) -> None:
        """Add a push of ``samples`` samples that was applied in ``update``."""
        self.updates += 1
        self.samples += samples
        self.lags[update.lag] += 1
        if update.gap is not None:
            self.gaps += update.gap
            self.gaps_measured += 1

    def summary(self, seconds: float, updates: int) -> dict[str, Any]:
        """Return the figures that summary.json shows. The run took ``seconds``, and all workers made ``updates``."""
        spent = added(self.spent_before, self.spent)
        return {
            **asdict(self.machine),
            "updates": self.updates,
            "share_of_updates": self.updates / updates if updates else None,
            "samples": self.samples,
            "samples_per_second": self.samples / seconds if seconds > 0 else None,
            "median_lag": median_low(self.lags.elements()) if self.lags else None,
            "max_lag": max(self.lags, default=None),
            "mean_gap": self.gaps / self.gaps_measured if self.gaps_measured else None,
            **{f"{name}_seconds": value for name, value in asdict(spent).items()},
            "push_bytes": self.push_bytes,
            "view_bytes": self.view_bytes,
            "restarts": max(0, self.processes - 1),
            "refused_pushes": self.refused_pushes,
        }

    def facts(self) -> dict[str, Any]:
        """Return all values as JSON has them."""
        return {**asdict(self), "lags": sorted(self.lags.items())}

    @classmethod
    def restored(cls, facts: Mapping[str, Any]) -> WorkerTotals:
        """Return the totals that ``facts`` returned."""
        parts = {"machine": Machine(**facts["machine"]), "lags": Counter(dict(facts["lags"]))}
        parts |= {name: Spent(**facts[name]) for name in ("spent", "spent_before")}
        return cls(**{**facts, **parts})


def added(first: Spent, second: Spent) -> Spent:
    """Return the sum of what two processes have spent."""
    return Spent(*(one + other for one, other in zip(vars(first).values(), vars(second).values(), strict=True)))


@dataclass
class RunTotals:
    """The totals of a run so far, for summary.json."""

    updates: int = 0
    samples: int = 0
    lags: int = 0
    push_bytes: int = 0  # bytes of the pushed vectors, as they travel
    view_bytes: int = 0  # bytes of the views
    gaps: float = 0.0
    gaps_measured: int = 0
    first_losses: dict[int, float] = field(default_factory=dict)  # worker -> the first loss of any of its processes
    last_losses: dict[int, float] = field(default_factory=dict)  # worker -> its latest loss
    refusals: Counter[str] = field(default_factory=Counter)
    reported: dict[str, float | str | None] = field(default_factory=dict)
    started_at: float | None = None
    updated_at: float | None = None
    restarts: int = 0  # restarts of the server
    lost_updates: int = 0  # updates that were applied, and then lost in a restart
    skipped_batches: int = 0  # batches without a step, because the script or its GradScaler skipped it
    of_workers: dict[int, WorkerTotals] = field(default_factory=dict)  # by worker

    def of(self, worker: int) -> WorkerTotals:
        """The totals of one worker."""
        return self.of_workers.setdefault(worker, WorkerTotals())

    def count(self, update: Update, now: float) -> None:
        """Add an update to the totals. Its loss is added by ``hear_loss``."""
        self.updates += 1
        self.samples += update.samples
        self.lags += update.lag
        self.updated_at = now
        if update.gap is not None:
            self.gaps += update.gap
            self.gaps_measured += 1

    def hear_loss(self, worker: int, loss: float) -> None:
        """Remember the loss that came with an applied push of ``worker``."""
        self.first_losses.setdefault(worker, loss)
        self.last_losses[worker] = loss

    def add_reported(self, figures: dict[str, float | str | None]) -> None:
        """Add what a script reports. JSON has no NaN and no infinity, so both become None."""
        for name, value in figures.items():
            self.reported[name] = None if isinstance(value, float) and not isfinite(value) else value

    def divergence(self, workers: Iterable[int]) -> str:
        """Return why the losses of ``workers``, who take part, show divergence; an empty text if they do not.

        The median of their latest losses is compared with the median of their first losses, so one worker among several
        cannot end the run alone. With an even number of workers, both losses in the middle must be that large. A worker
        whose first loss is zero does not count.
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
        """Seconds from the start to the last update, without the time during which no server ran."""
        return self.seconds_at(self.updated_at or 0.0)

    def seconds_at(self, now: float) -> float:
        """Return the seconds from the start to ``now``, without the time during which no server ran."""
        return now - (self.started_at or 0.0)

    def facts(self) -> dict[str, Any]:
        """Return all totals as JSON has them. Another process has another clock, so the times become a duration."""
        losses = {name: list(getattr(self, name).items()) for name in ("first_losses", "last_losses")}
        workers = [[worker, totals.facts()] for worker, totals in self.of_workers.items()]
        values = {**vars(self), **losses, "of_workers": workers, "seconds": self.seconds}
        return {name: value for name, value in values.items() if name not in ("started_at", "updated_at")}

    @classmethod
    def restored(cls, facts: Mapping[str, Any], now: float) -> RunTotals:
        """Return totals with the values that ``facts`` returned."""
        values = dict(facts)
        started_at = now - values.pop("seconds")
        last, refusals = dict(values.pop("last_losses")), Counter(values.pop("refusals"))
        # A checkpoint of an earlier version holds only the first loss of the run.
        first_of_run = values.pop("first_loss", None)
        before = dict.fromkeys(last, first_of_run) if first_of_run is not None else {}
        first = dict(values.pop("first_losses", before))
        values |= {"first_losses": first, "last_losses": last, "refusals": refusals}
        # A checkpoint of an earlier version has no totals of single workers.
        workers = values.pop("of_workers", ())
        values["of_workers"] = {worker: WorkerTotals.restored(totals) for worker, totals in workers}
        return cls(**values, started_at=started_at, updated_at=now)

    def summary(self) -> dict[str, Any]:
        """Return the totals and means that summary.json shows."""
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
            "per_worker": {
                str(worker): totals.summary(seconds, self.updates) for worker, totals in sorted(self.of_workers.items())
            },
        }


def mean(losses: Collection[float]) -> float | None:
    """Return the mean of ``losses``, which is finite if they are; None if there are none."""
    return sum(loss / len(losses) for loss in losses) if losses else None
