"""Progress of a comparison: bars on a terminal, plain lines where there is none."""

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

PLAIN_EVERY_S = 30.0


class Display(Protocol):
    """What is told to the user while cells run."""

    def started(self, cell: Cell, updates: Path | None = None) -> None:
        """``updates``: a file that grows by a line for each update, of a cell that tells no progress itself."""

    def progressed(self, cell: Cell, share: float, loss: float | None) -> None: ...

    def finished(self, cell: Cell, summary: Mapping[str, Any]) -> None: ...

    def failed(self, cell: Cell, reason: str) -> None: ...


def make_display(cells: int) -> AbstractContextManager[Display]:
    """The display for so many cells that are still to run."""
    console = Console(stderr=True)
    return Bars(cells, console) if console.is_terminal else nullcontext(Lines(cells))


def describe(cell: Cell) -> str:
    setting = Result.of(cell.facts(), Path()).setting
    return f"{cell.config.algorithm}, {cell.variant}{setting.label}, seed {cell.config.seed}"


def outcome(cell: Cell, summary: Mapping[str, Any]) -> str:
    """A finished cell in a line."""
    result = Result.of(summary, Path())
    measure = measure_of([result])
    value = summary.get(measure.key)
    good = f"accuracy {accuracy(value)} %" if measure is TEST_ERROR else f"{measure.label} {figure(value)}"
    diverged = ", diverged" if result.diverged else ""
    return f"{describe(cell)}: {good}{diverged}, {duration(summary['wall_seconds'])}"


class Pace:
    """How much is done of so many cells, and how long the rest will take if it goes on like this."""

    def __init__(self, cells: int):
        self.cells, self.ended = cells, 0
        self.running: dict[str, float] = {}  # name of cell -> share done
        self.began_s = time.monotonic()

    def end(self, cell: Cell) -> None:
        self.running.pop(cell.name, None)
        self.ended += 1

    @property
    def done(self) -> float:
        return self.ended + sum(self.running.values())

    @property
    def left_s(self) -> float | None:
        if self.done == 0:
            return None
        return (time.monotonic() - self.began_s) * (self.cells - self.done) / self.done


class Lines:
    """Where there is no terminal: a line for each cell that starts and ends, and now and then one for a long one."""

    def __init__(self, cells: int):
        self.pace = Pace(cells)
        self._said_s: dict[str, float] = {}

    def started(self, cell: Cell, updates: Path | None = None) -> None:
        self._said_s[cell.name] = time.monotonic()
        self.pace.running[cell.name] = 0.0
        self._say(f"{describe(cell)} …")

    def progressed(self, cell: Cell, share: float, loss: float | None) -> None:
        self.pace.running[cell.name] = share
        if time.monotonic() - self._said_s[cell.name] > PLAIN_EVERY_S:
            self._said_s[cell.name] = time.monotonic()
            self._say(f"{describe(cell)}: {share:.0%}, loss {figure(loss)}{self._left()}")

    def finished(self, cell: Cell, summary: Mapping[str, Any]) -> None:
        self.pace.end(cell)
        self._say(f"{outcome(cell, summary)}{self._left()}")

    def failed(self, cell: Cell, reason: str) -> None:
        self.pace.end(cell)
        self._say(f"{describe(cell)}: FAILED, {reason}{self._left()}")

    def _left(self) -> str:
        left_s = self.pace.left_s
        return f"; about {duration(left_s)} to go" if left_s else ""

    def _say(self, text: str) -> None:
        print(f"[{self.pace.ended}/{self.pace.cells}] {text}", file=sys.stderr, flush=True)


class Bars(AbstractContextManager["Bars"]):
    """On a terminal: a bar over all cells, one for each that runs, and a line above them for each that has ended."""

    def __init__(self, cells: int, console: Console):
        self.pace = Pace(cells)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            _Detail(self.pace),
            console=console,
            transient=True,
        )
        self._overall = self.progress.add_task(f"{cells} cells", total=cells)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def started(self, cell: Cell, updates: Path | None = None) -> None:
        self.pace.running[cell.name] = 0.0
        total = None if updates else 1.0  # None: a bar that only shows that something is going on
        self._tasks[cell.name] = self.progress.add_task(f"  {describe(cell)}", total=total, updates=updates)

    def progressed(self, cell: Cell, share: float, loss: float | None) -> None:
        self.pace.running[cell.name] = share
        self.progress.update(self._tasks[cell.name], completed=share, loss=loss)
        self.progress.update(self._overall, completed=self.pace.done)

    def finished(self, cell: Cell, summary: Mapping[str, Any]) -> None:
        self._end(cell, Text(f"✓ {outcome(cell, summary)}", "yellow" if summary.get("diverged") else "green"))

    def failed(self, cell: Cell, reason: str) -> None:
        self._end(cell, Text(f"✗ {describe(cell)}: {reason}", "bold red"))

    def _end(self, cell: Cell, line: Text) -> None:
        self.pace.end(cell)
        self.progress.remove_task(self._tasks.pop(cell.name))
        self.progress.update(self._overall, completed=self.pace.done)
        self.progress.console.print(line)


class _Detail(ProgressColumn):
    """Behind each bar: of all cells the time to go, of a simulated one its loss, of a live one its updates so far."""

    def __init__(self, pace: Pace):
        super().__init__()
        self.pace = pace

    def render(self, task: Task) -> Text:
        if "updates" not in task.fields:
            left_s = self.pace.left_s
            return Text(f"{duration(left_s)} to go" if left_s else "", "cyan")
        if task.fields["updates"] is None:
            return Text(f"loss {figure(task.fields.get('loss'))}")
        return Text(f"{_count_lines(task.fields['updates'])} updates, {duration(task.elapsed or 0.0)}")


def _count_lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0
