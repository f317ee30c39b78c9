"""Handles the output of a run.

It goes unchanged to `<run>/logs/<host>/<process>/stdout` and `stderr`, and line by line to the terminal, where each
line begins with its process: `[host:rank] `.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TextIO

from launcher.plan import Process

__all__ = ["Echo", "Logs", "Terminal", "printable", "quiet"]

Echo = Callable[[Process, str, str], None]  # process, "stdout" or "stderr", one line without its line break

NAME = "[A-Za-z0-9_][A-Za-z0-9._-]*"
RETURNED_NAME = re.compile(f"(?:{NAME}/)?{NAME}")
MAX_LINE_BYTES = 8192  # a longer line is shown in pieces
TAIL_LINES = 100  # a long traceback
COLOURS = (36, 33, 35, 32, 34, 31)  # cyan, yellow, magenta, green, blue, red
RESET = "\x1b[0m"
COLOUR = re.compile(r"\x1b\[[0-9;:]*m")  # what ECMA-48 calls SGR: colours, bold, underlined
CONTROL = re.compile(
    r"(\x1b\[[0-9;:]*m|\t)"  # kept
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]?"  # control sequences: they move the cursor, clear, ask the terminal
    r"|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # strings, such as titles
    r"|\x1b[ -/]*[0-~]?"  # the other escape sequences
    r"|[\x00-\x1f\x7f-\x9f]"  # the other control characters
)


class Line(NamedTuple):
    """A line, and when its first bytes came."""

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
        """Return the last line, if it has no line break."""
        rest, self._partial = self._partial, bytearray()
        return [_as_text(rest)] if rest else []


def _as_text(line: bytes | bytearray) -> str:
    # Progress bars use a carriage return to go back to the start of the line: show only what was written last.
    return printable(line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "backslashreplace"))


def printable(text: str) -> str:
    """Remove all that makes a terminal do more than show `text`. Colours stay, and are reset at the end."""
    shown = CONTROL.sub(r"\1", text)
    colours = COLOUR.findall(shown)
    return shown if not colours or colours[-1] == RESET else shown + RESET


class Logs:
    """Keeps what the processes write, and remembers the last lines of each."""

    def __init__(self, run_folder: str | Path, echo: Echo) -> None:
        self.run_folder = Path(run_folder)
        self.echo = echo
        self._splitters: dict[tuple[str, str], LineSplitter] = {}
        self._tails: dict[tuple[str, str], deque[Line]] = {}
        self._incomplete: set[str] = set()  # returned files that have arrived in part
        self.lost_files: list[str] = []  # returned files that could not be kept
        self.missing_output: str | None = None  # why some of the output is not in the logs
        self._news: list[str] = []

    def folder(self, process: Process) -> Path:
        return self.run_folder / process.log_folder

    def open(self, process: Process) -> None:
        """Make the log files of a process that is about to start. Raises OSError if it starts for the first time."""
        known = (process.name, "stdout") in self._splitters
        for stream in ("stdout", "stderr"):
            self._splitters[process.name, stream] = LineSplitter()
            self._tails[process.name, stream] = deque(maxlen=TAIL_LINES)
        folder = self.folder(process)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stream in ("stdout", "stderr"):
                (folder / stream).touch()
        except OSError as error:
            if not known:
                raise
            self._miss_output(error)

    def write(self, process: Process, stream: str, data: bytes) -> list[str]:
        """Keep and show a piece of output; on a full disk, only show it. Return the lines that it completed."""
        try:
            with (self.folder(process) / stream).open("ab") as file:
                file.write(data)
        except OSError as error:
            self._miss_output(error)
        return self._show(process, stream, self._splitters[process.name, stream].feed(data))

    def _miss_output(self, error: OSError) -> None:
        if self.missing_output is None:
            self.missing_output = f"some of the output is missing in {self.run_folder / 'logs'}: {error.strerror}"
            self._news.append(f"{self.missing_output}. The run goes on, and what fits again is kept")

    def keep_file(self, name: str, data: bytes, last: bool) -> None:
        """Keep a piece of a file that a process returned. With the last piece, the file appears in the run folder.

        A file that cannot be written is added to `lost_files`. Raises ValueError for a name that leads out of the
        folder.
        """
        if not RETURNED_NAME.fullmatch(name):
            raise ValueError(f"a process returned a file of the name {name!r}")
        path = self.run_folder / name
        part = path.with_name(f".{path.name}.part")
        if name in self.lost_files:
            return
        try:
            self._keep_piece(path, part, data, begins=name not in self._incomplete)
            if last:
                part.replace(path)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            self.lost_files.append(name)
            self._news.append(f"the returned file {name} cannot be kept in {self.run_folder}: {error.strerror}")
        self._incomplete.add(name)
        if last:
            self._incomplete.remove(name)

    def _keep_piece(self, path: Path, part: Path, data: bytes, begins: bool) -> None:
        """Write a piece. Raises OSError, also if a link would lead out of the run folder."""
        path.parent.mkdir(exist_ok=True)
        if path.parent.is_symlink() and path.parent != self.run_folder:
            raise NotADirectoryError(errno.ENOTDIR, "its folder is a link", str(path.parent))
        if begins:
            part.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if begins else 0)
        with os.fdopen(os.open(part, flags, 0o644), "ab") as file:
            file.write(data)

    def note(self, sentence: str) -> None:
        """Add a sentence for the user."""
        self._news.append(sentence)

    def take_news(self) -> list[str]:
        """Return new sentences for the user: that output cannot be kept (once), and each file that cannot be kept."""
        news, self._news = self._news, []
        return news

    def close(self, process: Process) -> None:
        """Show the last lines of a process that has ended, even if they lack a line break."""
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
    """Shows the lines of all processes. On a terminal, each host has a colour."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.streams = {"stdout": out or sys.stdout, "stderr": err or sys.stderr}
        self._colours: dict[str, int] = {}

    def __call__(self, process: Process, stream: str, line: str) -> None:
        file = self.streams.get(stream)
        if file is None:
            return
        text = f"{self._prefix(process, file)} {line}\n"
        encoding = file.encoding or "utf-8"
        try:
            file.write(text.encode(encoding, "backslashreplace").decode(encoding))
            file.flush()
        except OSError:  # `… | head`, or a closed terminal: the run goes on, and its logs are still kept
            del self.streams[stream]

    def _prefix(self, process: Process, file: TextIO) -> str:
        prefix = f"[{process.label}]"
        if not file.isatty() or "NO_COLOR" in os.environ:
            return prefix
        colour = self._colours.setdefault(process.host.name, COLOURS[len(self._colours) % len(COLOURS)])
        return f"\x1b[{colour}m{prefix}{RESET}"


def quiet(process: Process, stream: str, line: str) -> None:
    """Show nothing."""
