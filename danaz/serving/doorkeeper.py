"""Limits what a connection may cost the server before ZeroMQ hands over one of its messages.

ZeroMQ limits the size of a frame and the number of whole messages that wait. It does not limit the number of frames in
a message, nor the number of connections. So a thread watches each connection through a descriptor of its own, and cuts
those that cost too much. A worker whose connection is cut connects again by itself.

With N keys, strangers (peers that do not finish the handshake) can hold MAX_STRANGERS frames in all. A worker can hold
MAX_UNREAD bytes in each of its WORKER_CONNECTIONS, and as much in each connection that has not sent a message yet, of
which there are at most 2 N + SPARE.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import termios
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

HEARD = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED
MAX_STRANGERS = 12  # connections that have not finished the handshake, each of which can hold a frame
MAX_UNREAD = 12 << 20  # bytes received on a connection since its last message: the most that ZeroMQ receives ahead
WORKER_CONNECTIONS = 4  # connections with one key: two in use, and two left over when the network broke
SPARE = 8  # connections without a message yet, in addition to two for each key
LOOK_MS = 50  # time between two looks at all connections
EVENTS = 100  # the most events handled between two looks

# The server sends a greeting, a WELCOME if the peer knows its public key, and a READY if it admits the peer.
WELCOMED_BYTES = 64 + 170
ADMITTED_BYTES = WELCOMED_BYTES + 32  # an ERROR, sent instead of READY, is shorter

COUNTERS = struct.Struct("=120xQQ")  # from Linux's struct tcp_info: bytes acked, bytes received


@dataclass
class Connection:
    """A connection that the server accepted."""

    number: int  # connections are numbered in the order they were accepted
    handle: socket.socket  # a descriptor of its own, which no other connection gets while it is open
    admitted: bool
    key: str | None = None  # the key of its messages; None before the first
    said: int = 0  # messages that the router took
    said_at: int = 0  # a count that grows with each message of any connection
    noticed: int = -1  # the value of ``said`` at the last look
    base: int = 0  # bytes received when ``said`` last changed
    unread: int = 0  # bytes received since
    cut_off: bool = False

    def look(self) -> None:
        """Bring the figures up to date. If the connection is closed, they stay as they are."""
        with suppress(OSError):
            acked, received = COUNTERS.unpack_from(self.handle.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
            (in_kernel,) = struct.unpack("i", fcntl.ioctl(self.handle, termios.FIONREAD, bytes(4)))
            said, here = self.said, received - in_kernel
            if said != self.noticed:
                self.noticed, self.base = said, here if said else 0
            self.unread = here - self.base
            self.admitted = self.admitted or acked > ADMITTED_BYTES

    def cut(self) -> None:
        """Shut the connection down. ZeroMQ then finds it closed, and frees what it holds."""
        self.cut_off = True
        with suppress(OSError):
            self.handle.shutdown(socket.SHUT_RDWR)


class Doorkeeper:
    """Watches the connections of a socket that is about to be bound. Call ``close`` before the socket is closed."""

    def __init__(self, watched: zmq.Socket[bytes], keys: int | None):
        """``keys`` is the number of keys that the server admits. With None it admits everyone: nobody is a stranger."""
        self._watched = watched
        self._keys = keys
        self._connections: dict[int, Connection] = {}  # by ZeroMQ's descriptor
        self._accepted = self._said = 0
        self._events = watched.get_monitor_socket(HEARD)
        self._thread = threading.Thread(target=self._watch, name="danaz-doorkeeper", daemon=True)
        self._thread.start()

    def note_message(self, descriptor: int, key: str) -> None:
        """Note that the router has taken a message of this connection, which was made with ``key``."""
        connection = self._connections.get(descriptor)
        if connection is not None:
            self._said += 1
            connection.key, connection.said, connection.said_at = key, connection.said + 1, self._said

    def close(self) -> None:
        """Stop watching."""
        self._watched.disable_monitor()
        self._thread.join()
        for connection in self._connections.values():
            connection.handle.close()

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while self._hear():
            self._look()
        self._events.close(linger=0)

    def _hear(self) -> bool:
        """Handle events until it is time to look again. Return False at the end."""
        wait_ms = LOOK_MS
        for _ in range(EVENTS):
            if not self._events.poll(wait_ms):
                break
            event = recv_monitor_message(self._events)
            if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                return False
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._accept(int(event["value"]))
            else:
                self._forget(int(event["value"]))
            wait_ms = 0
        return True

    def _accept(self, descriptor: int) -> None:
        self._forget(descriptor)
        with suppress(OSError):  # the connection is closed already
            handle = socket.socket(fileno=os.dup(descriptor))
            self._accepted += 1
            is_known = self._keys is None or handle.family == socket.AF_UNIX  # the kernel counts no bytes there
            self._connections[descriptor] = Connection(self._accepted, handle, admitted=is_known)

    def _forget(self, descriptor: int) -> None:
        connection = self._connections.pop(descriptor, None)
        if connection is not None:
            connection.handle.close()

    def _look(self) -> None:
        here = [each for each in self._connections.values() if not each.cut_off]
        for connection in here:
            connection.look()
        for connection in here:
            if connection.unread > MAX_UNREAD:
                connection.cut()
        if self._keys is None:
            return
        here = [each for each in here if not each.cut_off]
        _cut_oldest([each for each in here if not each.admitted], MAX_STRANGERS)
        _cut_oldest([each for each in here if each.admitted and each.key is None], 2 * self._keys + SPARE)
        for key in {each.key for each in here} - {None}:
            _cut_oldest([each for each in here if each.key == key], WORKER_CONNECTIONS)


def _cut_oldest(connections: Iterable[Connection], most: int) -> None:
    """Cut all but ``most`` connections: keep those that sent a message last or, among silent ones, came last."""
    latest_first = sorted(connections, key=lambda each: (each.said_at, each.number), reverse=True)
    for connection in latest_first[most:]:
        connection.cut()
