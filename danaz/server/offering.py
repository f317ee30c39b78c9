"""One of several shards, restarted: it says to what it can go back, and a worker that has heard all of them says where.

What a shard offers does not change until it is told, and then it offers only that: whoever asks all shards comes to
the same choice. Once an update has been made, every shard has been told, and this one goes on like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from danaz.protocol.messages import GoBack, Heartbeat, Offer, Request
from danaz.server.answers import Streams
from danaz.server.core import ServerCore
from danaz.server.members import Route

LARGEST_NUMBER = 1 << 53  # of a checkpoint that is believed


class Offering:
    """In front of a ServerCore, which takes over when ``go_back(generation, newest, now)`` has brought it there."""

    def __init__(self, core: ServerCore, offer: Offer, go_back: Callable[[int, int, float], None]):
        self._core = core
        self._offer = offer
        self._go_back = go_back
        self._version = 0  # that it went back to

    @property
    def finished(self) -> bool:
        return self._offer.told and self._core.finished

    def go_back(self, generation: int, newest: int, now: float) -> None:
        """Let the core take over."""
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
        """A choice that was made before this shard's newest checkpoint may have come late, out of an earlier life."""
        offer = self._offer
        is_new = offer.newest <= message.newest < LARGEST_NUMBER
        return not offer.told and is_new and message.generation in offer.generations
