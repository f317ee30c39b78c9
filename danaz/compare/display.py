"""Progress of a comparison: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
)
from rich.text import Text

from danaz.compare.cells import Cell
from danaz.compare.results import TEST_ERROR, Result, measure_of
from danaz.compare.tables import accuracy, figure
from danaz.run.units import duration

PLAIN_EVERY_S = 30.0  # least time between two progress lines of one cell, without a terminal


class Display(Protocol):
    """Shows the user what happens to the cells of a comparison."""

    def started(self, cell: Cell, updates: Path | None = None) -> None:
        """Show a cell that begins. If it does not call ``progressed``, ``updates`` grows by a line per update."""

    def progressed(self, cell: Cell, share: float, loss: float | None) -> None: ...

    def finished(self, cell: Cell, summary: Mapping[str, Any]) -> None: ...

    def failed(self, cell: Cell, reason: str) -> None: ...


def make_display(cells: int) -> AbstractContextManager[Display]:
    """Return the display for ``cells`` cells that are still to run."""
    console = Console(stderr=True)
    return Bars(cells, console) if console.is_terminal else nullcontext(Lines(cells))


def describe(cell: Cell) -> str:
    """Return the algorithm, setting and seed of a cell, in one line."""
    setting = Result.of(cell.facts(), Path()).setting
    return f"{cell.config.algorithm}, {cell.variant}{setting.label}, seed {cell.config.seed}"


def outcome(cell: Cell, summary: Mapping[str, Any]) -> str:
    """Return the figures of a finished cell, in one line."""
    result = Result.of(summary, Path())
    measure = measure_of([summary])
    value = summary.get(measure.key)
    good = f"accuracy {accuracy(value)} %" if measure is TEST_ERROR else f"{measure.label} {figure(value)}"
    diverged = ", diverged" if result.diverged else ""
    return f"{describe(cell)}: {good}{diverged}, {duration(summary['wall_seconds'])}"


class OverallProgress:
    """How many cells have ended, and how long the others will take at the same speed."""

    def __init__(self, cells: int):
        self.cells, self.ended = cells, 0
        self.running: dict[str, float] = {}  # name of a running cell -> share that is done, from 0 to 1
        self.began_s = time.monotonic()

    def end(self, cell: Cell) -> None:
        self.running.pop(cell.name, None)
        self.ended += 1

    @property
    def done(self) -> float:
        """Cells that are done; a running cell counts by its share."""
        return self.ended + sum(self.running.values())

    @property
    def left_s(self) -> float | None:
        """Estimated time until all cells are done; None as long as nothing is known."""
        if self.done == 0:
            return None
        return (time.monotonic() - self.began_s) * (self.cells - self.done) / self.done


class Lines:
    """Without a terminal: prints a line when a cell starts and when it ends, and now and then one while it runs."""

    def __init__(self, cells: int):
        self.overall = OverallProgress(cells)
        self._printed_s: dict[str, float] = {}  # name of a cell -> time of its last line

    def started(self, cell: Cell, updates: Path | None = None) -> None:
        self._printed_s[cell.name] = time.monotonic()
        self.overall.running[cell.name] = 0.0
        self._print(f"{describe(cell)} …")

    def progressed(self, cell: Cell, share: float, loss: float | None) -> None:
        self.overall.running[cell.name] = share
        if time.monotonic() - self._printed_s[cell.name] > PLAIN_EVERY_S:
            self._printed_s[cell.name] = time.monotonic()
            self._print(f"{describe(cell)}: {share:.0%}, loss {figure(loss)}{self._left()}")

    def finished(self, cell: Cell, summary: Mapping[str, Any]) -> None:
        self.overall.end(cell)
        self._print(f"{outcome(cell, summary)}{self._left()}")

    def failed(self, cell: Cell, reason: str) -> None:
        self.overall.end(cell)
        self._print(f"{describe(cell)}: FAILED, {reason}{self._left()}")

    def _left(self) -> str:
        left_s = self.overall.left_s
        return f"; about {duration(left_s)} to go" if left_s else ""

    def _print(self, text: str) -> None:
        print(f"[{self.overall.ended}/{self.overall.cells}] {text}", file=sys.stderr, flush=True)


class Bars(AbstractContextManager["Bars"]):
    """On a terminal: one bar for all cells and one for each running cell; above them, a line for each ended cell."""

    def __init__(self, cells: int, console: Console):
        self.overall = OverallProgress(cells)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            _Detail(self.overall),
            console=console,
            transient=True,
        )
        self._overall_task = self.progress.add_task(f"{cells} cells", total=cells)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, cell: Cell, updates: Path | None = None) -> None:
        self.overall.running[cell.name] = 0.0
        total = None if updates else 1.0  # None: the bar moves without showing a share
        self._tasks[cell.name] = self.progress.add_task(f"  {describe(cell)}", total=total, updates=updates)

    def progressed(self, cell: Cell, share: float, loss: float | None) -> None:
        self.overall.running[cell.name] = share
        self.progress.update(self._tasks[cell.name], completed=share, loss=loss)
        self.progress.update(self._overall_task, completed=self.overall.done)

    def finished(self, cell: Cell, summary: Mapping[str, Any]) -> None:
        self._end(cell, Text(f"✓ {outcome(cell, summary)}", "yellow" if summary.get("diverged") else "green"))

    def failed(self, cell: Cell, reason: str) -> None:
        self._end(cell, Text(f"✗ {describe(cell)}: {reason}", "bold red"))

    def _end(self, cell: Cell, line: Text) -> None:
        self.overall.end(cell)
        self.progress.remove_task(self._tasks.pop(cell.name))
        self.progress.update(self._overall_task, completed=self.overall.done)
        self.progress.console.print(line)


class _Detail(ProgressColumn):
    """The text after a bar: the time to go for all cells; the loss of a simulated cell; the updates of a live one."""

    def __init__(self, overall: OverallProgress):
        super().__init__()
        self.overall = overall

    def render(self, task: Task) -> Text:
        if "updates" not in task.fields:
            left_s = self.overall.left_s
            return Text(f"{duration(left_s)} to go" if left_s else "", "cyan")
        if task.fields["updates"] is None:
            return Text(f"loss {figure(task.fields.get('loss'))}")
        return Text(f"{_count_lines(task.fields['updates'])} updates, {duration(task.elapsed or 0.0)}")


def _count_lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
