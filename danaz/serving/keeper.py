"""Keeps on disk what must survive the server's process: the journal, and a checkpoint from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread

from danaz.protocol.messages import Leave, Offer, Push
from danaz.server.core import ServerCore
from danaz.server.records import Update
from danaz.server.rollback import AwaitingRollback
from danaz.server.settings import ServerSettings
from danaz.server.snapshot import ResumeError, Snapshot
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
from danaz.serving.journal import RunWriter

AT_ONCE = 8  # the most checkpoints that one worker can cause between two of its pushes
Restore = Callable[[Snapshot | None, float], None]  # restores a core at a time; with None, it begins afresh


class Checkpoints:
    """The checkpoints of one core. A thread writes them: training waits only while the vectors are copied."""

    def __init__(self, run: Path, core: ServerCore):
        self._folder = folder_of(run, core.settings.shard)
        self._core = core
        self.number = newest_number(self._folder)  # the largest that any shard has used; never used again
        self._core.state.kept = tuple(complete_numbers(self._folder))
        self._common: tuple[int, ...] = ()  # the newest checkpoints that all shards have, as workers have said
        self._restart_totals: dict[str, int] = {}  # what restarts have cost, according to the newest checkpoint
        self._thread = Thread()
        self._written: Snapshot | None = None  # the last one that was written; its memory is used again
        self._in_trouble = False  # whether the last checkpoint could not be written

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread.is_alive()

    def begin(self) -> ServerCore:
        """Begin a run. With several shards, delete an earlier run's checkpoints: they are not this run's."""
        if self._core.settings.shards > 1:
            self.delete()
            self.number, self._core.state.kept = 0, ()
        return self._core

    # ---- going back ----------------------------------------------------------------------------------------------

    def resume(self, restore: Restore) -> ServerCore | AwaitingRollback:
        """Go on from the newest checkpoint. With several shards, wait until a worker names the checkpoint.

        Raises ResumeError.
        """
        if self._core.settings.shards > 1:
            waiting = AwaitingRollback(
                self._core, offer := self._make_offer(), lambda *choice: self._go_back(restore, *choice)
            )
            if offer.done and self._core.settings.shard == 0:
                # A worker would choose the same, but perhaps none is left.
                waiting.go_back(max(offer.generations), offer.newest, time.monotonic())
            return waiting
        found = read_newest(self._folder)
        if found is None:
            self._begin_afresh(restore, time.monotonic())
            return self._core
        snapshot, damaged = found
        for each in damaged:
            log(f"{each}; the one before it is taken")
        restore(snapshot, time.monotonic())
        return self._core

    def _begin_afresh(self, restore: Restore, now: float) -> None:
        log(f"no checkpoint in {self._folder}: training begins afresh")
        self._core.state.kept = ()
        restore(None, now)

    def _make_offer(self) -> Offer:
        """Make an offer of the sound checkpoints, and of 0 (the beginning) if a shard may have to go back there."""
        sound: dict[int, Snapshot] = {}
        numbers = complete_numbers(self._folder)
        for number in numbers:
            try:
                sound[number] = Snapshot(read_facts(self._folder, number), {})
            except DamagedError as error:
                log(str(error))
        newest = sound[max(sound)] if sound else None
        if newest is not None:
            # What restarts have cost still counts if the run goes back to an earlier checkpoint.
            totals = newest.facts["figures"]
            self._restart_totals = {name: totals[name] for name in ("restarts", "lost_updates")}
        is_beginning = not numbers or any(snapshot.version == 0 for snapshot in sound.values())
        self._core.state.kept = tuple(sound)
        generations = (*[0] * is_beginning, *sound)
        return Offer(0, generations, self.number, done=newest is not None and newest.done)

    def _go_back(self, restore: Restore, generation: int, newest: int, now: float) -> None:
        """Go back to the checkpoint ``generation``. Raises ResumeError if it cannot be read any more."""
        self.number = newest
        if generation == 0:
            self._begin_afresh(restore, now)
            return
        try:
            snapshot = read_checkpoint(self._folder, generation)
        except DamagedError as error:
            raise ResumeError(str(error)) from error
        snapshot.facts["figures"] |= self._restart_totals
        restore(snapshot, now)
        self._core.state.kept = tuple(number for number in self._core.state.kept if number <= generation)

    # ---- writing -------------------------------------------------------------------------------------------------

    def hear(self, common: tuple[int, ...]) -> None:
        """Note the checkpoints that all shards have, as a worker says. Believe it only if this shard has them."""
        if common and max(common) > max(self._common, default=0) and {*common} <= {*self._core.state.kept}:
            self._common = common

    @property
    def backoff_factor(self) -> int:
        """How many times longer than usual to wait before the next checkpoint.

        Beyond the first KEPT, the factor doubles with each checkpoint that not all shards are known to have. Workers
        tell a shard what the others have. Without this factor, slow workers, or one shard with a full disk, would make
        the other shards keep too many checkpoints.
        """
        pending = [number for number in self._core.state.kept if number > max(self._common, default=0)]
        return 1 if self._core.settings.shards == 1 else 1 << max(0, len(pending) - KEPT)

    def write(self, number: int) -> None:
        """Begin to write the core's present state, once the checkpoint before it is written."""
        self.wait()
        self._core.settle()
        if not self._core.master.is_finite:
            log("the parameters are not finite, and no checkpoint is written of them; the one before stays")
            return
        self._core.state.generation = self.number = number
        self._written = self._core.snapshot(reuse=self._written)
        self._thread = Thread(target=self._write, args=(number, self._written), name="danaz-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._thread.is_alive():
            self._thread.join()

    def delete(self) -> None:
        """Delete all checkpoints of a complete run. Those from before training diverged stay for the user."""
        self.wait()
        delete_checkpoints(self._folder, but=self._core.state.sound)

    def count_restart(self, restarts: int = 1, lost_updates: int = 0) -> None:
        """Tell the core what restarts have cost, including restarts after which no checkpoint was written."""
        counted, lost = read_restarts(self._folder)
        counted, lost = counted + restarts, lost + lost_updates
        totals = self._core.totals
        totals.restarts, totals.lost_updates = max(totals.restarts, counted), max(totals.lost_updates, lost)
        try:
            write_restarts(self._folder, totals.restarts, lost)
        except OSError as error:
            log(f"this restart could not be counted: {error}. Training goes on")

    def _write(self, number: int, snapshot: Snapshot) -> None:
        kept = [*self._core.state.kept, number]
        common = self._common if self._core.settings.shards > 1 else kept[-KEPT:]
        keep = sorted({*worth_keeping(kept, common), *self._core.state.sound})
        try:
            write_checkpoint(self._folder, number, snapshot, keep)
        except OSError as error:
            if not self._in_trouble:
                log(
                    f"checkpoint {number} could not be written: {error.strerror}. Training goes on, and the checkpoint "
                    "before it stays; those to come are tried without further words"
                )
            self._in_trouble = True
        else:
            if self._in_trouble:
                log(f"checkpoints can be written again: {number} is")
            self._in_trouble = False
            self._core.state.kept = tuple(keep)


class RunKeeper:
    """Makes a server core that writes its run folder and can go on after a kill at any moment.

    Each line of the journal is handed to the kernel before the worker hears of its update. A checkpoint is written at
    once when something happens that must not be undone, and otherwise at regular intervals while training goes on.
    """

    def __init__(self, writer: RunWriter, settings: ServerSettings):
        self.core = ServerCore(
            settings,
            self._update,
            on_milestone=lambda core: self._keep_milestone(),
            on_notice=log,
            on_carried=self._hear,
            on_report=self._keep_reported,
        )
        self._writer = writer
        self._checkpoints = Checkpoints(writer.path, self.core)
        self._every_s = settings.checkpoint_s
        self._due_at = time.monotonic() + self._every_s
        self._journal_life = 0  # the life that the end of the journal belongs to
        self._is_undecided = False  # whether the checkpoint to go on from is still to be chosen

    def begin(self) -> ServerCore:
        """Return the core of a new run."""
        return self._checkpoints.begin()

    def resume(self) -> ServerCore | AwaitingRollback:
        """Resume the run from a checkpoint, if there is one. Return what serves it. Raises ResumeError."""
        self._is_undecided = True
        self._checkpoints.count_restart()
        return self._checkpoints.resume(self._restore)

    def finish(self) -> None:
        """Write the results, and delete the checkpoints if the run is complete. Any other run can be resumed.

        If the results cannot be written, the run can be resumed, too. Raises UnwrittenError.
        """
        if self._is_undecided:
            return
        if self.core.started and self.core.recovery is None and not self.core.finished:
            self._keep_milestone()
        self.core.settle()
        self._writer.finish(self.core)
        if self.core.finished:
            self._checkpoints.delete()

    def _restore(self, snapshot: Snapshot | None, now: float) -> None:
        self._is_undecided = False
        if snapshot is None:
            self._checkpoints.count_restart(0, lost_updates=self._writer.cut_journal(0))
            self._writer.forget_reported()  # scripts will report it again
        else:
            journal = self._writer.read_journal(after=snapshot.version)
            self.core.restore(snapshot, journal, life=self._checkpoints.number, now=now)
            self._checkpoints.count_restart(0)
            self.core.totals.reported |= self._writer.read_reported()

    # ---- what the core calls -------------------------------------------------------------------------------------

    def _update(self, update: Update) -> None:
        self._writer.record(update)
        if self._every_s and time.monotonic() >= self._due_at and not self._checkpoints.busy:
            self._begin_to_write()

    def _hear(self, message: Push | Leave) -> None:
        if isinstance(message, Push):
            self._checkpoints.hear(message.common)

    def _keep_reported(self, reported: Mapping[str, float | str | None]) -> None:
        """Keep reported figures. They get no checkpoint of their own, because there may be many reports."""
        try:
            self._writer.keep_reported(reported)
        except OSError as error:
            log(f"reported figures could not be written yet: {error}. They are kept in memory for summary.json")

    def _keep_milestone(self) -> None:
        if self._journal_life != self.core.life:
            self._journal_life = self.core.life
            self._writer.cut_journal(self.core.master.version)
        if self._every_s:
            self._begin_to_write()
            self._checkpoints.wait()

    def _begin_to_write(self) -> None:
        self._checkpoints.write(self._checkpoints.number + 1)
        self._due_at = time.monotonic() + self._every_s * self._checkpoints.backoff_factor


class ShardKeeper:
    """Makes the core of a shard other than 0. It writes a checkpoint for each one of shard 0, and one at the end.

    Workers tell it of shard 0's checkpoints. What a worker does after a checkpoint of shard 0 must come after this
    shard's checkpoint with the same number, too.
    """

    def __init__(self, run: Path, settings: ServerSettings):
        self.core = ServerCore(
            settings, on_milestone=lambda core: self._keep_milestone(), on_notice=log, on_carried=self._hear
        )
        self._checkpoints = Checkpoints(run, self.core)
        self._keeps = settings.checkpoint_s > 0

    def begin(self) -> ServerCore:
        """Return the core of a new run."""
        return self._checkpoints.begin()

    def resume(self) -> ServerCore | AwaitingRollback:
        """Resume the run. Return what serves it until a worker names the checkpoint."""
        return self._checkpoints.resume(self._restore)

    def finish(self) -> None:
        """End the process, and delete the checkpoints if the run is complete. Any other run can be resumed."""
        self._checkpoints.wait()
        if self.core.finished:
            self._checkpoints.delete()

    def _restore(self, snapshot: Snapshot | None, now: float) -> None:
        if snapshot is not None:
            self.core.restore(snapshot, [], life=self._checkpoints.number, now=now)

    # ---- what the core calls -------------------------------------------------------------------------------------

    def _hear(self, message: Push | Leave) -> None:
        if isinstance(message, Push):
            self._checkpoints.hear(message.common)
        if self._keeps and self.core.state.generation < message.generation <= self._largest:
            self._checkpoints.write(message.generation)

    @property
    def _largest(self) -> int:
        """The largest number that shard 0 can have reached since workers last named one, an update or two ago."""
        return self._checkpoints.number + AT_ONCE * (1 + len(self.core.members))

    def _keep_milestone(self) -> None:
        """Write the final state: once a worker may have the final parameters of this shard, nothing may change them."""
        if self._keeps and self.core.state.final:
            self._checkpoints.write(self._checkpoints.number + 1)
            self._checkpoints.wait()


def log(text: str) -> None:
    """Print ``text`` on standard error, for the person who watches the run."""
    print(f"danaz server: {text}", file=sys.stderr, flush=True)
