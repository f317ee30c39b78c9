"""The ROUTER loop: the only place on the server that reads a socket and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import ceil

import zmq

from danaz.server.core import Replies, ServerCore
from danaz.server.messages import Refusal, Request
from danaz.server.recording import Recorder
from danaz.server.wire import WireError, decode, encode

TICK_S = 0.25


class Router:
    """Serves a core on a bound ROUTER socket (see danaz.server.socket)."""

    def __init__(self, socket: zmq.Socket[bytes]):
        self._socket = socket

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
            message = decode(buffers, Request)
        except WireError as error:
            reason = f"unreadable: {error}"
            core.refuse(reason)
            self._send([(route.bytes, Refusal(0, reason, rejoin=False))])
            return
        if recorder:
            recorder.event(now, route.bytes, buffers)
        self._send(core.handle(route.bytes, message, now))

    def _send(self, replies: Replies) -> None:
        for route, reply in replies:
            assert isinstance(route, bytes)
            self._socket.send_multipart([route, *encode(reply)], copy=False)
