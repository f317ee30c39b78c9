"""Records a live run: every message and tick that reached the core, with its time, so that a new core can replay it.

The file begins with [length u32 | the settings, JSON]. A record is [time f64 | route length u32 | number of frames u32
| frame lengths u64 … | route | frames …], little endian; a record without frames is a tick. A replay gives the same
replies and parameters, bit for bit.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from danaz.protocol.messages import Replies, Request
from danaz.protocol.wire import Frame, WireError, decode
from danaz.server.core import ServerCore
from danaz.serving.journal import Tell, tell_on_stderr

LENGTH = struct.Struct("<I")
HEAD = struct.Struct("<dII")


class RecordingError(ValueError):
    """The file is not a recording, or it is damaged."""


class Recorder:
    """Writes records to a file. If the disk does not take one, it tells the user, and the recording ends."""

    def __init__(self, path: Path, settings: str, tell: Tell = tell_on_stderr):
        self._path, self._tell = path, tell
        self._file: BinaryIO | None = None
        with self._told():
            self._file = path.open("wb", buffering=0)
            self._write(LENGTH.pack(len(settings.encode())) + settings.encode())

    def record(self, now: float, route: bytes = b"", frames: Sequence[Frame] = ()) -> None:
        """Record a message that came by ``route``, or a tick."""
        lengths = [len(frame) for frame in frames]
        head = HEAD.pack(now, len(route), len(frames)) + struct.pack(f"<{len(frames)}Q", *lengths) + route
        with self._told():
            self._write(head)
            for frame in frames:
                self._write(frame)

    def close(self) -> None:
        if self._file is not None:
            with self._told():
                self._file.close()

    def _write(self, data: Frame) -> None:
        rest = memoryview(data).cast("B")
        while self._file is not None and rest:
            rest = rest[self._file.write(rest) :]

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            file, self._file = self._file, None
            if file is not None:
                with suppress(OSError):
                    file.close()
            self._tell(f"{self._path} cannot be written: {error.strerror}. Training goes on; the recording ends here")


def recorded_settings(path: Path) -> str:
    """Return the settings of the recorded server. Raises RecordingError, FileNotFoundError."""
    with path.open("rb") as file:
        return _read_settings(file, path)


def _read_settings(file: BinaryIO, path: Path) -> str:
    head = file.read(LENGTH.size)
    length: int = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else -1
    if not 0 <= length <= _left(file):
        raise RecordingError(f"{path} is no whole recording: it breaks off before the first message")
    try:
        return file.read(length).decode()
    except UnicodeDecodeError as error:
        raise RecordingError(f"{path} is no recording: {error}") from None


def _left(file: BinaryIO) -> int:
    """Return the number of bytes from here to the end."""
    return os.fstat(file.fileno()).st_size - file.tell()


def read_recording(path: Path) -> Iterator[tuple[float, bytes, list[bytearray]]]:
    """Yield (time, route, frames) of each record. One that was cut short by a kill ends the recording.

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
    """Feed a recording to a new ``core``. Yield the replies to each record. Raises RecordingError."""
    for number, (now, route, frames) in enumerate(read_recording(path), 1):
        try:
            message = decode(frames, Request) if frames else None
        except WireError as error:
            raise RecordingError(f"{path} is damaged: its record {number} is no message ({error})") from None
        yield core.tick(now) if message is None else core.handle(route, message, now)
