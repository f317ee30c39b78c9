"""JSON lines over two pipes that never block, so that each end always notices when the other is gone."""

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
REPORT_BYTES = 4 << 20  # more than the largest honest report, a piece of a file, has as JSON
SHOWN_BYTES = 400  # of what is no message
ORDER_BYTES = 64 << 20  # an order holds whole environments


class ChannelError(Exception):
    """The other end wrote something that is not a message: for example a login script that prints a greeting.

    What it wrote is the message of the error, without a verb: `a report of the kind 'x'`.
    """


class Channel:
    """One end of a conversation. `send` never blocks: what the pipe does not take yet waits in `pending_bytes`."""

    def __init__(self, read_fd: int, write_fd: int, longest_bytes: int = REPORT_BYTES) -> None:
        """`longest_bytes`: a line that is longer is no message, and is not kept."""
        self.read_fd, self.write_fd = read_fd, write_fd
        self.longest_bytes = longest_bytes
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
        """The messages that have come whole. Raises ChannelError on a line that is none."""
        try:
            data = os.read(self.read_fd, READ_BYTES)
        except BlockingIOError:
            return []
        self.closed = not data
        self._received += data
        *lines, rest = self._received.split(b"\n")
        if len(rest) > self.longest_bytes:
            self._received.clear()
            raise ChannelError(f"a line of more than {self.longest_bytes >> 20} MB: {_as_text(rest)}")
        self._received = rest
        return [_parse(line) for line in lines]


def _parse(line: bytearray) -> Message:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ChannelError(_as_text(line))
    return message


def _as_text(line: bytearray) -> str:
    return line[:SHOWN_BYTES].decode(errors="backslashreplace")


def bytes_to_text(data: bytes) -> str:
    """Any bytes as text that JSON can carry; `text_to_bytes` gives the same bytes back, wherever they were cut."""
    return data.decode("utf-8", "surrogateescape")


def text_to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def wait_ready(read_fds: Iterable[int], write_fds: Iterable[int], timeout_s: float) -> tuple[set[int], set[int]]:
    """The descriptors that can be read (or are at their end) and written, once there is one or the time is over."""
    poll = select.poll()  # not select.select, which takes no descriptor from 1024 on
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
