"""The runs of a comparison as figures: one result a cell, and cells that differ in their seed alone as one group."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from danaz.files.reading import UnreadableError, read_yaml
from danaz.run.folder import read_summary

SHOWN_ARGUMENT = 16  # characters of a schedule's argument


class Setting(NamedTuple):
    """How cells are run: what a reader compares algorithms within."""

    workers: int
    ranks_per_worker: int
    schedule: str  # live, or that of the simulation

    @property
    def is_live(self) -> bool:
        return self.schedule == "live"

    @property
    def is_baseline(self) -> bool:
        return self.workers == 1 and not self.is_live

    @property
    def label(self) -> str:
        """As tables say it."""
        if self.is_live:
            return f"live {self.workers}×{self.ranks_per_worker}"
        return "one worker" if self.is_baseline else f"simulated {self.workers}, {self.order}"

    @property
    def title(self) -> str:
        """As charts say it."""
        if self.is_live:
            ranks = f"{self.ranks_per_worker} rank{'s' * (self.ranks_per_worker > 1)}"
            return f"live: {self.workers} workers × {ranks}"
        return "one worker" if self.is_baseline else f"{self.workers} simulated workers, {self.order}"

    @property
    def order(self) -> str:
        """The schedule; of a long argument, such as a path, only the end."""
        name, _, argument = self.schedule.partition(":")
        return f"{name}:…{argument[-SHOWN_ARGUMENT:]}" if len(argument) > SHOWN_ARGUMENT else self.schedule


@dataclass(frozen=True)
class Result:
    """One cell: its summary, or why there is none."""

    algorithm: str
    setting: Setting
    seed: int
    folder: Path
    summary: Mapping[str, Any]
    failure: str | None = None

    @classmethod
    def of(cls, facts: Mapping[str, Any], folder: Path, failure: str | None = None) -> Result:
        """``facts`` is a summary, or of a failed cell what is known without one."""
        setting = Setting(facts["workers"], facts["ranks_per_worker"], facts["schedule"])
        return cls(facts["algorithm"], setting, facts["seed"], folder, {} if failure else facts, failure)

    @property
    def diverged(self) -> bool:
        return bool(self.summary.get("diverged"))


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a figure over seeds."""

    mean: float
    std: float | None  # None: a single seed

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
        """Of a figure of the summaries; None where no cell has it."""
        values = [result.summary.get(key) for result in self.results]
        numbers = [float(value) for value in values if value is not None and isfinite(value)]
        if not numbers:
            return None
        return Spread(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None)


class Measure(NamedTuple):
    """The figure by which a comparison judges."""

    key: str  # of summary.json
    label: str
    decimals: int


TEST_ERROR = Measure("test_error_percent", "test error (%)", 2)
TRAIN_LOSS = Measure("final_train_loss", "final training loss", 4)


def measure_of(results: Iterable[Result]) -> Measure:
    """The test error, where the workload has one."""
    has_error = any(result.summary.get(TEST_ERROR.key) is not None for result in results)
    return TEST_ERROR if has_error else TRAIN_LOSS


def group(results: Iterable[Result]) -> list[Group]:
    """Group by algorithm and setting, settings together, in order of first appearance."""
    settings: dict[Setting, dict[str, list[Result]]] = {}
    for result in results:
        settings.setdefault(result.setting, {}).setdefault(result.algorithm, []).append(result)
    return [
        Group(algorithm, setting, tuple(members))
        for setting, algorithms in settings.items()
        for algorithm, members in algorithms.items()
    ]


@dataclass(frozen=True)
class Outcome:
    """What a comparison came to, so far."""

    folder: Path
    config: Mapping[str, Any]  # what all cells have in common
    results: Sequence[Result]
    pending: Sequence[str]  # names of cells that were not run yet, or not to their end

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.failure is None]

    @property
    def failed(self) -> list[Result]:
        return [result for result in self.results if result.failure is not None]


def read_outcome(folder: Path, failed: Sequence[Result] = ()) -> Outcome:
    """Read the folder of a comparison: all its cells, also those of earlier calls; ``failed`` are added to them.

    Raises UnreadableError.
    """
    config, names = read_index(folder / "comparison.yaml")
    failures = {result.folder.name: result for result in failed}
    results, pending = [], []
    for name in names:
        cell = folder / "cells" / name
        if name in failures:
            results.append(failures[name])
        elif (cell / "summary.json").exists():
            results.append(_result(cell))
        else:
            pending.append(name)
    return Outcome(folder, config, results, pending)


def read_index(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What all cells of a comparison have in common, and the names of the cells. Raises UnreadableError."""
    index = read_yaml(path)
    config, names = index.get("config"), index.get("cells")
    if not isinstance(config, dict) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnreadableError(path, "a comparison has the keys config, with keys and values, and cells, with names")
    return config, names


def _result(cell: Path) -> Result:
    try:
        return Result.of(read_summary(cell), cell)
    except (KeyError, TypeError) as error:
        why = f"it is no summary of a run ({error!r}); delete it, and the same command runs this cell again"
        raise UnreadableError(cell / "summary.json", why) from None
