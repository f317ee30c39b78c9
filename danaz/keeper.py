"""What outlives the server's process: the journal, and a checkpoint now and then."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from threading import Thread

from danaz.run_folder import RunFolder
from danaz.server.checkpoint import delete_checkpoints, folders_of, newest_number, read_common, write_checkpoint
from danaz.server.core import ServerCore
from danaz.server.figures import Update
from danaz.server.settings import ServerSettings
from danaz.server.state import CoreState


class Checkpoints:
    """Those of one server. They are written by a thread: training waits for the copy of the vectors only."""

    def __init__(self, run: Path, settings: ServerSettings):
        self._folders = folders_of(run, settings.shards)
        self._shard = settings.shard
        self.number = newest_number(*self._folders)  # of the newest of any shard: no other will have it again
        self._thread = Thread()
        self._state: CoreState | None = None  # the last one that was written

    def __str__(self) -> str:
        return str(self._folders[self._shard])

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def read(self) -> CoreState | None:
        """The state to go on from, None if there is none. Raises ResumeError."""
        found = read_common(self._folders, self._shard)
        if found is None:
            say(f"no checkpoint in {self}: training begins afresh")
            return None
        state, damaged = found
        for each in damaged:
            say(f"{each}; the one before it is taken")
        return state

    def write(self, core: ServerCore, number: int) -> None:
        """Begin to write the state that ``core`` is in, as soon as the one before is written."""
        self.wait()
        self.number, self._state = number, core.state(reuse=self._state)
        self._thread = Thread(target=self._write, args=(number, self._state), name="danaz-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last one is written."""
        if self._thread.is_alive():
            self._thread.join()

    def may_be(self, number: int) -> bool:
        """Whether shard 0 can have begun to write so high a number: a worker that says so may err, or lie."""
        return number <= newest_number(self._folders[0]) + 1

    def delete(self) -> None:
        """Of all shards: the run is complete."""
        delete_checkpoints(*self._folders)

    def _write(self, number: int, state: CoreState) -> None:
        try:
            write_checkpoint(self._folders[self._shard], number, state, self._folders)
        except OSError as error:
            say(f"checkpoint {number} could not be written: {error}. Training goes on; the one before it stays")


class Keeper:
    """Makes a server core whose updates go into a run folder, and that can go on after a kill at any moment.

    Each line of the journal is in the kernel's hands before the worker hears of its update. A checkpoint is written at
    once when something comes true that must not be undone, and else every so often while training goes on.
    """

    def __init__(self, folder: RunFolder, settings: ServerSettings):
        self.core = ServerCore(settings, self._update, on_milestone=lambda core: self._milestone(), on_notice=say)
        self._folder = folder
        self._checkpoints = Checkpoints(folder.path, settings)
        self._every_s = settings.checkpoint_s
        self._due_at = time.monotonic() + self._every_s
        self._journal_life = 0  # that the end of the journal is of

    def resume(self) -> bool:
        """Go on from the newest sound checkpoint; returns whether there is one. Raises ResumeError."""
        state = self._checkpoints.read()
        if state is None:
            self.core.figures.lost_updates = self._folder.cut(0)
            return False
        journal = self._folder.journal(after=state.version)
        self.core.restore(state, journal, life=self._checkpoints.number, now=time.monotonic())
        return True

    def finish(self) -> None:
        """The server ends: of a run that is complete nothing is kept but the folder, any other can be resumed."""
        if self.core.started and self.core.recovery is None and not self.core.finished:
            self._milestone()
        self._folder.finish(self.core)
        if self.core.finished:
            self._checkpoints.delete()

    # ---- what the core calls -------------------------------------------------------------------------------------

    def _update(self, update: Update) -> None:
        self._folder.record(update)
        if self._every_s and time.monotonic() >= self._due_at and not self._checkpoints.busy:
            self._begin_to_write()

    def _milestone(self) -> None:
        if self._journal_life != self.core.life:
            self._journal_life = self.core.life
            self._folder.cut(self.core.master.version)
        if self._every_s:
            self._begin_to_write()
            self._checkpoints.wait()

    def _begin_to_write(self) -> None:
        self.core.generation = self._checkpoints.number + 1
        self._checkpoints.write(self.core, self.core.generation)
        self._due_at = time.monotonic() + self._every_s


class SliceKeeper:
    """Makes the core of a shard other than 0, which keeps a checkpoint for each of shard 0's, and one of its end.

    Workers bring word of shard 0's: what a worker does behind one of them is behind the one here, too.
    """

    def __init__(self, run: Path, settings: ServerSettings):
        self.core = ServerCore(
            settings, on_milestone=lambda core: self._milestone(), on_notice=say, on_generation=self._hear
        )
        self._checkpoints = Checkpoints(run, settings)
        self._keeps = settings.checkpoint_s > 0

    def resume(self) -> None:
        """Go on from the newest generation of all shards, if there is one. Raises ResumeError."""
        state = self._checkpoints.read()
        if state is not None:
            self.core.restore(state, [], life=self._checkpoints.number, now=time.monotonic())

    def finish(self) -> None:
        """The process ends."""
        self._checkpoints.wait()

    def _hear(self, core: ServerCore, told: int) -> None:
        if self._keeps and self._checkpoints.may_be(told):
            self._keep(told)

    def _milestone(self) -> None:
        """Once a worker may have the end of this slice, nothing may change it."""
        if self._keeps and self.core.final:
            self._keep(self.core.generation + 1)
            self._checkpoints.wait()

    def _keep(self, number: int) -> None:
        self.core.generation = number
        self._checkpoints.write(self.core, number)


def say(text: str) -> None:
    """Tell whoever watches the run."""
    print(f"danaz server: {text}", file=sys.stderr, flush=True)
