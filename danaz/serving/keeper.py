"""What outlives the server's process: the journal, and a checkpoint now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread

from danaz.protocol.messages import Leave, Offer, Push
from danaz.run.folder import RunFolder
from danaz.server.core import ServerCore
from danaz.server.figures import Update
from danaz.server.offering import AwaitingRollback
from danaz.server.settings import ServerSettings
from danaz.server.snapshot import CoreState, ResumeError
from danaz.serving.checkpoint import (
    KEPT,
    DamagedError,
    complete_numbers,
    delete_checkpoints,
    folder_of,
    newest_number,
    read_checkpoint,
    read_facts,
    read_newest,
    read_restarts,
    worth_keeping,
    write_checkpoint,
    write_restarts,
)

AT_ONCE = 8  # checkpoints that one worker can be the cause of between two of its pushes
Restore = Callable[[CoreState | None, float], None]  # of a core, at this time; None: training begins afresh


class Checkpoints:
    """Those of one core. They are written by a thread: training waits for the copy of the vectors only."""

    def __init__(self, run: Path, core: ServerCore):
        self._folder = folder_of(run, core.settings.shard)
        self._core = core
        self.number = newest_number(self._folder)  # that one has had, of any shard: no other will have it again
        self._core.state.kept = tuple(complete_numbers(self._folder))
        self._common: tuple[int, ...] = ()  # the newest that all shards have, as this one has heard
        self._figures: dict[str, int] = {}  # of the newest
        self._thread = Thread()
        self._state: CoreState | None = None  # the last one that was written
        self._in_trouble = False  # it could not be

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    def begin(self) -> ServerCore:
        """A run begins. What an earlier one left here, several shards would take for a generation of theirs."""
        if self._core.settings.shards > 1:
            self.delete()
            self.number, self._core.state.kept = 0, ()
        return self._core

    # ---- going back ----------------------------------------------------------------------------------------------

    def resume(self, restore: Restore) -> ServerCore | AwaitingRollback:
        """Go on from the newest; one of several shards, as soon as it is told from which. Raises ResumeError."""
        if self._core.settings.shards > 1:
            offering = AwaitingRollback(
                self._core, offer := self._offer(), lambda *choice: self._go_back(restore, *choice)
            )
            if offer.done and self._core.settings.shard == 0:
                # As the choice will be; but it may be that nobody is left to tell.
                offering.go_back(max(offer.generations), offer.newest, time.monotonic())
            return offering
        found = read_newest(self._folder)
        if found is None:
            self._begin_afresh(restore, time.monotonic())
            return self._core
        state, damaged = found
        for each in damaged:
            say(f"{each}; the one before it is taken")
        restore(state, time.monotonic())
        return self._core

    def _begin_afresh(self, restore: Restore, now: float) -> None:
        say(f"no checkpoint in {self._folder}: training begins afresh")
        self._core.state.kept = ()
        restore(None, now)

    def _offer(self) -> Offer:
        """What is sound; and the beginning, unless training has gone on so far that it is kept no more."""
        sound: dict[int, CoreState] = {}
        numbers = complete_numbers(self._folder)
        for number in numbers:
            try:
                sound[number] = CoreState(read_facts(self._folder, number), {})
            except DamagedError as error:
                say(str(error))
        newest = sound[max(sound)] if sound else None
        if newest is not None:
            # What restarts have cost is not forgotten by going back to before them.
            figures = newest.facts["figures"]
            self._figures = {name: figures[name] for name in ("restarts", "lost_updates")}
        is_beginning = not numbers or any(state.version == 0 for state in sound.values())
        self._core.state.kept = tuple(sound)
        generations = (*[0] * is_beginning, *sound)
        return Offer(0, generations, self.number, done=newest is not None and newest.done)

    def _go_back(self, restore: Restore, generation: int, newest: int, now: float) -> None:
        """Raises ResumeError if that checkpoint cannot be read any more."""
        self.number = newest
        if generation == 0:
            self._begin_afresh(restore, now)
            return
        try:
            state = read_checkpoint(self._folder, generation)
        except DamagedError as error:
            raise ResumeError(str(error)) from error
        state.facts["figures"] |= self._figures
        restore(state, now)
        self._core.state.kept = tuple(number for number in self._core.state.kept if number <= generation)

    # ---- writing -------------------------------------------------------------------------------------------------

    def hear(self, common: tuple[int, ...]) -> None:
        """What all shards have, as a worker says; believed of what this one has, for it may err, or lie."""
        if common and max(common) > max(self._common, default=0) and {*common} <= {*self._core.state.kept}:
            self._common = common

    @property
    def rarity(self) -> int:
        """How many times longer than else to wait for the next one: twice for each of many that not all shards have.

        Workers that are slow to carry word of them, or a shard with a full disk, would make the others keep too many.
        """
        pending = [number for number in self._core.state.kept if number > max(self._common, default=0)]
        return 1 if self._core.settings.shards == 1 else 1 << max(0, len(pending) - KEPT)

    def write(self, number: int) -> None:
        """Begin to write the state that the core is in, as soon as the one before is written."""
        self.wait()
        self._core.settle()
        if not self._core.master.is_finite:
            say("the parameters are not finite, and no checkpoint is written of them; the one before stays")
            return
        self._core.state.generation = self.number = number
        self._state = self._core.snapshot(reuse=self._state)
        self._thread = Thread(target=self._write, args=(number, self._state), name="danaz-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the last one is written."""
        if self._thread.is_alive():
            self._thread.join()

    def delete(self) -> None:
        """Nobody is to go back to them any more, but a person to those from before training diverged."""
        self.wait()
        delete_checkpoints(self._folder, but=self._core.state.sound)

    def count_restart(self, restarts: int = 1, lost_updates: int = 0) -> None:
        """Let the core know what restarts have cost, those included that came to no checkpoint."""
        counted, lost = read_restarts(self._folder)
        counted, lost = counted + restarts, lost + lost_updates
        figures = self._core.figures
        figures.restarts, figures.lost_updates = max(figures.restarts, counted), max(figures.lost_updates, lost)
        try:
            write_restarts(self._folder, figures.restarts, lost)
        except OSError as error:
            say(f"this restart could not be counted: {error}. Training goes on")

    def _write(self, number: int, state: CoreState) -> None:
        kept = [*self._core.state.kept, number]
        common = self._common if self._core.settings.shards > 1 else kept[-KEPT:]
        keep = sorted({*worth_keeping(kept, common), *self._core.state.sound})
        try:
            write_checkpoint(self._folder, number, state, keep)
        except OSError as error:
            if not self._in_trouble:
                say(
                    f"checkpoint {number} could not be written: {error.strerror}. Training goes on, and the checkpoint "
                    "before it stays; those to come are tried without further words"
                )
            self._in_trouble = True
        else:
            if self._in_trouble:
                say(f"checkpoints can be written again: {number} is")
            self._in_trouble = False
            self._core.state.kept = tuple(keep)


