"""The server process."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import zmq

from danaz.settings import Settings

RECORDING = "recording.bin"


def serve(socket: zmq.Socket[bytes], settings: Settings, run: Path, record: bool) -> None:
    """Serve one run on a bound ROUTER socket, write its folder, and return when it is over or on SIGTERM."""
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
    recorder = Recorder(run / RECORDING) if record else None
    Router(socket).serve(core, recorder, lambda: stopping)
    if recorder:
        recorder.close()
    folder.finish(core)
    socket.close()
