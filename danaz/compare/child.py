"""A process that simulates one cell after the other: `python -m danaz.compare.child`, started by the pool.

Folders of cells, each with its config.yaml, come as lines on stdin; what goes out on stdout are lines of JSON:
``{"share": 0.5, "loss": 0.1}`` now and then, ``{"peak_bytes": …}`` when a cell is finished. A cell that fails ends the
process, with the traceback in the cell's log, and before that with ``{"failed": "the reason"}``: the log's disk may be
full.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

LOGS = Path("logs", "localhost", "simulation")
TELL_EVERY_S = 0.2


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business, and its end is ours
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        try:
            _log_to(folder / LOGS)
            _simulate(folder, answers)
        except (ValueError, RuntimeError, OSError) as error:
            _tell(answers, failed=str(error))
            raise
        _tell(answers, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _simulate(folder: Path, answers: TextIO) -> None:
    from danaz.run.config import load_config
    from danaz.run.lock import locked_run_folder
    from danaz.simulate.simulator import simulate

    told_at = 0.0

    def tell_progress(share: float, loss: float | None) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > TELL_EVERY_S:
            told_at = time.monotonic()
            _tell(answers, share=share, loss=loss)  # raises when the parent is gone, which ends this process too

    with locked_run_folder(folder):
        simulate(load_config(folder / "config.yaml", ["threads=1"]), folder, tell_progress)


def _log_to(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)


def _tell(answers: TextIO, **message: float | str | None) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
