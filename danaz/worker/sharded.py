"""Several servers as one: each holds a slice of the vector, and all are asked at once.

Shard 0 is the server: its leases, version and refusals are the run's. The others know their slice and who takes part.
Consistency is per slice: two pushes may be applied in another order at another shard, and one that shard 0 refuses may
have been applied elsewhere. Whether it was, the worker hears for each slice. What one shard must know of another, the
worker carries: to shard 0 the others' squares, for the gap of its push before; to them the number of its checkpoint; to
all of them which checkpoints all have, and behind a restart the one to go back to.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import accumulate, pairwise
from math import nan
from typing import Protocol

import torch
from torch import Tensor

from danaz.protocol.agreement import choose
from danaz.protocol.messages import (
    Bye,
    Fetch,
    Final,
    GoBack,
    Join,
    Leave,
    Offer,
    Parameters,
    Pull,
    Push,
    Refusal,
    Reply,
    Report,
)
from danaz.vectors.codecs import travelling_bytes
from danaz.vectors.cutting import all_finite
from danaz.vectors.flat import Layout, chunks_of_shards, shard_spans, spans_within
from danaz.vectors.gap import Layers
from danaz.worker.core import Backoff, Request
from danaz.worker.link import GIVE_UP_S, EditedError, Link, ServerLostError
from danaz.worker.staging import IN_PLACE, Staging

NO_BUFFERS = torch.empty(0)
ASK_FIRST_S = 0.1
ASK_LONGEST_S = 5.0
COMMON = 2  # checkpoints of all shards that these are told of: the newest may be found damaged


class Shard(Link, Protocol):
    """A way to one of several servers."""

    def receive_into(self, room: Tensor) -> None:
        """Let the next view arrive in ``room`` f32[n], where that saves a copy."""


class ShardedLink:
    """A Link over the links to all shards, shard 0 first. A thread for each of the others."""

    def __init__(
        self,
        links: Sequence[Shard],
        layout: Layout,
        staging: Staging = IN_PLACE,
        pause: Callable[[float], None] = time.sleep,
    ):
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
        self._kept: list[tuple[int, ...]] = [()] * len(links)  # the checkpoints of each, as it said last
        self._asked = 0  # questions of this link's own
        self._pause = pause
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
        if isinstance(request, Join):
            self._join = replace(request, params=None, untrained=None)
        if isinstance(request, Push) and not all_finite(request.push):
            # Each shard sees its slice alone. Without a loss that is finite, all of them refuse the push as not finite.
            request = replace(request, loss=nan)
        if isinstance(request, (Push, Pull)):
            self._ahead = _is_beside_a_batch(request)
        self._came = list(self._came)
        replies = self._say_to_all(request)
        while any(isinstance(reply, Offer) for reply in replies):
            refusal = self._agree(request)
            if refusal is None and isinstance(request, (Push, Pull)):
                # Of before they went back; what another shard said of it may be, too.
                refusal = Refusal(request.request, "the shards were restarted", rejoin=True)
            replies = [refusal] if refusal is not None else self._say_to_all(request)
        reply = self._merge(request, replies)
        if isinstance(request, Push) and not request.wants_view:
            self._at_hand = self._fetched
        return reply

    def _say_to_all(self, request: Request) -> list[Reply]:
        if isinstance(request, (Report, Fetch)):
            return [self._say(0, request)]
        if isinstance(request, Bye) or (isinstance(request, Pull) and not request.ahead):
            # Shard 0 may keep a Pull waiting; only then are the other slices fetched, to be as fresh. A Bye is said as
            # the process ends, and its threads have ended.
            first = self._say(0, request)
            others = [] if isinstance(first, (Refusal, Offer)) else range(1, len(self._links))
            return [first, *(self._say(number, request) for number in others)]
        waiting = [thread.submit(self._say, number, request) for number, thread in enumerate(self._threads, start=1)]
        first = self._say(0, request)
        return [first, *(each.result() for each in waiting)]

    # ---- after a restart -----------------------------------------------------------------------------------------

    def _agree(self, request: Request) -> Refusal | None:
        """Send all shards back to one generation, the same that any worker would choose; or why there is none.

        Raises ServerLostError.
        """
        backoff, waited_s = Backoff(ASK_FIRST_S, ASK_LONGEST_S, request.worker), 0.0
        answers = self._ask(request)
        while waited_s < GIVE_UP_S:
            offers = [answer for answer in answers if isinstance(answer, Offer)]
            if all(offer.told for offer in offers):
                return None
            over = next((each for each in answers if isinstance(each, Refusal) and not each.rejoin), None)
            if over is not None:
                return replace(over, request=request.request)
            if len(offers) == len(answers):
                chosen = choose(offers)
                if not chosen:
                    return Refusal(request.request, _nothing_in_common(offers), rejoin=False)
                answers = self._ask(request, chosen, newest=max(offer.newest for offer in offers))
            else:
                # Who goes on is about to be ended: all shards are restarted together.
                waited_s += (wait_s := backoff.wait_s())
                self._pause(wait_s)
                answers = self._ask(request)
        raise ServerLostError(f"the shards of the server did not come back together within {GIVE_UP_S:.0f} s")

    def _ask(self, request: Request, chosen: Sequence[int | None] = (), newest: int = 0) -> list[Reply]:
        """What each shard can go back to; where ``chosen`` says so, after it went back."""
        self._asked += 1
        asks = GoBack(request.worker, request.incarnation, -self._asked, newest=newest)
        generations = chosen or [None] * len(self._links)
        pairs = zip(self._links, generations, strict=True)
        return [link.exchange(replace(asks, generation=generation)) for link, generation in pairs]

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
        if not isinstance(reply, Parameters):
            return reply
        self._kept[number] = reply.kept
        if reply.view.numel():
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
            return replace(request, params=cut(request.params), untrained=None if number else request.untrained)
        if isinstance(request, Push):
            version, life = self._at_hand[number]
            part = replace(
                request,
                push=request.push[start:stop],
                encoded=request.encoded and request.encoded.cut(*self._chunks[number]),
                absent=spans_within(request.absent, start, stop),
                view_version=version,
                life=life,
                common=self._common,
            )
            if number:
                return replace(part, generation=self._generation)
            whole, own = (travelling_bytes(each.push, each.encoded) for each in (request, part))
            return replace(part, squares=self._squares, elsewhere=whole - own)
        if isinstance(request, Leave):
            buffers = NO_BUFFERS if number else request.buffers
            generation = self._generation if number else 0
            given, reason = cut(request.give_back), "" if number else request.stop  # others hear that all is done
            return replace(request, give_back=given, buffers=buffers, generation=generation, stop=reason)
        if isinstance(request, Bye) and number == 0 and self._final is not None:
            return replace(request, version=self._final.version, rest=self._final.params[stop:])
        return request

    @property
    def _common(self) -> tuple[int, ...]:
        common = set.intersection(*map(set, self._kept))
        return tuple(sorted(common)[-COMMON:])

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

    def edit(self, displacement: Tensor) -> None:
        """Raises EditedError: a gradient that is pushed cannot carry it."""
        raise EditedError

    def close(self) -> None:
        for link in self._links:
            link.close()
        for thread in self._threads:
            thread.shutdown()


def _is_beside_a_batch(request: Request) -> bool:
    """Whether the worker computes meanwhile, in a pipeline."""
    return (isinstance(request, Push) and not request.wants_view) or (isinstance(request, Pull) and request.ahead)


def _nothing_in_common(offers: Sequence[Offer]) -> str:
    has = [", ".join(map(str, offer.generations)) or "none" for offer in offers]
    there = "; ".join(f"shard {number} has {numbers}" for number, numbers in enumerate(has))
    return f"no checkpoint is there, and sound, of all {len(offers)} shards: {there}"


def connect(addresses: Sequence[str], layout: Layout, to: Callable[[str], Shard], staging: Staging = IN_PLACE) -> Link:
    """The way to one server, or to all shards."""
    links = [to(address) for address in addresses]
    if len(links) == 1:
        return links[0]
    return ShardedLink(links, layout, staging)
