"""The server process."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from danaz.server.socket import BoundRouter
from danaz.settings import Settings

if TYPE_CHECKING:
    from danaz.server.figures import Update

RECORDING = "recording.bin"


def serve(bound: BoundRouter, settings: Settings, run: Path, record: bool, resume: bool = False) -> None:
    """Serve one run on a bound ROUTER, write its folder, and return when it is over or on SIGTERM."""
    from danaz.run_folder import RunFolder
    from danaz.server.core import ServerCore
    from danaz.server.recording import Recorder
    from danaz.server.router import Router

    stopping = False

    def stop(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    folder = RunFolder(run, settings.facts())
    core = ServerCore(settings.for_server(), on_update=folder.record)
    core.on_update = announcing(core.on_update)
    recorder = Recorder(run / RECORDING, settings.to_json()) if record else None
    Router(bound).serve(core, recorder, lambda: stopping)
    if recorder:
        recorder.close()
    folder.finish(core)
    bound.close()


def announcing(record: Callable[[Update], None]) -> Callable[[Update], None]:
    """``record``, and with the first update the word to the launcher that training waits for nobody any more."""
    announced = False

    def note(update: Update) -> None:
        nonlocal announced
        if not announced:
            announced = True
            print("DANAZ_TRAINS=1", flush=True)
        record(update)

    return note


def replay_run(run: Path) -> tuple[int, bool]:
    """Replay the recording in ``run``; returns the number of updates and whether the parameters are its own.

    Raises FileNotFoundError if there is no recording.
    """
    import torch
    from safetensors.torch import load_file

    from danaz.server.core import ServerCore
    from danaz.server.recording import recorded_settings, replay

    settings = Settings.from_json(recorded_settings(run / RECORDING))
    core = ServerCore(settings.for_server())
    for _ in replay(run / RECORDING, core):
        pass
    saved = load_file(run / "parameters.safetensors")
    replayed = core.job.layout.named(core.master.params, core.mean_buffers())
    return core.figures.updates, all(torch.equal(saved[name], tensor) for name, tensor in replayed.items())
