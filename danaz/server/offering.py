"""What serves workers in the place of a ServerCore: a shard that waits to roll back, and a run that is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

from danaz.protocol.messages import GoBack, Heartbeat, Offer, Refusal, Request, Route, Streams
from danaz.protocol.refusals import COMPLETE
from danaz.server.core import ServerCore

LARGEST_NUMBER = 1 << 53  # the number of a checkpoint must be below this to be believed
QUIET_S = 20.0  # several heartbeats, and the longest wait before a worker connects again


class AwaitingRollback:
    """One of several shards, restarted: it offers checkpoints, and a worker that has heard all shards chooses one.

    The offer does not change until a worker chooses; then the shard offers that choice alone. So all workers that ask
    all shards come to the same choice. ``go_back(generation, newest, now)`` restores the core, which takes over. As
    soon as it has made an update, every shard has been told, and this one goes on like any other.
    """

    def __init__(self, core: ServerCore, offer: Offer, go_back: Callable[[int, int, float], None]):
        self._core = core
        self._offer = offer
        self._go_back = go_back
        self._version = 0  # the version that the core went back to

    @property
    def finished(self) -> bool:
        return self._offer.told and self._core.finished

    def go_back(self, generation: int, newest: int, now: float) -> None:
        """Restore the core, which takes over from here."""
        self._go_back(generation, newest, now)
        self._offer = replace(self._offer, generations=(generation,), told=True)
        self._version = self._core.master.version if self._core.started else 0

    def stream(self, route: Route, message: Request, now: float) -> Streams:
        if isinstance(message, GoBack) and not self._has_gone_on:
            if message.generation is not None and self._may_be_told(message):
                self.go_back(message.generation, message.newest, now)
        elif self._offer.told:
            return self._core.stream(route, message, now)
        elif isinstance(message, Heartbeat):
            return []
        return [(route, replace(self._offer, request=message.request))]

    def stream_tick(self, now: float) -> Streams:
        return self._core.stream_tick(now) if self._offer.told else []

    def takes(self, message: Request) -> bool:
        return self._offer.told and self._core.takes(message)

    def refuse(self, reason: str) -> None:
        self._core.refuse(reason)

    @property
    def _has_gone_on(self) -> bool:
        return self._core.started and self._core.master.version > self._version

    def _may_be_told(self, message: GoBack) -> bool:
        """Whether to heed a choice: one from before this shard's newest checkpoint may come from an earlier life."""
        offer = self._offer
        is_new = offer.newest <= message.newest < LARGEST_NUMBER
        return not offer.told and is_new and message.generation in offer.generations


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
