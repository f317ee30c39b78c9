"""What the server writes into the run folder: updates.jsonl while a run goes on, and the results at its end.

A kill at any moment leaves whole JSON only. Each line of updates.jsonl is written whole before the worker hears of its
update, so the file is the server's journal, too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import save

from danaz.files.atomic import write_atomically
from danaz.files.reading import read_json
from danaz.run.folder import PARAMETERS, SUMMARY, UPDATES, reported_number, with_measured
from danaz.run.lock import MODE
from danaz.run.versions import versions
from danaz.server.core import ServerCore
from danaz.server.records import Update

MOST_WAITING_BYTES = 64 << 20  # the most that waits in memory while the journal cannot be written
Tell = Callable[[str], None]  # shows a sentence to whoever watches the run


class UnwrittenError(RuntimeError):
    """Some of what a run left could not be written into its folder."""


def tell_on_stderr(sentence: str) -> None:
    """Print ``sentence`` on standard error."""
    print(f"danaz: {sentence}", file=sys.stderr, flush=True)


class Journal:
    """Writes updates.jsonl. When ``add`` returns, the kernel has the line, unless the disk did not take it.

    Lines that the disk does not take wait in memory until it does. The user is told once when this begins, and once
    when it is over. The file holds whole lines without gaps: once some lines are lost, no more are written.
    """

    def __init__(self, path: Path, tell: Tell):
        self.path = path
        self._tell = tell
        self._descriptor: int | None = None
        self._waiting = bytearray()  # lines that have not been written
        self._torn = 0  # bytes at the end of the file that are the beginning of a line
        self._lines = 0  # number of lines that were added
        self._lost = 0  # number of these that will not be written
        self._in_trouble = False

    def add(self, line: bytes) -> None:
        """Write a line, which ends with a line break."""
        self._lines += 1
        if self._lost:
            self._lost += 1
            return
        self._waiting += line
        self._write()

    def cut(self, lines: int) -> int:
        """Cut the file after this number of lines. Return how many lines were removed. Raises OSError."""
        there = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        os.ftruncate(self._open(), sum(map(len, there[:lines])))
        return max(0, len(there) - lines)

    def close(self) -> int:
        """Write the lines that wait. Return how many of all lines are not in the file."""
        if not self._lost:
            self._write()
        if self._waiting:
            self._give_up(self._waiting.count(b"\n"))
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        return self._lost

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        return self._descriptor

    def _write(self) -> None:
        try:
            descriptor = self._open()
            while self._waiting:
                written = os.write(descriptor, self._waiting)
                line_break = self._waiting.rfind(b"\n", 0, written)
                self._torn = self._torn + written if line_break < 0 else written - line_break - 1
                del self._waiting[:written]
            was_deleted = os.fstat(descriptor).st_nlink == 0
        except OSError as error:
            self._note(error)
            return
        if was_deleted:
            self._tell(f"{self.path} was deleted. Training goes on; its results are written when it ends")
            self._give_up(self._lines)
        elif self._in_trouble:
            self._in_trouble = False
            self._tell(f"{self.path} can be written again, and is whole")

    def _note(self, error: OSError) -> None:
        if not self._in_trouble:
            self._in_trouble = True
            self._tell(f"{self.path} cannot be written: {error.strerror}. Training goes on; its lines wait in memory")
        if len(self._waiting) > MOST_WAITING_BYTES:
            self._tell(f"{self.path} will lack all further updates: too many of them wait to be written")
            self._give_up(self._waiting.count(b"\n"))

    def _give_up(self, lost: int) -> None:
        self._lost += lost
        self._waiting.clear()
        if self._descriptor is not None and self._torn:
            with suppress(OSError):
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - self._torn)
            self._torn = 0


class RunWriter:
    """Writes into the run folder what a server core does, and the results at the end."""

    def __init__(self, path: Path, facts: Mapping[str, Any], tell: Tell = tell_on_stderr):
        """``facts`` are the figures of summary.json that the server does not know, such as the seed."""
        self.path = path
        self.facts = dict(facts)
        self._journal = Journal(path / UPDATES, tell)
        self._reported = path / "reported.json"

    def record(self, update: Update) -> None:
        """Add a line to updates.jsonl."""
        line: dict[str, Any] = {
            "version": update.version,
            "worker": update.worker,
            "lag": update.lag,
            "lr": update.lr[0] if len(update.lr) == 1 else update.lr,
            "gap": update.gap,
            "gap_of": update.gap_of,
            "loss": update.loss,
            "batch": update.batch,
        }
        line |= {"samples": update.samples, "incarnation": update.incarnation, "request": update.request}
        # Values that are seldom set are written only if they are.
        rare = {"round": update.round, "earlier": update.earlier, "life": update.life}
        line |= {name: value for name, value in rare.items() if value}
        if update.seconds is not None:
            line["seconds"] = round(update.seconds, 6)
        self._journal.add((json.dumps(line) + "\n").encode())

    def read_journal(self, after: int) -> list[Update]:
        """Return the updates after version ``after``, up to the first gap or damaged line."""
        updates: list[Update] = []
        if not self._journal.path.exists():
            return updates
        with self._journal.path.open("rb") as lines:
            for version, line in enumerate(islice(lines, after, None), after + 1):
                update = _update_of(line)
                if update is None or update.version != version:
                    break
                updates.append(update)
        return updates

    def cut_journal(self, version: int) -> int:
        """Let updates.jsonl end with ``version``. Return how many lines were removed."""
        return self._journal.cut(version)

    def keep_reported(self, reported: Mapping[str, Any]) -> None:
        """Save what scripts have reported, in case this process ends before it writes summary.json."""
        write_atomically(self._reported, json.dumps(dict(reported)).encode())

    def read_reported(self) -> dict[str, Any]:
        """Return what scripts reported to a server that ended before it wrote summary.json. Raises UnreadableError."""
        return read_json(self._reported) if self._reported.exists() else {}

    def forget_reported(self) -> None:
        """Delete what ``keep_reported`` saved."""
        self._reported.unlink(missing_ok=True)

    def finish(self, core: ServerCore) -> dict[str, Any]:
        """Write the final parameters and summary.json. Return the summary as read_summary does.

        The summary is written only after the parameters. Raises UnwrittenError if something could not be written.
        """
        missing = self._journal.close()
        figures = core.summary()
        error = reported_number(figures["reported"], "test_error_percent", None)
        summary = {**self.facts, "test_error_percent": error, **figures, "versions": versions()}
        if missing:
            summary["unrecorded_updates"] = missing
        try:
            self.path.mkdir(mode=MODE, parents=True, exist_ok=True)  # if somebody has deleted it
            if core.started:
                params = core.full_model.params(core.master.params)
                if params is not None:
                    named = core.full_model.layout.named(params, core.mean_buffers())
                    write_atomically(self.path / PARAMETERS, save(named))
            write_atomically(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        except OSError as error:
            what = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
            raise UnwrittenError(f"the results of the run in {self.path} could not be written: {what}") from None
        if missing:
            raise UnwrittenError(
                f"{self._journal.path} lacks {missing} updates, which could not be written; the parameters and "
                "summary.json are there"
            )
        self.forget_reported()
        return with_measured(summary)

    def finish_at_exit(self, core: ServerCore) -> None:
        """Do the same as ``finish`` in a process that is about to end. If writing fails, exit at once with code 1."""
        try:
            self.finish(core)
        except UnwrittenError as error:
            tell_on_stderr(str(error))
            sys.stdout.flush()
            os._exit(1)


def _update_of(line: bytes) -> Update | None:
    """Return the update that RunWriter.record wrote as ``line``; None if the line is damaged, as by a full disk."""
    try:
        values = json.loads(line)
        values["lr"] = tuple(values["lr"]) if isinstance(values["lr"], list) else (values["lr"],)
        values["earlier"] = tuple(values.get("earlier", ()))
        return Update(**values)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