class Keeper:
    """Makes a server core whose updates go into a run folder, and that can go on after a kill at any moment.

    Each line of the journal is in the kernel's hands before the worker hears of its update. A checkpoint is written at
    once when something comes true that must not be undone, and else every so often while training goes on.
    """

    def __init__(self, folder: RunFolder, settings: ServerSettings):
        self.core = ServerCore(
            settings,
            self._update,
            on_milestone=lambda core: self._milestone(),
            on_notice=say,
            on_carried=self._hear,
            on_report=self._keep_reported,
        )
        self._folder = folder
        self._checkpoints = Checkpoints(folder.path, self.core)
        self._every_s = settings.checkpoint_s
        self._due_at = time.monotonic() + self._every_s
        self._journal_life = 0  # that the end of the journal is of
        self._is_undecided = False  # where to go on

    def begin(self) -> ServerCore:
        """What serves a run that begins."""
        return self._checkpoints.begin()

    def resume(self) -> ServerCore | AwaitingRollback:
        """What serves a run that goes on, from a checkpoint if there is one. Raises ResumeError."""
        self._is_undecided = True
        self._checkpoints.count_restart()
        return self._checkpoints.resume(self._restore)

    def finish(self) -> None:
        """The server ends: of a run that is complete nothing is kept but the folder, any other can be resumed.

        So can one whose results could not be written. Raises UnwrittenError.
        """
        if self._is_undecided:
            return
        if self.core.started and self.core.recovery is None and not self.core.finished:
            self._milestone()
        self.core.settle()
        self._folder.finish(self.core)
        if self.core.finished:
            self._checkpoints.delete()

    def _restore(self, state: CoreState | None, now: float) -> None:
        self._is_undecided = False
        if state is None:
            self._checkpoints.count_restart(0, lost_updates=self._folder.cut(0))
            self._folder.forget_reported()  # it will be reported again
        else:
            journal = self._folder.journal(after=state.version)
            self.core.restore(state, journal, life=self._checkpoints.number, now=now)
            self._checkpoints.count_restart(0)
            self.core.figures.reported |= self._folder.reported()

    # ---- what the core calls -------------------------------------------------------------------------------------

    def _update(self, update: Update) -> None:
        self._folder.record(update)
        if self._every_s and time.monotonic() >= self._due_at and not self._checkpoints.busy:
            self._begin_to_write()

    def _hear(self, message: Push | Leave) -> None:
        if isinstance(message, Push):
            self._checkpoints.hear(message.common)

    def _keep_reported(self, reported: Mapping[str, float | str | None]) -> None:
        """Without a checkpoint of its own: there may be many reports."""
        try:
            self._folder.keep_reported(reported)
        except OSError as error:
            say(f"reported figures could not be written yet: {error}. They are kept in memory for summary.json")

    def _milestone(self) -> None:
        if self._journal_life != self.core.life:
            self._journal_life = self.core.life
            self._folder.cut(self.core.master.version)
        if self._every_s:
            self._begin_to_write()
            self._checkpoints.wait()

    def _begin_to_write(self) -> None:
        self._checkpoints.write(self._checkpoints.number + 1)
        self._due_at = time.monotonic() + self._every_s * self._checkpoints.rarity


