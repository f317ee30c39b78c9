"""Run simulated cells in parallel: one process with one thread per cell, as many as cores and memory allow."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danaz.compare.cells import Cell
from danaz.compare.child import LOGS
from danaz.compare.display import Display
from danaz.compare.folder import ComparisonFolder
from danaz.compare.machine import available_bytes, resident_bytes
from danaz.run.folder import read_summary
from launcher.start import module_command

FIRST_GUESS_BYTES = 1 << 30  # memory of a cell, until the first finished one has shown how much it needs
CHECK_MEMORY_EVERY_S = 1.0  # other programs may have released some
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Child:
    """A process that simulates cells, and the cell that it simulates now."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            module_command("danaz.compare.child"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **ONE_THREAD},
        )
        self.cell: Cell | None = None
        self.failure = ""  # why the cell failed, as the process has reported it
        self._rest = b""  # the last piece of its output, which has no newline yet

    def begin(self, cell: Cell, folder: Path) -> None:
        assert self.process.stdin is not None
        self.cell = cell
        self.process.stdin.write(f"{folder.resolve()}\n".encode())
        self.process.stdin.flush()

    def read(self) -> list[dict[str, Any]] | None:
        """Wait until there is something to read. Return the messages that have come; None if the process has ended."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def wait(self) -> int:
        """Close its stdin, which ends the process, and wait for it. Returns its exit status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


class Pool:
    """Runs ``cells`` in at most ``jobs`` processes at a time."""

    def __init__(self, cells: Sequence[Cell], folder: ComparisonFolder, jobs: int, display: Display):
        self.waiting = deque(cells)
        self.folder, self.jobs, self.display = folder, jobs, display
        self.children: list[Child] = []
        self.failures: dict[str, str] = {}  # name of a failed cell -> why it failed
        self.need_bytes = 0  # peak memory of the largest cell so far; 0 before the first has finished
        self.selector = selectors.DefaultSelector()

    def run(self) -> dict[str, str]:
        """Run all cells. Returns {name of a failed cell: why it failed}. KeyboardInterrupt ends all processes."""
        try:
            self._fill()
            while self._busy():
                for key, _ in self.selector.select(CHECK_MEMORY_EVERY_S):
                    self._receive(key.data)
                self._fill()
        finally:
            for child in list(self.children):
                child.process.terminate()
                self._drop(child)
            self.selector.close()
        return self.failures

    def _busy(self) -> list[Child]:
        return [child for child in self.children if child.cell is not None]

    def _fill(self) -> None:
        """Give waiting cells to idle processes, and start processes while there is room."""
        while self.waiting:
            child = next((child for child in self.children if child.cell is None), None)
            if child is None and (len(self.children) >= self.jobs or not self.has_room()):
                return
            child = child or self._new_child()
            cell = self.waiting.popleft()
            self.display.started(cell)
            child.begin(cell, self.folder.begin(cell))

    def has_room(self) -> bool:
        """Return whether memory suffices for one more process, once those that run have taken all that they need.

        The first process always has room.
        """
        need = self.need_bytes or FIRST_GUESS_BYTES
        still_to_come = sum(max(0, need - resident_bytes(child.process.pid)) for child in self.children)
        return not self.children or available_bytes() - still_to_come > need

    def _new_child(self) -> Child:
        child = Child()
        self.children.append(child)
        self.selector.register(child.process.stdout, selectors.EVENT_READ, child)  # type: ignore[arg-type]
        return child

    def _receive(self, child: Child) -> None:
        messages = child.read()
        if messages is None:
            cell, status = child.cell, self._drop(child)
            assert cell is not None  # an idle process waits for its next cell and does not end
            self.failures[cell.name] = reason = child.failure or self._reason(cell, status)
            (self.folder.cell(cell.name) / "summary.json").unlink(missing_ok=True)  # the cell is not finished
            self.display.failed(cell, reason)
            return
        for message in messages:
            self._handle(child, message)

    def _handle(self, child: Child, message: dict[str, Any]) -> None:
        assert child.cell is not None
        if "peak_bytes" in message:
            self.need_bytes = max(self.need_bytes, message["peak_bytes"])
            self.display.finished(child.cell, read_summary(self.folder.cell(child.cell.name)))
            child.cell = None
        elif "failed" in message:
            child.failure = message["failed"]
        else:
            self.display.progressed(child.cell, message["share"], message["loss"])

    def _drop(self, child: Child) -> int:
        self.selector.unregister(child.process.stdout)  # type: ignore[arg-type]
        self.children.remove(child)
        return child.wait()

    def _reason(self, cell: Cell, status: int) -> str:
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        log = self.folder.cell(cell.name) / LOGS / "stderr"
        text = log.read_text(errors="replace") if log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else f"ended with exit code {status}"
