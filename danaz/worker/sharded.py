"""Several servers as one: each holds a slice of the vector, and all are asked at once.

Shard 0 is the server: its leases, version and refusals are the run's. The others know their slice and who takes part.
Consistency is per slice: two pushes may be applied in another order at another shard, and one that shard 0 refuses may
have been applied elsewhere. Whether it was, the worker hears for each slice. What one shard must know of another, the
worker carries: to shard 0 the others' squares, for the gap of its push before; to them the number of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, pairwise
from math import nan
from typing import Protocol

import torch
from torch import Tensor

from danaz.codecs import travelling_bytes
from danaz.flat import Layout, chunks_of_shards, shard_spans
from danaz.server.gap import Layers
from danaz.server.master import all_finite
from danaz.server.messages import Bye, Final, Join, Leave, Parameters, Pull, Push, Refusal, Reply, Report
from danaz.worker.core import Request
from danaz.worker.link import Link
from danaz.worker.staging import IN_PLACE, Staging

NO_BUFFERS = torch.empty(0)


class Shard(Link, Protocol):
    """A way to one of several servers."""

    def receive_into(self, room: Tensor) -> None:
        """Let the next view arrive in ``room`` f32[n], where that saves a copy."""


class ShardedLink:
    """A Link over the links to all shards, shard 0 first. A thread for each of the others."""

    def __init__(self, links: Sequence[Shard], layout: Layout, staging: Staging = IN_PLACE):
        """Raises ValueError if the model of ``layout`` is too small for so many shards."""
        self._links = list(links)
        self._spans = shard_spans(layout.size, len(links))
        ends = [0, *accumulate(map(len, chunks_of_shards(layout.size, len(links))))]
        self._chunks = list(pairwise(ends))  # of each slice, where a vector travels encoded
        self._threads = [ThreadPoolExecutor(1, f"danaz-shard-{number}") for number in range(1, len(links))]
        # Version and life of each slice: of the view at hand, of the one that was fetched ahead, of the newest to come.
        self._at_hand = self._fetched = self._came = [(0, 0)] * len(links)
        self._ahead = False  # whether a view that comes now is for after the one at hand
        self._generation = 0  # of shard 0's newest checkpoint, as it said last
        self._staging = staging
        self._rooms = [staging.room(layout.size) for _ in range(2)]  # f32[P]: the view at hand, where the next arrives
        layers = Layers(layout)
        self._layers = [layers.within(*span) for span in self._spans]  # of each shard
        self._squares: tuple[float, ...] = ()  # of the last push: what the shards but 0 hold of each layer's square
        self._join: Join | None = None
        self._final: Final | None = None
        self._ends: dict[int, Final] = {}  # of the shards that let this worker go

    def exchange(self, request: Request) -> Reply:
        """As Link has it. The view of the answer stays as it is until the answer after the next one."""
        if isinstance(request, Report):
            return self._links[0].exchange(request)
        if isinstance(request, Join):
            self._join = replace(request, params=None)
        if isinstance(request, Push) and not all_finite(request.push):
            # Each shard sees its slice alone. Without a loss that is finite, all of them refuse the push as not finite.
            request = replace(request, loss=nan)
        if isinstance(request, (Push, Pull)):
            self._ahead = _is_beside_a_batch(request)
        self._came = list(self._came)
        reply = self._merge(request, self._ask(request))
        if isinstance(request, Push) and not request.wants_view:
            self._at_hand = self._fetched
        return reply

    def _ask(self, request: Request) -> list[Reply]:
        """What each shard answers."""
        if isinstance(request, Bye) or (isinstance(request, Pull) and not request.ahead):
            # Shard 0 may keep a Pull waiting; only then are the other slices fetched, to be as fresh. A Bye is said as
            # the process ends, and its threads have ended.
            first = self._say(0, request)
            others = [] if isinstance(first, Refusal) else range(1, len(self._links))
            return [first, *(self._say(number, request) for number in others)]
        waiting = [thread.submit(self._say, number, request) for number, thread in enumerate(self._threads, start=1)]
        first = self._say(0, request)
        return [first, *(each.result() for each in waiting)]

    # ---- one shard -----------------------------------------------------------------------------------------------

    def _say(self, number: int, request: Request) -> Reply:
        if number in self._ends and isinstance(request, (Join, Leave)):
            return self._ends[number]
        reply = self._exchange(number, self._part(number, request))
        may_join = number > 0 and not isinstance(request, Join) and not _is_beside_a_batch(request)
        if may_join and isinstance(reply, Refusal) and reply.rejoin:
            # This shard gave the worker up, or was restarted. Taken in again, it has a view; its push was not applied.
            # (Beside a batch, the view at hand is being read: the worker itself joins again, everywhere.)
            start, stop = self._spans[number]
            assert self._join is not None
            join = replace(self._join, request=request.request, params=self._rooms[0][start:stop])
            reply = self._exchange(number, join)
            if isinstance(reply, Parameters) and isinstance(request, (Leave, Bye)):
                reply = self._exchange(number, self._part(number, request))
        if number and isinstance(reply, Final):
            self._ends[number] = reply
        return reply

    def _exchange(self, number: int, request: Request) -> Reply:
        start, stop = self._spans[number]
        room = self._rooms[1][start:stop]
        self._links[number].receive_into(room)
        reply = self._links[number].exchange(request)
        if isinstance(reply, Parameters) and reply.view.numel():
            self._came[number] = (reply.version, reply.life)
            if reply.view.data_ptr() != room.data_ptr():
                room.copy_(reply.view)
                self._staging.arrived(room)
        return reply

    def _part(self, number: int, request: Request) -> Request:
        """What of ``request`` is for this shard."""
        start, stop = self._spans[number]

        def cut(vector: Tensor | None) -> Tensor | None:
            return None if vector is None else vector[start:stop]

        if isinstance(request, Join):
            return replace(request, params=cut(request.params))
        if isinstance(request, Push):
            version, life = self._at_hand[number]
            encoded = request.encoded and request.encoded.cut(*self._chunks[number])
            part = replace(request, push=request.push[start:stop], view_version=version, life=life, encoded=encoded)
            if number:
                return replace(part, generation=self._generation)
            whole, own = (travelling_bytes(each.push, each.encoded) for each in (request, part))
            return replace(part, squares=self._squares, elsewhere=whole - own)
        if isinstance(request, Leave):
            buffers = NO_BUFFERS if number else request.buffers
            generation = self._generation if number else 0
            return replace(request, give_back=cut(request.give_back), buffers=buffers, generation=generation)
        if isinstance(request, Bye) and number == 0 and self._final is not None:
            return replace(request, version=self._final.version, rest=self._final.params[stop:])
        return request

    # ---- all shards ----------------------------------------------------------------------------------------------

    def _merge(self, request: Request, replies: Sequence[Reply]) -> Reply:
        """One reply of all: that of shard 0, with the vectors of every shard."""
        first = replies[0]
        if isinstance(request, (Join, Push)):
            self._squares = self._gather(replies)
        refusal = next((reply for reply in replies if isinstance(reply, Refusal)), None)
        if refusal is not None:
            return refusal
        if isinstance(first, Parameters):
            self._generation = first.generation
            views = zip(self._spans, replies, strict=True)
            parts = tuple((*span, reply.last_applied) for span, reply in views if isinstance(reply, Parameters))
            return replace(first, view=self._view() if first.view.numel() else first.view, parts=parts)
        if isinstance(first, Final):
            slices = [reply.params for reply in replies if isinstance(reply, Final)]
            self._final = first = replace(first, params=torch.cat(slices))
        return first

    def _view(self) -> Tensor:
        """The view f32[P] that has come, which is now at hand or for later."""
        self._rooms.reverse()
        if self._ahead:
            self._fetched = self._came
        else:
            self._at_hand = self._came
        return self._rooms[0]

    def _gather(self, replies: Sequence[Reply]) -> tuple[float, ...]:
        """Of each layer the sum of what the shards but 0 answered; empty unless all have applied, and measured."""
        answers = [reply for reply in replies if isinstance(reply, Parameters) and reply.applied]
        if len(answers) < len(replies) or not all(answer.squares for answer in answers[1:]):
            return ()
        squares = [0.0] * self._layers[-1].stop
        for layers, answer in zip(self._layers[1:], answers[1:], strict=True):
            for layer, square in zip(layers, answer.squares, strict=True):
                squares[layer] += square
        return tuple(squares)

    def close(self) -> None:
        for link in self._links:
            link.close()
        for thread in self._threads:
            thread.shutdown()


def _is_beside_a_batch(request: Request) -> bool:
    """Whether the worker computes meanwhile, in a pipeline."""
    return (isinstance(request, Push) and not request.wants_view) or (isinstance(request, Pull) and request.ahead)


def connect(addresses: Sequence[str], layout: Layout, to: Callable[[str], Shard], staging: Staging = IN_PLACE) -> Link:
    """The way to one server, or to all shards."""
    links = [to(address) for address in addresses]
    if len(links) == 1:
        return links[0]
    return ShardedLink(links, layout, staging)
