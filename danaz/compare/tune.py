"""Run a grid over learning rate and momentum: the search that rules other than DANA need.

This is "Tuned ASGD" of the Gap-Aware paper (Barkai et al., arXiv 1909.10802). Momentum may be negative: asynchrony
itself acts like momentum, and a negative value can offset it (Mitliagkas et al., arXiv 1605.09774).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from danaz.compare.cells import Cell, Comparison
from danaz.compare.display import make_display
from danaz.compare.folder import ComparisonFolder
from danaz.compare.machine import cores
from danaz.compare.pool import Pool
from danaz.compare.results import Measure, measure_of
from danaz.run.config import Config
from danaz.run.folder import read_summary


class GridPoint(Cell):
    """A cell with its own learning rate and momentum."""

    @property
    def name(self) -> str:
        return f"lr{self.config.lr:g}-momentum{self.config.momentum:g}-{super().name}"

    @property
    def variant(self) -> str:
        return f"lr {self.config.lr:g}, momentum {self.config.momentum:g}, "


@dataclass(frozen=True)
class Tuning:
    """The results of a grid: rows are momenta, columns are learning rates."""

    config: Config
    lrs: tuple[float, ...]
    momenta: tuple[float, ...]
    summaries: dict[tuple[float, float], dict[str, Any]]  # (lr, momentum) -> summary.json, of the finished cells
    failures: dict[str, str]  # name of a failed cell -> why it failed

    @property
    def measure(self) -> Measure:
        """The figure by which points are judged."""
        return measure_of(self.summaries.values())

    def figure(self, lr: float, momentum: float) -> float | None:
        """Return the measure at one point; None if its cell failed or diverged without a figure."""
        figure: float | None = self.summaries.get((lr, momentum), {}).get(self.measure.key)
        return figure

    @property
    def best(self) -> tuple[float, float] | None:
        """(lr, momentum) of the point with the smallest figure; None if no point has one."""
        known = [(figure, point) for point in self.summaries if (figure := self.figure(*point)) is not None]
        return min(known)[1] if known else None


def tune(config: Config, lrs: Sequence[float], momenta: Sequence[float], path: Path, jobs: int | None = None) -> Tuning:
    """Simulate ``config`` at every point of the grid. Points that are finished in the folder ``path`` are kept.

    ``jobs`` is the largest number of simulations at a time; default: one per core. Raises ComparisonError if the folder
    cannot be used; also UnreadableError and OSError.
    """
    points = {
        (lr, momentum): GridPoint(config.model_copy(update={"lr": lr, "momentum": momentum}))
        for lr, momentum in product(lrs, momenta)
    }
    folder = ComparisonFolder(path)
    with folder.opened_for(Comparison(config.name, config, tuple(points.values()))):
        todo = [cell for cell in points.values() if not folder.is_finished(cell)]
        with make_display(len(todo)) as display:
            failures = Pool(todo, folder, jobs or cores(), display).run()
    summaries = {
        point: read_summary(folder.cell(cell.name)) for point, cell in points.items() if folder.is_finished(cell)
    }
    return Tuning(config, tuple(lrs), tuple(momenta), summaries, failures)
