"""Stands in for the core of a server that was started again after its run was complete."""

from __future__ import annotations

from math import inf

from danaz.protocol.messages import Heartbeat, Refusal, Request, Route, Streams
from danaz.protocol.refusals import COMPLETE

QUIET_S = 20.0  # several heartbeats, and the longest wait before a worker connects again


class CompletedRun:
    """The server of a complete run. It refuses every request, and a worker that has left takes that as its good-bye.

    A server that is killed between its last write to the run folder and its end is started again like any other. Some
    workers may have missed the answer to their good-bye. Without this server, they would ask until they give up.
    """

    def __init__(self, quiet_s: float = QUIET_S):
        """End when no worker has sent anything for ``quiet_s`` seconds."""
        self.finished = False
        self._quiet_s = quiet_s
        self._heard_at = -inf

    def stream(self, route: Route, message: Request, now: float) -> Streams:
        self._heard_at = now
        if isinstance(message, Heartbeat):
            return []
        return [(route, Refusal(message.request, COMPLETE, rejoin=False))]

    def stream_tick(self, now: float) -> Streams:
        if self._heard_at == -inf:
            self._heard_at = now
        self.finished = now - self._heard_at >= self._quiet_s
        return []

    def takes(self, message: Request) -> bool:
        """Return False: no vectors are received."""
        return False

    def refuse(self, reason: str) -> None:
        """Do nothing: the counts of the run are final."""
