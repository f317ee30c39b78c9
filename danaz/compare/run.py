"""Run all cells of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from danaz.compare.cells import Comparison
from danaz.compare.display import make_display
from danaz.compare.folder import ComparisonFolder
from danaz.compare.live import run_live
from danaz.compare.machine import cores
from danaz.compare.pool import Pool
from danaz.compare.results import ComparisonOutcome, Result, read_outcome


@dataclass
class CompletedCall:
    """What one call of run_comparison did."""

    outcome: ComparisonOutcome
    kept: int  # cells that earlier calls had finished
    interrupted: bool  # whether Ctrl-C ended it


def run_comparison(comparison: Comparison, path: Path, jobs: int | None = None, fresh: bool = False) -> CompletedCall:
    """Run the cells that are not finished: first the live ones, one by one, then the simulated ones in parallel.

    ``jobs`` is the largest number of simulations at a time; default: one per core. ``fresh`` runs finished cells again.
    Raises ComparisonError if the folder ``path`` cannot be used; also UnreadableError and OSError.
    """
    folder = ComparisonFolder(path, has_fresh=True)
    with folder.opened_for(comparison, fresh):
        todo = [cell for cell in comparison.cells if not folder.is_finished(cell)]
        failures: dict[str, str] = {}
        with make_display(len(todo)) as display, _interruptible() as interrupt:
            failures |= run_live([cell for cell in todo if cell.cluster], folder, display)
            failures |= Pool([cell for cell in todo if not cell.cluster], folder, jobs or cores(), display).run()
    failed = [
        Result.of(cell.facts(), folder.cell(cell.name), failures[cell.name]) for cell in todo if cell.name in failures
    ]
    return CompletedCall(read_outcome(path, failed), len(comparison.cells) - len(todo), interrupt.came)


@dataclass
class _Interrupt:
    came: bool = False


@contextmanager
def _interruptible() -> Iterator[_Interrupt]:
    interrupt = _Interrupt()
    try:
        yield interrupt
    except KeyboardInterrupt:
        interrupt.came = True
