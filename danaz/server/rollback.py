"""Stands in for the core of a restarted shard until workers have chosen the checkpoint to restore."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from danaz.protocol.messages import GoBack, Heartbeat, Offer, Request, Route, Streams
from danaz.server.core import ServerCore

LARGEST_NUMBER = 1 << 53  # the number of a checkpoint must be below this to be believed


class AwaitingRollback:
    """A restarted shard among several: it offers its checkpoints, and a worker that has asked all shards chooses one.

    The offer stays the same until a worker chooses; from then on it holds that choice alone. So all workers that ask
    all shards make the same choice. ``go_back(generation, newest, now)`` restores the core, which takes over. Once the
    core has made an update, every shard must have been told, and this shard goes on like any other server.
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
        """Return whether to obey a choice. If it ignores the newest checkpoint, it may be from an earlier life."""
        offer = self._offer
        is_new = offer.newest <= message.newest < LARGEST_NUMBER
        return not offer.told and is_new and message.generation in offer.generations
