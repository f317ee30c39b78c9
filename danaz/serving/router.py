"""The ROUTER loop: the only place on the server that reads a socket and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil

import torch
import zmq
from torch import Tensor

from danaz.protocol.inbox import Inbox, StrayChunkError
from danaz.protocol.messages import Fetched, Final, Progress, Push, Refusal, Request, Streamed, Streams
from danaz.protocol.wire import Frame, WireError, count_messages, encode, split
from danaz.server.completed import CompletedRun
from danaz.server.core import ServerCore
from danaz.server.rollback import AwaitingRollback
from danaz.serving.recording import Recorder
from danaz.serving.socket import ANSWERS_MESSAGES, BoundRouter

TICK_S = 0.25
MAX_FRAMES = 8  # the most frames of a message that are kept; every real message has fewer
# The most answers that a connection may leave unread. ZeroMQ reports what was read only for half of them at a time.
ANSWERS_WAITING = 4
Served = ServerCore | AwaitingRollback | CompletedRun
Peer = tuple[bytes, str]  # a connection, and the key it was made with


class Router:
    """Feeds a core from a bound ROUTER, and sends what it answers."""

    def __init__(self, bound: BoundRouter):
        self._socket = bound.socket
        self._doorkeeper = bound.doorkeeper
        self._worker_of_key = bound.worker_of_key
        self._rooms: dict[int, Tensor] = {}  # worker -> f32[P], the memory that receives its pushes
        self._leaving: dict[bytes, tuple[int, zmq.MessageTracker]] = {}  # route -> request, start of its answer
        self._longest_answer = ANSWERS_MESSAGES // ANSWERS_WAITING  # in messages

    def serve(self, core: Served, recorder: Recorder | None, stop: Callable[[], bool]) -> None:
        """Feed ``core`` until it has finished or ``stop()`` is true."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        inbox = Inbox(Request, self._takes(core), self._make_room)
        next_tick = time.monotonic() + TICK_S
        while not (core.finished or stop()):
            wait_s = max(0.0, next_tick - time.monotonic())
            if poller.poll(ceil(wait_s * 1000)):
                self._receive(core, inbox, recorder)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK_S
                if recorder:
                    recorder.record(now)
                self._send(core.stream_tick(now))

    # ---- receiving -----------------------------------------------------------------------------------------------

    def _receive(self, core: Served, inbox: Inbox, recorder: Recorder | None) -> None:
        route, *frames = self._receive_message()
        self._doorkeeper.note_message(route.get(zmq.SRCFD), self._key_of(route))
        now = time.monotonic()
        try:
            message = self._read(inbox, route, [frame.buffer for frame in frames])
        except StrayChunkError as error:
            core.refuse(str(error))  # no answer: the sender may be healthy and about to send the message again
            return
        except WireError as error:
            core.refuse(str(error))
            self._send([(route.bytes, Refusal(0, str(error), rejoin=False))])
            return
        if message is None:
            return
        if recorder:
            recorder.record(now, route.bytes, encode(message))
        self._send(core.stream(route.bytes, message, now))

    def _receive_message(self) -> list[zmq.Frame]:
        """Return the route and the frames of the next message. Receive frames beyond MAX_FRAMES, but drop them."""
        frames = [self._socket.recv(copy=False)]
        last = frames[0]
        while last.more:
            last = self._socket.recv(copy=False)
            if len(frames) <= MAX_FRAMES:
                frames.append(last)
        return frames

    def _key_of(self, route: zmq.Frame) -> str:
        return "" if self._worker_of_key is None else str(route.get("User-Id"))

    def _read(self, inbox: Inbox, route: zmq.Frame, buffers: Sequence[Frame]) -> Request | None:
        """Return the message that these buffers complete, or None while more is to come.

        Raises WireError if it cannot be read, or if the sender's key does not belong to the worker it names.
        """
        peer = (route.bytes, self._key_of(route))
        try:
            message: Request | None = inbox.take(peer, buffers)
        except StrayChunkError:
            raise
        except WireError as error:
            raise WireError(f"unreadable: {error}") from error
        if message is not None and not self._owns_key(peer, message):
            raise WireError("worker number is not the one of this key")
        return message

    def _owns_key(self, peer: Peer, message: Request) -> bool:
        return self._worker_of_key is None or self._worker_of_key.get(peer[1]) == message.worker

    def _takes(self, core: Served) -> Callable[[Peer, Request], bool]:
        return lambda peer, message: self._owns_key(peer, message) and core.takes(message)

    def _make_room(self, inbox: Inbox, message: Request, size: int) -> Tensor:
        """Return memory for a vector that is about to arrive. All pushes of one worker use the same memory."""
        inbox.forget(lambda other: other.worker == message.worker)
        if not isinstance(message, Push):
            return torch.empty(size)
        room = self._rooms.get(message.worker)
        if room is None or room.numel() != size:
            room = self._rooms[message.worker] = torch.empty(size)
        return room

    # ---- sending -------------------------------------------------------------------------------------------------

    def _send(self, replies: Streams) -> None:
        for route, reply in replies:
            assert isinstance(route, bytes)
            if not isinstance(reply, (Streamed, Final, Fetched, Progress)):
                self._post([route, *encode(reply)])
            elif self._may_leave(route, reply.request):
                self._send_large(route, reply)

    def _may_leave(self, route: bytes, request: int) -> bool:
        """Return whether to send an answer to this request.

        A worker that repeats a request while the answer still waits to be read gets no second answer. If it sends a new
        request, it has read the answers before.
        """
        self._leaving = {each: entry for each, entry in self._leaving.items() if not entry[1].done}
        return route not in self._leaving or self._leaving[route][0] != request

    def _send_large(self, route: bytes, reply: Streamed | Final | Fetched | Progress) -> None:
        self._make_way(count_messages(reply))
        pieces = split(reply)
        magic, header, *vectors = next(pieces)
        tracked = zmq.Frame(header, copy=False, track=True, copy_threshold=0)
        if not self._post([route, magic, tracked, *vectors]):
            return
        self._leaving[route] = (reply.request, tracked.tracker)
        for head, data in pieces:
            # ZeroMQ copies it, because the next slice is computed in the same memory. It is in cache: copying is cheap.
            if not self._post([route, head, data]):
                return

    def _make_way(self, messages: int) -> None:
        """Raise the socket's limit so that a connection can hold ANSWERS_WAITING answers of ``messages`` each."""
        if messages > self._longest_answer:
            self._longest_answer = messages
            self._socket.setsockopt(zmq.SNDHWM, ANSWERS_WAITING * messages)

    def _post(self, frames: Sequence[Frame | zmq.Frame]) -> bool:
        """Send a message and return True. Return False if its receiver is gone or leaves too many messages unread.

        A healthy worker reads an answer before it sends another request. A request alone does not prove that, because
        a hostile worker can send one without reading.
        """
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        return True
