"""The worker's end of the wire: a DEALER socket that repeats requests, and gives up when no answer comes."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from math import ceil
from typing import Protocol

import torch
import zmq
from torch import Tensor
from zmq.utils import garbage  # noqa: F401 - its exit handler, which ends zero-copy sends, must be older than ours

from danaz.protocol.frames import MAX_FRAME_BYTES
from danaz.protocol.inbox import Inbox, StrayChunkError
from danaz.protocol.keys import WorkerKeys
from danaz.protocol.memory import keep_freed_memory
from danaz.protocol.messages import Heartbeat, Parameters, Reply
from danaz.protocol.wire import WireError, encode, split
from danaz.worker.core import Request, answers
from danaz.worker.staging import IN_PLACE, Staging

HEARTBEAT_S = 5.0
RETRY_FIRST_S = 5.0
RETRY_LONGEST_S = 30.0
RECONNECT_FIRST_MS = 100  # ZeroMQ doubles the wait up to the longest, and adds its own jitter
RECONNECT_LONGEST_MS = 5000
GIVE_UP_S = 600.0
LEAVING_S = 0.25  # time between two checks whether a request has left
AHEAD_MESSAGES = 4  # number of messages that ZeroMQ receives before they are asked for: 4 MB of a view


class ServerLostError(ConnectionError):
    """The server did not answer for too long."""


class EditedError(RuntimeError):
    """The script has changed parameters, and the algorithm's messages cannot carry the change to the server."""

    def __init__(self) -> None:
        super().__init__(
            "parameters were changed outside of optimizer.step(), and the workers of this algorithm push gradients, "
            "which cannot carry the change to the server. Use an algorithm whose workers push displacements, such as "
            "dana; or change parameters before the training only"
        )


class Link(Protocol):
    """A way to a server."""

    def exchange(self, request: Request) -> Reply:
        """Send a request, and wait for its reply. Raises ServerLostError."""

    def edit(self, displacement: Tensor) -> None:
        """Add ``displacement`` f32[P] to the server's parameters. Raises EditedError."""

    def close(self) -> None:
        """Free the resources of this link."""


class Backoff:
    """Growing waits between repetitions: each is twice the one before, up to a cap, plus a random 0 to 50 %."""

    def __init__(self, first_s: float, longest_s: float, seed: int):
        self._next_s = first_s
        self._longest_s = longest_s
        self._random = random.Random(seed)

    def wait_s(self) -> float:
        wait_s, self._next_s = self._next_s, min(2 * self._next_s, self._longest_s)
        return wait_s * (1 + self._random.random() / 2)


