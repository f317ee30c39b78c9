"""What outlives the server's process: the journal, and a checkpoint now and then."""

from __future__ import annotations

import sys
import time
from threading import Thread

from danaz.run_folder import RunFolder
from danaz.server.checkpoint import FOLDER, delete_checkpoints, newest_number, read_newest, write_checkpoint
from danaz.server.core import ServerCore
from danaz.server.figures import Update
from danaz.server.settings import ServerSettings
from danaz.server.state import CoreState


class Keeper:
    """Makes a server core whose updates go into a run folder, and that can go on after a kill at any moment.

    Each line of the journal is in the kernel's hands before the worker hears of its update. A checkpoint is written at
    once when something comes true that must not be undone, and else every so often by a thread: training waits for the
    copy of the vectors only.
    """

    def __init__(self, folder: RunFolder, settings: ServerSettings):
        self.core = ServerCore(settings, self._update, on_milestone=lambda core: self._milestone(), on_notice=say)
        self._folder = folder
        self._checkpoints = folder.path / FOLDER
        self._every_s = settings.checkpoint_s
        self._number = newest_number(self._checkpoints)
        self._due_at = time.monotonic() + self._every_s
        self._journal_life = 0  # that the end of the journal is of
        self._thread = Thread()
        self._state: CoreState | None = None  # the last one that was written

    def resume(self) -> bool:
        """Go on from the newest sound checkpoint; returns whether there is one. Raises ResumeError."""
        found = read_newest(self._checkpoints)
        if found is None:
            self.core.figures.lost_updates = self._folder.cut(0)
            say(f"no checkpoint in {self._checkpoints}: training begins afresh")
            return False
        state, damaged = found
        for each in damaged:
            say(f"{each}; the one before it is taken")
        journal = self._folder.journal(after=state.version)
        self.core.restore(state, journal, life=self._number, now=time.monotonic())
        return True

    def finish(self) -> None:
        """The server ends: of a run that is complete nothing is kept but the folder, any other can be resumed."""
        if self.core.started and self.core.recovery is None and not self.core.finished:
            self._milestone()
        self._folder.finish(self.core)
        if self.core.finished:
            delete_checkpoints(self._checkpoints)

    # ---- what the core calls -------------------------------------------------------------------------------------

    def _update(self, update: Update) -> None:
        self._folder.record(update)
        if self._every_s and time.monotonic() >= self._due_at and not self._thread.is_alive():
            self._begin_to_write()

    def _milestone(self) -> None:
        if self._journal_life != self.core.life:
            self._journal_life = self.core.life
            self._folder.cut(self.core.master.version)
        if self._every_s:
            self._wait()
            self._begin_to_write()
            self._wait()

    def _begin_to_write(self) -> None:
        self._number += 1
        self._state = self.core.state(reuse=self._state)
        self._thread = Thread(target=self._write, args=(self._number, self._state), name="danaz-checkpoint")
        self._thread.start()
        self._due_at = time.monotonic() + self._every_s

    def _wait(self) -> None:
        if self._thread.is_alive():
            self._thread.join()

    def _write(self, number: int, state: CoreState) -> None:
        try:
            write_checkpoint(self._checkpoints, number, state)
        except OSError as error:
            say(f"checkpoint {number} could not be written: {error}. Training goes on; the one before it stays")


def say(text: str) -> None:
    """Tell whoever watches the run."""
    print(f"danaz server: {text}", file=sys.stderr, flush=True)
