"""Run live cells: real processes on real hosts.

Live cells run one after another, so that they do not slow each other down and their times can be compared.
"""

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

# The options of `danaz launch` that `danaz compare` has too.
OPTIONS = {"--hosts", "--hostfile", "--workers-per-host", "--collective"}


def run_live(cells: Sequence[Cell], folder: ComparisonFolder, display: Display) -> dict[str, str]:
    """Run ``cells`` one after another. Returns {name of a failed cell: why it failed}.

    Call it from the main thread: it handles Ctrl-C, and then raises KeyboardInterrupt.
    """
    failures = {}
    for cell in cells:
        display.started(cell, folder.cell(cell.name) / "updates.jsonl")
        reason = _run(cell, folder, display)
        if reason is not None:
            failures[cell.name] = reason
            display.failed(cell, reason)
    return failures


def in_words_of_compare(reason: str) -> str:
    """Return ``reason``, with a note if it advises options of `danaz launch` that `danaz compare` does not have."""
    if {*re.findall(r"--[a-z][a-z-]+", reason)} <= OPTIONS:
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
            # A restart would lengthen the time of one algorithm, and times are compared.
            ready = prepare_config(cell.config, cell.cluster, run, RunOptions(on_worker_failure="stop"))
            outcome, summary = execute(ready, echo=quiet)
    except (ValueError, RuntimeError) as error:  # these hosts or this algorithm cannot be launched
        return in_words_of_compare(str(error))
    if outcome.signum is not None:
        raise KeyboardInterrupt
    if summary is not None:
        display.finished(cell, summary)
        return None
    (run / "summary.json").unlink(missing_ok=True)  # written before a process failed: the cell is not finished
    if outcome.failure is None:
        return f"ended with exit code {outcome.exit_code}"
    return ": ".join([outcome.failure.reason, *outcome.failure.last_lines[-1:]])