class SliceKeeper:
    """Makes the core of a shard other than 0, which keeps a checkpoint for each of shard 0's, and one of its end.

    Workers bring word of shard 0's, which holds all that its sender had heard: what a worker does behind that one is
    to be behind the one here, too.
    """

    def __init__(self, run: Path, settings: ServerSettings):
        self.core = ServerCore(
            settings, on_milestone=lambda core: self._milestone(), on_notice=say, on_carried=self._hear
        )
        self._checkpoints = Checkpoints(run, self.core)
        self._keeps = settings.checkpoint_s > 0

    def begin(self) -> ServerCore:
        """What serves a run that begins."""
        return self._checkpoints.begin()

    def resume(self) -> ServerCore | AwaitingRollback:
        """What serves a run that goes on."""
        return self._checkpoints.resume(self._restore)

    def finish(self) -> None:
        """The process ends. What was merely interrupted can be resumed."""
        self._checkpoints.wait()
        if self.core.finished:
            self._checkpoints.delete()

    def _restore(self, state: CoreState | None, now: float) -> None:
        if state is not None:
            self.core.restore(state, [], life=self._checkpoints.number, now=now)

    # ---- what the core calls -------------------------------------------------------------------------------------

    def _hear(self, message: Push | Leave) -> None:
        if isinstance(message, Push):
            self._checkpoints.hear(message.common)
        if self._keeps and self.core.state.generation < message.generation <= self._largest:
            self._checkpoints.write(message.generation)

    @property
    def _largest(self) -> int:
        """The number that shard 0 can have come to since it was heard of, an update or two of each worker ago."""
        return self._checkpoints.number + AT_ONCE * (1 + len(self.core.members))

    def _milestone(self) -> None:
        """Once a worker may have the end of this slice, nothing may change it."""
        if self._keeps and self.core.state.final:
            self._checkpoints.write(self._checkpoints.number + 1)
            self._checkpoints.wait()


def say(text: str) -> None:
    """Tell whoever watches the run."""
    print(f"danaz server: {text}", file=sys.stderr, flush=True)
