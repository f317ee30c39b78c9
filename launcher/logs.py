"""Where the output of a run goes: to `<run>/logs/<host>/<process>/stdout` and `stderr` as it was written, and to the
terminal line by line, each with its process in front: `[host:rank] `."""

from __future__ import annotations

import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TextIO

from launcher.plan import Process

__all__ = ["Echo", "Logs", "Terminal", "quiet"]

Echo = Callable[[Process, str, str], None]  # process, "stdout" or "stderr", one line without its end

NAME = "[A-Za-z0-9_][A-Za-z0-9._-]*"
RETURNED_NAME = re.compile(f"(?:{NAME}/)?{NAME}")
MAX_LINE_BYTES = 8192  # a longer line is shown in pieces
TAIL_LINES = 40
COLOURS = (36, 33, 35, 32, 34, 31)  # cyan, yellow, magenta, green, blue, red


class Line(NamedTuple):
    """A line, and when it began to come."""

    text: str
    at_s: float


class LineSplitter:
    """Bytes in pieces -> whole lines as text. Bytes that are not UTF-8 are shown as escapes."""

    def __init__(self) -> None:
        self._partial = bytearray()

    def feed(self, data: bytes) -> list[str]:
        *lines, rest = (self._partial + data).split(b"\n")
        self._partial = rest
        if len(rest) > MAX_LINE_BYTES:
            lines.append(rest)
            self._partial = bytearray()
        return [_as_text(line) for line in lines]

    def flush(self) -> list[str]:
        """The last line, if it has no end."""
        rest, self._partial = self._partial, bytearray()
        return [_as_text(rest)] if rest else []


def _as_text(line: bytes | bytearray) -> str:
    # A carriage return goes back to the start of the line, as progress bars do: what was written last is what shows.
    return line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "backslashreplace")


class Logs:
    """Keeps what the processes write, and remembers the last lines of each."""

    def __init__(self, run_folder: str | Path, echo: Echo) -> None:
        self.run_folder = Path(run_folder)
        self.echo = echo
        self._splitters: dict[tuple[str, str], LineSplitter] = {}
        self._tails: dict[tuple[str, str], deque[Line]] = {}
        self._incomplete: set[str] = set()  # returned files of which a piece has come

    def folder(self, process: Process) -> Path:
        return self.run_folder / process.log_folder

    def open(self, process: Process) -> None:
        """Make the log files of a process that is about to start. Raises OSError."""
        folder = self.folder(process)
        folder.mkdir(parents=True, exist_ok=True)
        for stream in ("stdout", "stderr"):
            (folder / stream).touch()
            self._splitters[process.name, stream] = LineSplitter()
            self._tails[process.name, stream] = deque(maxlen=TAIL_LINES)

    def write(self, process: Process, stream: str, data: bytes) -> list[str]:
        """Keep and show a piece of output. Returns the lines that it completed. Raises OSError (a full disk)."""
        with (self.folder(process) / stream).open("ab") as file:
            file.write(data)
        return self._show(process, stream, self._splitters[process.name, stream].feed(data))

    def keep_file(self, name: str, data: bytes, last: bool) -> None:
        """Keep a piece of a file that a process returned; with the last piece it appears in the run folder.

        Raises OSError, and ValueError for a name that would lead out of that folder.
        """
        if not RETURNED_NAME.fullmatch(name):
            raise ValueError(f"a process returned a file of the name {name!r}")
        path = self.run_folder / name
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with part.open("ab" if name in self._incomplete else "wb") as file:
            file.write(data)
        self._incomplete.add(name)
        if last:
            part.replace(path)
            self._incomplete.remove(name)

    def close(self, process: Process) -> None:
        """The process has ended: show lines without an end."""
        for (name, stream), splitter in self._splitters.items():
            if name == process.name:
                self._show(process, stream, splitter.flush())

    def tail(self, process: Process, stream: str) -> list[Line]:
        return list(self._tails.get((process.name, stream), ()))

    def _show(self, process: Process, stream: str, lines: list[str]) -> list[str]:
        for line in lines:
            self._tails[process.name, stream].append(Line(line, time.monotonic()))
            self.echo(process, stream, line)
        return lines


class Terminal:
    """Shows the lines of all processes, or of one rank alone, with a colour for each host on a terminal."""

    def __init__(self, only_rank: int | None = None, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.only_rank = only_rank
        self.streams = {"stdout": out or sys.stdout, "stderr": err or sys.stderr}
        self._colours: dict[str, int] = {}

    def __call__(self, process: Process, stream: str, line: str) -> None:
        file = self.streams.get(stream)
        if file is None or self.only_rank not in (None, process.rank):
            return
        text = f"{self._prefix(process, file)} {line}\n"
        encoding = file.encoding or "utf-8"
        try:
            file.write(text.encode(encoding, "backslashreplace").decode(encoding))
            file.flush()
        except OSError:  # `… | head`, or a terminal that was closed: the run goes on, its logs are kept all the same
            del self.streams[stream]

    def _prefix(self, process: Process, file: TextIO) -> str:
        prefix = f"[{process.label}]"
        if not file.isatty() or "NO_COLOR" in os.environ:
            return prefix
        colour = self._colours.setdefault(process.host.name, COLOURS[len(self._colours) % len(COLOURS)])
        return f"\x1b[{colour}m{prefix}\x1b[0m"


def quiet(process: Process, stream: str, line: str) -> None:
    """Show nothing."""
