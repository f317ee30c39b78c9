"""Messages as JSON lines over two non-blocking pipes, so that each end always notices when the other is gone."""

from __future__ import annotations

import json
import math
import os
import select
from collections.abc import Iterable
from typing import Any

__all__ = ["ORDER_BYTES", "Channel", "ChannelError", "Message", "bytes_to_text", "text_to_bytes", "wait_ready"]

Message = dict[str, Any]
READ_BYTES = 1 << 16
REPORT_BYTES = 4 << 20  # more than the largest valid report, a piece of a file, takes as JSON
SHOWN_BYTES = 400  # how much of an invalid message is shown
ORDER_BYTES = 64 << 20  # an order holds whole environments
MAX_NOISE_BYTES = 1 << 16  # allowed before the first message


class ChannelError(Exception):
    """The other end wrote something that is not a message.

    The text of the error is what it wrote, as a noun phrase: `a report of the kind 'x'`.
    """


class Channel:
    """One end of a conversation. `send` never blocks: it buffers what the pipe does not take yet.

    `pending_bytes` is the size of that buffer.
    """

    def __init__(
        self, read_fd: int, write_fd: int, longest_bytes: int = REPORT_BYTES, awaits: Message | None = None
    ) -> None:
        """A line longer than `longest_bytes` is not a message, and is dropped.

        Everything before the first message that holds all of `awaits` is noise, such as the output of a login script,
        and is skipped.
        """
        self.read_fd, self.write_fd = read_fd, write_fd
        self.longest_bytes = longest_bytes
        self.noise = ""  # the last line of noise
        self._awaits, self._noise_bytes = awaits, 0
        self.closed = False  # nothing more will come
        self.broken = False  # nothing more can be sent
        self._received = bytearray()
        self._unsent = bytearray()
        os.set_blocking(read_fd, False)
        os.set_blocking(write_fd, False)

    @property
    def pending_bytes(self) -> int:
        return len(self._unsent)

    def send(self, message: Message) -> None:
        self._unsent += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Write as much as the pipe takes now."""
        try:
            while self._unsent and not self.broken:
                del self._unsent[: os.write(self.write_fd, self._unsent)]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.broken = True
        if self.broken:
            self._unsent.clear()

    def receive(self) -> list[Message]:
        """Return the complete messages that have arrived. Raises ChannelError at an invalid line or much noise."""
        try:
            data = os.read(self.read_fd, READ_BYTES)
        except BlockingIOError:
            return []
        self.closed = not data
        self._received += data
        *lines, rest = self._received.split(b"\n")
        if len(rest) > self.longest_bytes:
            self._received.clear()
            raise ChannelError(f"a line of more than {self.longest_bytes >> 20} MB: {_shown(rest)}")
        self._received = rest
        messages = [_parse(line) for line in lines if not self._is_noise(line)]
        if self._awaits is not None and self._noise_bytes + len(rest) > MAX_NOISE_BYTES:
            raise ChannelError(self.noise or _shown(rest))
        return messages

    def _is_noise(self, line: bytearray) -> bool:
        if self._awaits is None:
            return False
        message = _message(line)
        if message is not None and self._awaits.items() <= message.items():
            self._awaits = None
            return False
        self._noise_bytes += len(line) + 1
        self.noise = _shown(line) or self.noise
        return True


def _parse(line: bytearray) -> Message:
    message = _message(line)
    if message is None:
        raise ChannelError(_shown(line))
    return message


def _shown(line: bytearray) -> str:
    return line[:SHOWN_BYTES].decode(errors="backslashreplace").strip()


def _message(line: bytearray) -> Message | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def bytes_to_text(data: bytes) -> str:
    """Turn any bytes into text that JSON can carry.

    `text_to_bytes` returns the same bytes, even if they were cut within a character.
    """
    return data.decode("utf-8", "surrogateescape")


def text_to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def wait_ready(read_fds: Iterable[int], write_fds: Iterable[int], timeout_s: float) -> tuple[set[int], set[int]]:
    """Wait until a descriptor is ready or the time is over.

    Return the descriptors that can be read (or are at their end), and those that can be written.
    """
    poll = select.poll()  # select.select cannot take descriptors from 1024 on
    wanted: dict[int, int] = dict.fromkeys(read_fds, select.POLLIN)
    for fd in write_fds:
        wanted[fd] = wanted.get(fd, 0) | select.POLLOUT
    for fd, events in wanted.items():
        poll.register(fd, events)
    found = poll.poll(None if timeout_s == math.inf else max(0, math.ceil(timeout_s * 1000)))
    gone = select.POLLHUP | select.POLLERR
    readable = {fd for fd, got in found if got & (select.POLLIN | gone) and wanted[fd] & select.POLLIN}
    writable = {fd for fd, got in found if got & (select.POLLOUT | gone) and wanted[fd] & select.POLLOUT}
    return readable, writable
