"""After the end of a run, a server that was started again serves workers with this in place of a core."""

from __future__ import annotations

from math import inf

from danaz.protocol.messages import Heartbeat, Refusal, Request
from danaz.protocol.refusals import COMPLETE
from danaz.server.answers import Streams
from danaz.server.members import Route

QUIET_S = 20.0  # several heartbeats, and the longest wait before a worker connects again


class CompletedRun:
    """A server after the end of its run: it refuses everything; a worker that has left takes that for its dismissal.

    A server that is killed between its last write to the run folder and its end is started again like any other. Its
    workers may not have heard the answer to their good-bye, and would ask for it until they give up.
    """

    def __init__(self, quiet_s: float = QUIET_S):
        """It is finished when no worker has sent anything for ``quiet_s`` seconds."""
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
        """Receive no vectors."""
        return False

    def refuse(self, reason: str) -> None:
        """Count nothing any more."""
