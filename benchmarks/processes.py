"""What benchmarks with several processes share: processes are forked, talk through pipes, and are killed together."""

from __future__ import annotations

import csv
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

# Children inherit the imports. The parent has computed nothing, so torch has no threads that a fork would lose.
CONTEXT = multiprocessing.get_context("fork")
PATIENCE_S = 300.0  # longest time to wait for a message


class Processes:
    """Processes that are started within a block; at its end they are killed, with all their descendants."""

    def __init__(self) -> None:
        self.all: list[ForkProcess] = []

    def start(self, target: Callable[..., None], *arguments: Any) -> Connection:
        """Call ``target(*arguments, pipe)`` in a new process. Returns the other end of the pipe."""
        here, there = CONTEXT.Pipe()
        self.all.append(CONTEXT.Process(target=target, args=(*arguments, there), daemon=True))
        self.all[-1].start()
        return here

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in _with_descendants(self.all):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        for process in self.all:
            process.join()


def hear(pipe: Connection) -> Any:
    """Return the next message from the process at the other end. Raises TimeoutError after PATIENCE_S."""
    if not pipe.poll(PATIENCE_S):
        raise TimeoutError("a server or worker did not answer")
    return pipe.recv()


def cpu_s(processes: Iterable[ForkProcess]) -> float:
    """Return the user plus system time of processes and of all their descendants, in seconds."""
    times = [each.cpu_times() for each in _with_descendants(processes)]
    return sum(t.user + t.system for t in times)


def resident_bytes(processes: Iterable[ForkProcess]) -> int:
    """Return the resident memory of processes and of all their descendants."""
    return sum(each.memory_info().rss for each in _with_descendants(processes))


def _with_descendants(processes: Iterable[ForkProcess]) -> list[psutil.Process]:
    parents = [psutil.Process(process.pid) for process in processes]
    return [*parents, *(child for parent in parents for child in parent.children(recursive=True))]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as CSV, with the keys of the first row as titles."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
