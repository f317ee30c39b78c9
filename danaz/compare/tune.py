"""A grid over learning rate and momentum: what users of other rules than DANA have to search.

It is the Gap-Aware paper's "Tuned ASGD" (Barkai et al., arXiv 1909.10802). Momentum may be negative: asynchrony has a
momentum of its own, which that can offset (Mitliagkas et al., arXiv 1605.09774).
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
from danaz.run.config import Config
from danaz.run.folder import read_summary


class GridPoint(Cell):
    """A run at one learning rate and momentum."""

    @property
    def name(self) -> str:
        return f"lr{self.config.lr:g}-momentum{self.config.momentum:g}-{super().name}"

    @property
    def variant(self) -> str:
        return f"lr {self.config.lr:g}, momentum {self.config.momentum:g}, "


@dataclass(frozen=True)
class Tuning:
    """What the grid gave: a figure for each momentum (row) and learning rate (column), None where a cell failed."""

    config: Config
    lrs: tuple[float, ...]
    momenta: tuple[float, ...]
    summaries: dict[tuple[float, float], dict[str, Any]]  # (lr, momentum) -> summary.json
    failures: dict[str, str]

    @property
    def measure(self) -> str:
        """The test error, or the training loss of a workload that has none."""
        errors = [summary["test_error_percent"] for summary in self.summaries.values()]
        return "test_error_percent" if any(error is not None for error in errors) else "final_train_loss"

    def figure(self, lr: float, momentum: float) -> float | None:
        figure: float | None = self.summaries.get((lr, momentum), {}).get(self.measure)
        return figure

    @property
    def best(self) -> tuple[float, float] | None:
        """(lr, momentum) of the smallest figure."""
        known = [(figure, point) for point in self.summaries if (figure := self.figure(*point)) is not None]
        return min(known)[1] if known else None


def tune(config: Config, lrs: Sequence[float], momenta: Sequence[float], path: Path, jobs: int | None = None) -> Tuning:
    """Simulate ``config`` at every point of the grid; finished points in the folder ``path`` are kept.

    Raises ComparisonError when the folder cannot be used.
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
