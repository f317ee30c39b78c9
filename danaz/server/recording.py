"""A live run, kept so that a fresh core can be fed the same: every event that reached the core, with its time.

The file begins with [length u32 | the settings, JSON]. A record is [time f64 | route length u32 | number of frames u32
| frame lengths u64 … | route | frames …], little endian; one without frames is a tick. Replaying gives the same replies
and parameters, bit for bit.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from danaz.server.answers import Replies
from danaz.server.core import ServerCore
from danaz.server.messages import Request
from danaz.server.wire import Frame, decode

LENGTH = struct.Struct("<I")
HEAD = struct.Struct("<dII")


class Recorder:
    """Appends events to a file."""

    def __init__(self, path: Path, settings: str):
        self._file: BinaryIO = path.open("wb")
        self._file.write(LENGTH.pack(len(settings.encode())) + settings.encode())

    def event(self, now: float, route: bytes = b"", frames: Sequence[Frame] = ()) -> None:
        lengths = [len(frame) for frame in frames]
        self._file.write(HEAD.pack(now, len(route), len(frames)) + struct.pack(f"<{len(frames)}Q", *lengths) + route)
        for frame in frames:
            self._file.write(frame)

    def close(self) -> None:
        self._file.close()


class RecordingError(ValueError):
    """A file that is no recording."""


def recorded_settings(path: Path) -> str:
    """The settings that the server was recorded with. Raises RecordingError."""
    with path.open("rb") as file:
        return _read_settings(file, path)


def _read_settings(file: BinaryIO, path: Path) -> str:
    head = file.read(LENGTH.size)
    length: int = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else -1
    if not 0 <= length <= _left(file):
        raise RecordingError(f"{path} is no recording: it ends within the settings that it should begin with")
    try:
        return file.read(length).decode()
    except UnicodeDecodeError as error:
        raise RecordingError(f"{path} is no recording: {error}") from None


def _left(file: BinaryIO) -> int:
    """Bytes from here to the end."""
    return os.fstat(file.fileno()).st_size - file.tell()


def read_recording(path: Path) -> Iterator[tuple[float, bytes, list[bytearray]]]:
    """The (time, route, frames) of each event. A record cut short by a kill ends the recording.

    Raises RecordingError.
    """
    with path.open("rb") as file:
        _read_settings(file, path)
        while len(head := file.read(HEAD.size)) == HEAD.size:
            now, route_length, count = HEAD.unpack(head)
            table = file.read(8 * count)
            if len(table) < 8 * count:
                return
            lengths = struct.unpack(f"<{count}Q", table)
            if route_length + sum(lengths) > _left(file):
                return
            route = file.read(route_length)
            frames = [bytearray(file.read(length)) for length in lengths]
            yield now, route, frames


def replay(path: Path, core: ServerCore) -> Iterator[Replies]:
    """Feed a recording to a fresh ``core``; yields the replies to each event."""
    for now, route, frames in read_recording(path):
        yield core.handle(route, decode(frames, Request), now) if frames else core.tick(now)
