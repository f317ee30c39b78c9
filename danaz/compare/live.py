"""Live cells: real processes on real hosts, one cell after the other, so that their times can be compared."""

from __future__ import annotations

import re
from collections.abc import Sequence

from danaz.compare.cells import Cell
from danaz.compare.display import Display
from danaz.compare.folder import ComparisonFolder
from danaz.launch.options import RunOptions
from danaz.launch.prepare import execute, prepare_config
from danaz.run.lock import locked_run_folder
from launcher.logs import quiet

HAS = {"--hosts", "--hostfile", "--workers-per-host", "--collective"}


def run_live(cells: Sequence[Cell], folder: ComparisonFolder, display: Display) -> dict[str, str]:
    """Returns name of cell -> why it failed. To be called from the main thread; Ctrl-C becomes KeyboardInterrupt."""
    failures = {}
    for cell in cells:
        display.started(cell, folder.cell(cell.name) / "updates.jsonl")
        reason = _run(cell, folder, display)
        if reason is not None:
            failures[cell.name] = reason
            display.failed(cell, reason)
    return failures


def _in_words_of_compare(reason: str) -> str:
    """A reason may advise options of `danaz launch`, of which `danaz compare` has a few."""
    if {*re.findall(r"--[a-z][a-z-]+", reason)} <= HAS:
        return reason
    return (
        f"{reason} (These are options of `danaz launch`. `danaz compare` takes users and ports from its hostfile, and "
        "everything else from ~/.ssh/config)"
    )


def _run(cell: Cell, folder: ComparisonFolder, display: Display) -> str | None:
    assert cell.cluster is not None
    run = folder.begin(cell)
    try:
        with locked_run_folder(run):
            # Times are compared, and a restart would count against one of them.
            ready = prepare_config(cell.config, cell.cluster, run, RunOptions(on_worker_failure="stop"))
            outcome, summary = execute(ready, echo=quiet)
    except (ValueError, RuntimeError) as error:  # such hosts or such an algorithm cannot be launched
        return _in_words_of_compare(str(error))
    if outcome.signum is not None:
        raise KeyboardInterrupt
    if summary is not None:
        display.finished(cell, summary)
        return None
    (run / "summary.json").unlink(missing_ok=True)  # a process failed after it was written: do not take it for finished
    if outcome.failure is None:
        return f"ended with exit code {outcome.exit_code}"
    return ": ".join([outcome.failure.reason, *outcome.failure.last_lines[-1:]])