class DealerLink:
    """A DEALER socket that reconnects by itself, and repeats a request that was not answered.

    While the worker computes, a thread with its own socket tells the server that the worker is alive.
    """

    def __init__(
        self,
        address: str,
        heartbeat: Heartbeat,
        give_up_s: float = GIVE_UP_S,
        keys: WorkerKeys | None = None,
        staging: Staging = IN_PLACE,
    ):
        keep_freed_memory()
        self._context = zmq.Context()
        self._keys = keys
        self._socket = self._dealer(address)
        self._address = address
        self._seed = heartbeat.worker
        self._give_up_s = give_up_s
        self._staging = staging
        self._rooms = [torch.empty(0), torch.empty(0)]  # f32[P] each: the view at hand, and room for the next
        self._heartbeat = heartbeat
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="danaz-heartbeat")
        self._thread.start()

    def exchange(self, request: Request) -> Reply:
        """See Link. The answer's view stays unchanged until the answer after the next one arrives."""
        self._heartbeat = Heartbeat(request.worker, request.incarnation)  # it may have changed before the worker joined
        inbox = Inbox(Reply, lambda _, reply: answers(reply, request), self._room, self._arrived)
        backoff = Backoff(RETRY_FIRST_S, RETRY_LONGEST_S, self._seed)
        give_up_at = time.monotonic() + self._give_up_s
        while time.monotonic() < give_up_at:
            try:
                leaving = self._send(request, give_up_at)
            except zmq.Again:
                break  # no connection took the request: after it was refused for its key, ZeroMQ makes none
            reply = self._await_answer(request, leaving, inbox, backoff.wait_s(), give_up_at)
            if reply is not None:
                if isinstance(reply, Parameters) and reply.view.numel():
                    self._rooms.reverse()
                return reply
        raise ServerLostError(
            f"the server at {self._address} did not answer for {self._give_up_s:.0f} s; is it still running there"
            + (", and is this worker's key one of its run's?" if self._keys else "?")
        )

    def edit(self, displacement: Tensor) -> None:
        """Raise EditedError, because a pushed gradient cannot carry the displacement."""
        raise EditedError

    def receive_into(self, room: Tensor) -> None:
        """Let the next view arrive in ``room`` f32[P] if it is long."""
        self._rooms[1] = room

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._socket.close(linger=0)
        self._context.term()

    def _send(self, request: Request, give_up_at: float) -> zmq.MessageTracker:
        """Hand a request to ZeroMQ. The returned tracker says when the last part of it has left for the network.

        Raises zmq.Again if ZeroMQ does not take it until ``give_up_at``.
        """
        self._socket.setsockopt(zmq.SNDTIMEO, max(1, ceil(1000 * (give_up_at - time.monotonic()))))
        *messages, last = split(request)
        for frames in messages:
            self._socket.send_multipart(frames, copy=False)
        *frames, end = last
        tracked = zmq.Frame(end, copy=False, track=True, copy_threshold=0)
        self._socket.send_multipart([*frames, tracked], copy=False)
        assert isinstance(tracked.tracker, zmq.MessageTracker)
        return tracked.tracker

    def _await_answer(
        self, request: Request, leaving: zmq.MessageTracker, inbox: Inbox, patience_s: float, give_up_at: float
    ) -> Reply | None:
        """Return the answer; None if no part of it arrived within ``patience_s`` after the request had left.

        Over a slow link, a request takes long to leave. Repeating it while it is still leaving would only take longer.
        """
        until = time.monotonic() + patience_s
        while (now := time.monotonic()) < give_up_at:
            if not leaving.done:
                until = now + patience_s
            if (left_s := min(until, give_up_at) - now) <= 0:
                break
            if self._socket.poll(ceil(1000 * (left_s if leaving.done else min(left_s, LEAVING_S)))):
                frames = self._socket.recv_multipart(copy=False)
                try:
                    reply: Reply | None = inbox.take("", [frame.buffer for frame in frames])
                except StrayChunkError:
                    continue  # it answers an earlier copy of this request, or an earlier request
                except WireError as error:
                    raise ServerLostError(f"what answers at {self._address} is no danaz server: {error}") from error
                if reply is None:
                    until = time.monotonic() + patience_s
                elif answers(reply, request):
                    return reply
        return None

    def _room(self, inbox: Inbox, message: Reply, size: int) -> Tensor:
        """Return memory f32[size] for a vector of ``message`` that is about to arrive."""
        if not isinstance(message, Parameters):
            return torch.empty(size)
        if self._rooms[1].numel() != size:
            self._rooms[1] = self._staging.room(size)
        return self._rooms[1]

    def _arrived(self, message: Reply, piece: Tensor) -> None:
        """Let a ``piece`` of a view go on to the device."""
        if isinstance(message, Parameters):
            self._staging.arrived(piece)

    def _beat(self) -> None:
        """Tell the server every HEARTBEAT_S, over a socket of this thread's own, that the worker is alive."""
        socket = self._dealer(self._address)
        while not self._closing.wait(HEARTBEAT_S):
            with suppress(zmq.Again):  # no connection takes it; ``close`` must not wait for one
                socket.send_multipart(encode(self._heartbeat), zmq.NOBLOCK)
        socket.close(linger=0)

    def _dealer(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVHWM, AHEAD_MESSAGES)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_FIRST_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_LONGEST_MS)
        socket.setsockopt(zmq.IPV6, "[" in address)
        if self._keys is not None:
            socket.setsockopt(zmq.CURVE_SERVERKEY, self._keys.server.encode())
            socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
            socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
        socket.connect(address)
        return socket
