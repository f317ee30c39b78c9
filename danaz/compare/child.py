"""A process that simulates one cell after another. The pool starts it as `python -m danaz.compare.child`.

It reads folders of cells from stdin, one per line; each folder holds a config.yaml. It writes JSON to stdout, one
object per line: ``{"share": 0.5, "loss": 0.1}`` now and then, and ``{"peak_bytes": …}`` when a cell is finished. If a
cell fails, it writes ``{"failed": "the reason"}`` and ends, with the traceback in the cell's log. The reason is
sent too because the disk of the log may be full.
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

LOGS = Path("logs", "localhost", "simulation")  # in the folder of a cell
REPORT_EVERY_S = 0.2


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and then ends this process
    messages = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        try:
            _log_to(folder / LOGS)
            _simulate(folder, messages)
        except (ValueError, RuntimeError, OSError) as error:
            _send(messages, failed=str(error))
            raise
        _send(messages, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _simulate(folder: Path, messages: TextIO) -> None:
    from danaz.run.config import load_config
    from danaz.run.lock import locked_run_folder
    from danaz.simulate.simulator import simulate

    sent_at = 0.0

    def report_progress(share: float, loss: float | None) -> None:
        nonlocal sent_at
        if time.monotonic() - sent_at > REPORT_EVERY_S:
            sent_at = time.monotonic()
            _send(messages, share=share, loss=loss)  # raises if the parent has ended, which ends this process too

    with locked_run_folder(folder):
        simulate(load_config(folder / "config.yaml", ["threads=1"]), folder, report_progress)


def _log_to(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)


def _send(messages: TextIO, **message: float | str | None) -> None:
    messages.write(json.dumps(message) + "\n")
    messages.flush()


if __name__ == "__main__":
    main()
