"""The figures of a comparison: one result per cell, and one group for all cells that differ only in their seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from danaz.compare.index import CELLS, read_index
from danaz.files.reading import UnreadableError
from danaz.run.folder import read_summary

LIVE = "live"  # the schedule of live runs in summary.json
SHOWN_ARGUMENT = 16  # characters of a schedule's argument that are shown


class Setting(NamedTuple):
    """How cells are run. Algorithms are compared with each other within one setting."""

    workers: int
    ranks_per_worker: int
    schedule: str  # the config key of a simulated cell; "live" for a live one

    @property
    def is_live(self) -> bool:
        return self.schedule == LIVE

    @property
    def is_baseline(self) -> bool:
        return self.workers == 1 and not self.is_live

    @property
    def label(self) -> str:
        """The name in tables."""
        if self.is_live:
            return f"live {self.workers}×{self.ranks_per_worker}"
        return "one worker" if self.is_baseline else f"simulated {self.workers}, {self.order}"

    @property
    def title(self) -> str:
        """The name in charts."""
        if self.is_live:
            return f"live: {self.workers} workers × {_ranks(self.ranks_per_worker)}"
        return "one worker" if self.is_baseline else f"{self.workers} simulated workers, {self.order}"

    @property
    def order(self) -> str:
        """The schedule; only the end of a long argument, such as a path."""
        name, _, argument = self.schedule.partition(":")
        return f"{name}:…{argument[-SHOWN_ARGUMENT:]}" if len(argument) > SHOWN_ARGUMENT else self.schedule


def _ranks(count: int) -> str:
    return f"{count} rank{'s' * (count > 1)}"


@dataclass(frozen=True)
class Result:
    """One cell: its summary, or why it failed."""

    algorithm: str
    setting: Setting
    seed: int
    folder: Path
    summary: Mapping[str, Any]
    failure: str | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any], folder: Path, failure: str | None = None) -> Result:
        """Make a result of a cell's summary, or of the ``facts`` that are known without one if the cell failed."""
        setting = Setting(facts["workers"], facts["ranks_per_worker"], facts["schedule"])
        return cls(facts["algorithm"], setting, facts["seed"], folder, {} if failure else facts, failure)

    @property
    def diverged(self) -> bool:
        return bool(self.summary.get("diverged"))


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a figure over seeds."""

    mean: float
    std: float | None  # None if there is a single seed

    def text(self, decimals: int) -> str:
        mean = f"{self.mean:.{decimals}f}"
        return mean if self.std is None else f"{mean} ± {self.std:.{decimals}f}"


@dataclass(frozen=True)
class Group:
    """The cells of one algorithm in one setting."""

    algorithm: str
    setting: Setting
    results: tuple[Result, ...]

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.failure is None]

    @property
    def diverged(self) -> int:
        return sum(result.diverged for result in self.results)

    def spread(self, key: str) -> Spread | None:
        """Return the spread of the figure ``key``; None if no cell has it. Infinities and NaN are left out."""
        values = [result.summary.get(key) for result in self.results]
        numbers = [float(value) for value in values if value is not None and isfinite(value)]
        if not numbers:
            return None
        return Spread(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


class Measure(NamedTuple):
    """The figure by which runs are judged; the smaller, the better."""

    key: str  # in summary.json
    label: str
    decimals: int


TEST_ERROR = Measure("test_error_percent", "test error (%)", 2)
TEST_LOSS = Measure("test_loss", "test loss", 4)
TRAIN_LOSS = Measure("final_train_loss", "final training loss", 4)
BITS_PER = "test_bits_per_"  # with what the bits are counted for, such as "character", the key of a figure


def measure_of(summaries: Iterable[Mapping[str, Any]]) -> Measure:
    """Return the first of these that a summary has: bits per something, test error, test loss, final training loss."""
    known = {key for summary in summaries for key, value in summary.items() if value is not None}
    for key in sorted(known):
        if key.startswith(BITS_PER):
            return Measure(key, key.replace("_", " "), 3)
    return next((measure for measure in (TEST_ERROR, TEST_LOSS) if measure.key in known), TRAIN_LOSS)


def group(results: Iterable[Result]) -> list[Group]:
    """Group results by algorithm and setting. Groups of one setting follow each other, in order of first appearance."""
    settings: dict[Setting, dict[str, list[Result]]] = {}
    for result in results:
        settings.setdefault(result.setting, {}).setdefault(result.algorithm, []).append(result)
    return [
        Group(algorithm, setting, tuple(members))
        for setting, algorithms in settings.items()
        for algorithm, members in algorithms.items()
    ]


def by_setting(groups: Iterable[Group]) -> dict[Setting, list[Group]]:
    """Return the groups of each setting: algorithms that were run in the same way."""
    settings: dict[Setting, list[Group]] = {}
    for each in groups:
        settings.setdefault(each.setting, []).append(each)
    return settings


class Kind(NamedTuple):
    """A setting without its number of workers."""

    ranks_per_worker: int
    schedule: str

    @property
    def is_live(self) -> bool:
        return self.schedule == LIVE

    @property
    def label(self) -> str:
        return f"live, {_ranks(self.ranks_per_worker)} per worker" if self.is_live else self.schedule


def by_kind(groups: Iterable[Group]) -> dict[Kind, list[Group]]:
    """Return the groups of each kind: they differ only in algorithm and number of workers."""
    kinds: dict[Kind, list[Group]] = {}
    for each in groups:
        kinds.setdefault(Kind(each.setting.ranks_per_worker, each.setting.schedule), []).append(each)
    return kinds


@dataclass(frozen=True)
class ComparisonOutcome:
    """The results of a comparison so far."""

    folder: Path
    config: Mapping[str, Any]  # shared by all cells
    results: Sequence[Result]
    pending: Sequence[str]  # names of the cells that are not finished and have not failed

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.failure is None]

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.failure is not None]

    @property
    def measure(self) -> Measure:
        """The figure by which this comparison judges."""
        return measure_of(result.summary for result in self.results)


def read_outcome(folder: Path, failed: Sequence[Result] = ()) -> ComparisonOutcome:
    """Read all cells in the folder of a comparison, those of earlier calls too. ``failed`` has the cells that failed.

    Raises UnreadableError.
    """
    config, names = read_index(folder)
    failures = {result.folder.name: result for result in failed}
    results, pending = [], []
    for name in names:
        cell = folder / CELLS / name
        if name in failures:
            results.append(failures[name])
        elif (cell / "summary.json").exists():
            results.append(_result(cell))
        else:
            pending.append(name)
    return ComparisonOutcome(folder, config, results, pending)


def _result(cell: Path) -> Result:
    try:
        return Result.of(read_summary(cell), cell)
    except (KeyError, TypeError) as error:
        why = f"it is not the summary of a run ({error!r}); delete it, and the same command runs this cell again"
        raise UnreadableError(cell / "summary.json", why) from None
