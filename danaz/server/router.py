"""The ROUTER loop: the only place on the server that reads a socket and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil

import zmq

from danaz.server.core import Replies, ServerCore
from danaz.server.messages import Refusal, Request
from danaz.server.recording import Recorder
from danaz.server.socket import BoundRouter
from danaz.server.wire import Frame, WireError, decode, encode

TICK_S = 0.25


class Router:
    """Serves a core on a bound ROUTER."""

    def __init__(self, bound: BoundRouter):
        self._socket = bound.socket
        self._worker_of_key = bound.worker_of_key

    def serve(self, core: ServerCore, recorder: Recorder | None, stop: Callable[[], bool]) -> None:
        """Feed ``core`` until it has finished or ``stop()``."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        next_tick = time.monotonic() + TICK_S
        while not (core.finished or stop()):
            wait_s = max(0.0, next_tick - time.monotonic())
            if poller.poll(ceil(wait_s * 1000)):
                self._receive(core, recorder)
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + TICK_S
                if recorder:
                    recorder.event(now)
                self._send(core.tick(now))

    def _receive(self, core: ServerCore, recorder: Recorder | None) -> None:
        route, *frames = self._socket.recv_multipart(copy=False)
        buffers = [frame.buffer for frame in frames]
        now = time.monotonic()
        try:
            message = self._read(route, buffers)
        except WireError as error:
            core.refuse(str(error))
            self._send([(route.bytes, Refusal(0, str(error), rejoin=False))])
            return
        if recorder:
            recorder.event(now, route.bytes, buffers)
        self._send(core.handle(route.bytes, message, now))

    def _read(self, route: zmq.Frame, buffers: Sequence[Frame]) -> Request:
        """The message, if it can be read and its sender is who he says. Raises WireError."""
        try:
            message: Request = decode(buffers, Request)
        except WireError as error:
            raise WireError(f"unreadable: {error}") from error
        if self._worker_of_key is not None and self._worker_of_key.get(str(route.get("User-Id"))) != message.worker:
            raise WireError("worker number is not the one of this key")
        return message

    def _send(self, replies: Replies) -> None:
        for route, reply in replies:
            assert isinstance(route, bytes)
            self._socket.send_multipart([route, *encode(reply)], copy=False)
