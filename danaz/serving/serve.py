"""Serves a run, or a shard of it, in a process of its own; and replays a recording."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from danaz.run.settings import Settings
from danaz.run.signals import note_ending_signals
from danaz.serving.socket import BoundRouter

if TYPE_CHECKING:
    from danaz.server.records import Update
    from danaz.server.settings import ServerSettings

RECORDING = "recording.bin"
UNTIL_RESTART = "recording.until-restart.bin"  # cannot be replayed to the end, because it lacks the restart


def serve(bound: BoundRouter, settings: Settings, run: Path, record: bool, resume: bool = False) -> None:
    """Serve one run on a bound ROUTER, and write its folder. Return when the run is over, or on SIGTERM.

    With ``resume``, go on from the newest sound checkpoint in the folder; with several shards, a worker chooses which
    checkpoint to restore. If the run is complete, only tell this to workers that do not know it yet. Raises
    ResumeError, UnwrittenError, UnreadableError.
    """
    from danaz.serving.journal import RunWriter
    from danaz.serving.keeper import RunKeeper, log
    from danaz.serving.progress import with_progress
    from danaz.serving.recording import Recorder
    from danaz.serving.router import Router

    stopping = note_ending_signals()
    if resume and _see_off(bound, run, stopping):
        return
    keeper = RunKeeper(RunWriter(run, settings.facts(), log), _settings_here(settings))
    keeper.core.on_update = with_announcement(with_progress(keeper.core, keeper.core.on_update))
    served = keeper.resume() if resume else keeper.begin()
    if keeper.core.started and (run / RECORDING).exists():
        (run / RECORDING).rename(run / UNTIL_RESTART)
        log(f"the recording ends here, as {UNTIL_RESTART}: a run that was restarted cannot be replayed")
        record = False
    recorder = Recorder(run / RECORDING, settings.to_json(), log) if record else None
    Router(bound).serve(served, recorder, stopping)
    if recorder:
        recorder.close()
    keeper.finish()
    bound.close()


def serve_shard(bound: BoundRouter, settings: Settings, shard: int, run: Path, resume: bool = False) -> None:
    """Serve a shard other than 0, as ``serve`` does for shard 0. Write only its checkpoints into the folder.

    At the end, workers carry this shard's part of the parameters to shard 0.
    """
    from danaz.serving.keeper import ShardKeeper
    from danaz.serving.router import Router

    stopping = note_ending_signals()
    keeper = ShardKeeper(run, _settings_here(settings, shard))
    served = keeper.resume() if resume else keeper.begin()
    Router(bound).serve(served, None, stopping)
    keeper.finish()
    bound.close()


def _settings_here(settings: Settings, shard: int = 0) -> ServerSettings:
    """Return the settings of a server core on this machine, with the size of its memory."""
    from danaz.protocol.memory import machine_bytes

    return replace(settings.for_server(shard=shard), memory_bytes=machine_bytes())


def _see_off(bound: BoundRouter, run: Path, stopping: Callable[[], bool]) -> bool:
    """Return whether the run is complete. If it is, first tell the workers that do not know it yet."""
    from danaz.run.folder import read_summary
    from danaz.server.completed import CompletedRun
    from danaz.serving.checkpoint import delete_checkpoints, folder_of
    from danaz.serving.keeper import log
    from danaz.serving.router import Router

    summary = read_summary(run) if (run / "summary.json").exists() else {}
    if not summary.get("complete"):
        return False
    log(f"the run in {run} is complete; its workers are seen off")
    if not summary.get("diverged"):  # otherwise the checkpoints from before it diverged stay
        delete_checkpoints(folder_of(run))
    Router(bound).serve(CompletedRun(), None, stopping)
    bound.close()
    return True


def with_announcement(record: Callable[[Update], None]) -> Callable[[Update], None]:
    """Return a function that calls ``record``, and at the first update tells the launcher that training has begun."""
    announced = False

    def note(update: Update) -> None:
        nonlocal announced
        if not announced:
            announced = True
            print("DANAZ_TRAINS=1", flush=True)
        record(update)

    return note


def replay_run(run: Path) -> tuple[int, bool]:
    """Replay the recording in ``run``. Return the number of updates, and whether it gives the run's parameters.

    Raises RecordingError, UnreadableError for files that are missing or damaged.
    """
    import torch

    from danaz.files.reading import UnreadableError, read_tensors
    from danaz.run.folder import read_summary
    from danaz.server.core import ServerCore
    from danaz.serving.recording import RecordingError, recorded_settings, replay

    path = run / RECORDING
    summary, saved = read_summary(run), read_tensors(run / "parameters.safetensors")
    try:
        settings = Settings.from_json(recorded_settings(path))
    except OSError as error:
        why = "there is none; `danaz launch --record` makes one" if not path.exists() else error.strerror
        raise UnreadableError(path, why) from None
    except TypeError as error:
        raise RecordingError(f"{path} is no recording of this version of danaz: {error}") from None
    core = ServerCore(settings.for_server())
    for _ in replay(path, core):
        pass
    updates = core.totals.updates
    if not core.started:
        raise RecordingError(f"{path} holds no training")
    if updates != summary.get("updates"):
        raise RecordingError(f"{path} is cut short: it holds {updates} of the {summary.get('updates')} updates")
    replayed = core.job.layout.named(core.master.params, core.mean_buffers())
    same = saved.keys() == replayed.keys() and all(torch.equal(saved[name], replayed[name]) for name in saved)
    return updates, same
