"""What benchmarks of several processes share: they are forked, speak through pipes, and are ended together."""

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

# Children inherit the imports; the parent has computed nothing, so no thread of torch's is lost in the fork.
CONTEXT = multiprocessing.get_context("fork")
PATIENCE_S = 300.0  # with a process that starts, or counts


class Processes:
    """Started within a block, and killed at its end with all that they have started."""

    def __init__(self) -> None:
        self.all: list[ForkProcess] = []

    def start(self, target: Callable[..., None], *arguments: Any) -> Connection:
        """``target(*arguments, pipe)`` in a process of its own; returns the pipe's other end."""
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
    """What the process at the other end says next. Raises TimeoutError."""
    if not pipe.poll(PATIENCE_S):
        raise TimeoutError("a server or worker did not answer")
    return pipe.recv()


def cpu_s(processes: Iterable[ForkProcess]) -> float:
    """User and system time of processes and of all below them."""
    times = [each.cpu_times() for each in _with_descendants(processes)]
    return sum(t.user + t.system for t in times)


def resident_bytes(processes: Iterable[ForkProcess]) -> int:
    """Memory of processes and of all below them."""
    return sum(each.memory_info().rss for each in _with_descendants(processes))


def _with_descendants(processes: Iterable[ForkProcess]) -> list[psutil.Process]:
    parents = [psutil.Process(process.pid) for process in processes]
    return [*parents, *(child for parent in parents for child in parent.children(recursive=True))]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """A table with the keys of the first row as its head."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
