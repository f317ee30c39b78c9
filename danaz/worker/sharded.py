"""Several servers as one: each holds a slice of the vector, and the worker asks all of them at once.

Shard 0 is the server: its leases, version and refusals are the run's. The other shards know only their slice and who
takes part. Consistency is per slice: another shard may apply two pushes in another order, and may have applied a push
that shard 0 refuses. The worker hears for each slice whether its push was applied. The worker also carries what one
shard must know about another. It tells shard 0 the squares of the other shards, which give the gap of the push before.
It tells the other shards the number of shard 0's checkpoint. It tells all shards which checkpoints they have in common
and, after a restart, which of these to go back to.
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
from danaz.vectors.cutting import all_finite, chunks_of_shards, shard_spans, spans_within
from danaz.vectors.gap import Layers
from danaz.vectors.layout import Layout
from danaz.worker.core import Request
from danaz.worker.link import GIVE_UP_S, Backoff, EditedError, Link, ServerLostError
from danaz.worker.staging import IN_PLACE, Staging

NO_BUFFERS = torch.empty(0)
ASK_FIRST_S = 0.1
ASK_LONGEST_S = 5.0
COMMON = 2  # number of common checkpoints that the shards are told about, because the newest may turn out damaged


class Shard(Link, Protocol):
    """A way to one of several servers."""

    def receive_into(self, room: Tensor) -> None:
        """Let the next view arrive in ``room`` f32[n] if that saves a copy."""


class ShardedLink:
    """A Link made of the links to all shards, shard 0 first. Each of the other shards has a thread."""

    def __init__(
        self,
        links: Sequence[Shard],
        layout: Layout,
        staging: Staging = IN_PLACE,
        pause: Callable[[float], None] = time.sleep,
    ):
        """Raise ValueError if the model of ``layout`` is too small for this number of shards."""
        self._links = list(links)
        self._spans = shard_spans(layout.size, len(links))
        ends = [0, *accumulate(map(len, chunks_of_shards(layout.size, len(links))))]
        self._chunks = list(pairwise(ends))  # the chunks of each slice, for vectors that travel encoded
        self._threads = [ThreadPoolExecutor(1, f"danaz-shard-{number}") for number in range(1, len(links))]
        # (version, life) of each slice: in the view at hand, in the view fetched ahead, and in the newest received.
        self._at_hand = self._fetched = self._received = [(0, 0)] * len(links)
        self._ahead = False  # whether the next view to arrive will be used after the view at hand
        self._generation = 0  # generation of shard 0's newest checkpoint, as shard 0 last said
        self._kept: list[tuple[int, ...]] = [()] * len(links)  # each shard's checkpoints, as it last said
        self._asked = 0  # number of GoBack requests that this link has made
        self._pause = pause
        self._staging = staging
        self._rooms = [staging.room(layout.size) for _ in range(2)]  # f32[P]: the view at hand, and room for the next
        layers = Layers(layout)
        self._layers = [layers.within(*span) for span in self._spans]  # the layers of each shard
        self._squares: tuple[float, ...] = ()  # each layer's square in the last push, summed over all shards except 0
        self._last_join: Join | None = None  # without its vectors
        self._final: Final | None = None  # the trained model of all shards
        self._ends: dict[int, Final] = {}  # the answers of the shards that this worker has left

    def exchange(self, request: Request) -> Reply:
        """See Link. The answer's view stays unchanged until the answer after the next one arrives."""
        if isinstance(request, Join):
            self._last_join = replace(request, params=None, untrained=None)
        if isinstance(request, Push) and not all_finite(request.push):
            # Each shard sees only its slice. A loss of NaN makes every shard refuse the push as not finite.
            request = replace(request, loss=nan)
        if isinstance(request, (Push, Pull)):
            self._ahead = _is_beside_a_batch(request)
        self._received = list(self._received)  # the list so far may be that of the view at hand
        replies = self._exchange_with_all(request)
        while any(isinstance(reply, Offer) for reply in replies):
            refusal = self._go_back_together(request)
            if refusal is None and isinstance(request, (Push, Pull)):
                # This request, and any answer to it, may date from before the shards went back to a checkpoint.
                refusal = Refusal(request.request, "the shards were restarted", rejoin=True)
            replies = [refusal] if refusal is not None else self._exchange_with_all(request)
        reply = self._merge(request, replies)
        if isinstance(request, Push) and not request.wants_view:
            self._at_hand = self._fetched
        return reply

    def edit(self, displacement: Tensor) -> None:
        """Raise EditedError, because a pushed gradient cannot carry the displacement."""
        raise EditedError

    def close(self) -> None:
        for link in self._links:
            link.close()
        for thread in self._threads:
            thread.shutdown()

    def _exchange_with_all(self, request: Request) -> list[Reply]:
        """Return the replies of all shards; only that of shard 0 if nobody else is asked, or if it refuses first."""
        if isinstance(request, (Report, Fetch)):
            return [self._exchange_with(0, request)]
        if isinstance(request, Bye) or (isinstance(request, Pull) and not request.ahead):
            # Shard 0 may keep a Pull waiting. The other slices are fetched after its answer, so that they are as fresh.
            # A Bye is said at the end of the process, when its threads have ended.
            first = self._exchange_with(0, request)
            others = [] if isinstance(first, (Refusal, Offer)) else range(1, len(self._links))
            return [first, *(self._exchange_with(number, request) for number in others)]
        numbered = enumerate(self._threads, start=1)
        waiting = [thread.submit(self._exchange_with, number, request) for number, thread in numbered]
        first = self._exchange_with(0, request)
        return [first, *(each.result() for each in waiting)]

    # ---- one shard -----------------------------------------------------------------------------------------------

    def _exchange_with(self, number: int, request: Request) -> Reply:
        """Exchange this shard's part of ``request`` for a reply; join the shard again first if it asks for that."""
        if number in self._ends and isinstance(request, (Join, Leave)):
            return self._ends[number]
        reply = self._exchange_part(number, self._part_for(number, request))
        may_join = number > 0 and not isinstance(request, Join) and not _is_beside_a_batch(request)
        if may_join and isinstance(reply, Refusal) and reply.rejoin:
            # This shard gave the worker up, or was restarted. The worker joins it again and gets a view; the shard has
            # not applied its push. (While a batch is computed, the worker reads the view at hand, so it cannot be
            # brought here. The worker then joins all shards again.)
            start, stop = self._spans[number]
            assert self._last_join is not None
            join = replace(self._last_join, request=request.request, params=self._rooms[0][start:stop])
            reply = self._exchange_part(number, join)
            if isinstance(reply, Parameters) and isinstance(request, (Leave, Bye)):
                reply = self._exchange_part(number, self._part_for(number, request))
        if number and isinstance(reply, Final):
            self._ends[number] = reply
        return reply

    def _exchange_part(self, number: int, part: Request) -> Reply:
        """Send ``part`` to this shard, and note what its reply tells. A view goes to its slice of the room."""
        start, stop = self._spans[number]
        room = self._rooms[1][start:stop]
        self._links[number].receive_into(room)
        reply = self._links[number].exchange(part)
        if not isinstance(reply, Parameters):
            return reply
        self._kept[number] = reply.kept
        if reply.view.numel():
            self._received[number] = (reply.version, reply.life)
            if reply.view.data_ptr() != room.data_ptr():
                room.copy_(reply.view)
                self._staging.arrived(room)
        return reply

    def _part_for(self, number: int, request: Request) -> Request:
        """Return the part of ``request`` that is for this shard."""
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
            given, reason = cut(request.give_back), "" if number else request.stop  # others hear only that all is done
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
        """Merge all replies into one: the reply of shard 0, with the vectors of every shard."""
        first = replies[0]
        if isinstance(request, (Join, Push)):
            self._squares = self._sum_squares(replies)
        refusal = next((reply for reply in replies if isinstance(reply, Refusal)), None)
        if refusal is not None:
            return refusal
        if isinstance(first, Parameters):
            self._generation = first.generation
            views = zip(self._spans, replies, strict=True)
            parts = tuple((*span, reply.last_applied) for span, reply in views if isinstance(reply, Parameters))
            return replace(first, view=self._take_view() if first.view.numel() else first.view, parts=parts)
        if isinstance(first, Final):
            slices = [reply.params for reply in replies if isinstance(reply, Final)]
            self._final = first = replace(first, params=torch.cat(slices))
        return first

    def _take_view(self) -> Tensor:
        """Return the view f32[P] that has arrived, and note its versions for now or, if fetched ahead, for later."""
        self._rooms.reverse()
        if self._ahead:
            self._fetched = self._received
        else:
            self._at_hand = self._received
        return self._rooms[0]

    def _sum_squares(self, replies: Sequence[Reply]) -> tuple[float, ...]:
        """Return each layer's square, summed over all shards except 0.

        It is empty unless all shards have applied the push and measured it.
        """
        answers = [reply for reply in replies if isinstance(reply, Parameters) and reply.applied]
        if len(answers) < len(replies) or not all(answer.squares for answer in answers[1:]):
            return ()
        squares = [0.0] * self._layers[-1].stop
        for layers, answer in zip(self._layers[1:], answers[1:], strict=True):
            for layer, square in zip(layers, answer.squares, strict=True):
                squares[layer] += square
        return tuple(squares)

    # ---- after a restart -----------------------------------------------------------------------------------------

    def _go_back_together(self, request: Request) -> Refusal | None:
        """Send all shards back to one generation, which is the same for every worker that chooses one.

        Return None if that succeeded, otherwise a refusal that says why it did not. Raises ServerLostError.
        """
        backoff, waited_s = Backoff(ASK_FIRST_S, ASK_LONGEST_S, request.worker), 0.0
        answers = self._ask_each(request)
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
                answers = self._ask_each(request, chosen, newest=max(offer.newest for offer in offers))
            else:
                # A shard that still goes on will soon be ended, because all shards are restarted together.
                waited_s += (wait_s := backoff.wait_s())
                self._pause(wait_s)
                answers = self._ask_each(request)
        raise ServerLostError(f"the shards of the server did not come back together within {GIVE_UP_S:.0f} s")

    def _ask_each(self, request: Request, chosen: Sequence[int | None] = (), newest: int = 0) -> list[Reply]:
        """Ask each shard which checkpoints it can go back to; if ``chosen`` names one for it, it goes back first."""
        self._asked += 1
        asks = GoBack(request.worker, request.incarnation, -self._asked, newest=newest)
        generations = chosen or [None] * len(self._links)
        pairs = zip(self._links, generations, strict=True)
        return [link.exchange(replace(asks, generation=generation)) for link, generation in pairs]


def _is_beside_a_batch(request: Request) -> bool:
    """Return whether the worker computes a batch during this exchange, which it does in a pipeline."""
    return (isinstance(request, Push) and not request.wants_view) or (isinstance(request, Pull) and request.ahead)


def _nothing_in_common(offers: Sequence[Offer]) -> str:
    has = [", ".join(map(str, offer.generations)) or "none" for offer in offers]
    there = "; ".join(f"shard {number} has {numbers}" for number, numbers in enumerate(has))
    return f"the {len(offers)} shards have no sound checkpoint in common: {there}"


def connect(addresses: Sequence[str], layout: Layout, to: Callable[[str], Shard], staging: Staging = IN_PLACE) -> Link:
    """Return a link to the one server, or to all shards."""
    links = [to(address) for address in addresses]
    if len(links) == 1:
        return links[0]
    return ShardedLink(links, layout, staging)
