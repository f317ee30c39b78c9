"""What is left of a run's server once the run is complete: it sees off whoever still waits for an answer.

A server that is killed between its last update of the run folder and its end is started again like any other. Its
workers may not have heard the answer to their good-bye, and would ask for it until they give up.
"""

from __future__ import annotations

from math import inf

from danaz.protocol.messages import Heartbeat, Refusal, Request
from danaz.protocol.refusals import COMPLETE
from danaz.server.answers import Streams
from danaz.server.members import Route

QUIET_S = 20.0  # some heartbeats, and the longest wait before a worker connects again


class Concluded:
    """In the place of a ServerCore: refuses everything, which a worker that has left takes for its dismissal."""

    def __init__(self, quiet_s: float = QUIET_S):
        """It is finished when nobody was heard of for ``quiet_s``."""
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
        """No vector is worth receiving."""
        return False

    def refuse(self, reason: str) -> None:
        """Nothing is counted any more."""
