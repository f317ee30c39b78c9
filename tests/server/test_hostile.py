"""A hostile worker's messages pass through decoder, core and encoder. They are refused, and cost no memory."""

from __future__ import annotations

import dataclasses
import math
import time
import types
import typing
from dataclasses import replace

import msgpack
import pytest
import torch
from cluster import DIGEST, layout_of
from stimuli import GRADIENT, JOIN, PLAN, SIZE, make_core, parameters, push_on
from torch import Tensor

from danaz.optimizers import SGD
from danaz.protocol.inbox import Inbox
from danaz.protocol.messages import (
    Bye,
    GoBack,
    Heartbeat,
    Join,
    Leave,
    Message,
    Pull,
    Push,
    Refusal,
    Report,
    Request,
    Streamed,
    Within,
)
from danaz.protocol.wire import WireError, encode, split
from danaz.server.core import ServerCore
from danaz.vectors.cutting import announced
from danaz.vectors.gap import Layers
from danaz.vectors.layout import MAX_GROUPS, MAX_TENSORS, Layout

HOSTILE = [0, 1, -1, 2, 2**31, 2**32, 2**40, 2**53, 2**53 + 1, 2**62, 2**63 - 1, 2**64 - 1, -(2**31), -(2**63)]
HOSTILE_FLOATS = [0.0, -0.0, 1e-300, -1e300, 1e300, math.nan, math.inf, -math.inf]
MACHINE_BYTES = 1 << 24


class Served:
    """A server as its router feeds it, with frames in and out. It counts the memory that vectors are received into."""

    def __init__(self, core: ServerCore):
        self.core = core
        self.given: list[int] = []
        self.inbox = Inbox(Request, lambda peer, message: core.takes(message), self._room)

    def _room(self, inbox: Inbox, message: Message, size: int) -> Tensor:
        self.given.append(size)
        return torch.empty(size)

    def hear(self, frames: list[bytes], peer: int = 0) -> list[Message]:
        """Return the replies to a message; a refusal if it cannot be read."""
        try:
            message = self.inbox.take(peer, frames)
        except WireError as error:
            self.core.refuse(str(error))
            return [Refusal(0, str(error), rejoin=False)]
        replies = [] if message is None else self.core.stream(peer, message, 0.0)
        for _, reply in replies:
            for each in split(reply):
                assert all(len(frame) <= 2 << 20 for frame in each)
        return [reply for _, reply in replies]


def started() -> tuple[Served, Push]:
    """Return a server whose worker has joined, has made an update, and holds the next batch."""
    core = make_core("dana", memory_bytes=float(MACHINE_BYTES))
    view = parameters(core.handle(0, JOIN, 0.0))
    view = parameters(core.handle(0, push_on(view), 0.0))
    return Served(core), push_on(view, request=3)


def hostile_values(hint: typing.Any) -> list[typing.Any]:
    """Return what to put in the place of a value of this type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        limits = [v for limit in hint.__metadata__ if isinstance(limit, Within) for v in (limit.low, limit.high)]
        return [*hostile_values(arguments[0]), *(int(v) for v in limits if math.isfinite(v))]
    if origin in (typing.Union, types.UnionType):
        return [None, *(value for each in arguments for value in hostile_values(each))]
    if origin is tuple:
        return [[], *([value] for value in hostile_values(arguments[0])), [0] * 100_000]
    if origin is dict:
        return [{}, {"x": 1e300}, {"x": math.nan}, {"x" * 10_000: 1}, {str(n): n for n in range(10_000)}]
    return {int: HOSTILE, float: [*HOSTILE, *HOSTILE_FLOATS], str: ["", "x" * 100_000]}.get(hint, [None])


KINDS: list[Message] = [
    JOIN,
    Push(0, 1, 3, 1, (0.1,), 4, 0.5, 1, GRADIENT),
    Pull(0, 1, 3),
    Heartbeat(0, 1),
    Leave(0, 1, 3, None, torch.zeros(2)),
    Report(0, 1, 3, {"accuracy": 1.0}),
    Bye(0, 1, 3),
    GoBack(0, 1, -1),
]


@pytest.mark.parametrize("message", KINDS, ids=lambda message: type(message).__name__)
def test_no_value_of_any_field_stops_a_server(message):
    """Put each bad value into each field of a valid message; afterwards the server still answers."""
    hints = typing.get_type_hints(type(message), include_extras=True)
    for field in dataclasses.fields(message):
        if field.metadata.get("local") or hints[field.name] is Tensor:
            continue
        for value in hostile_values(hints[field.name]):
            served, push = started()
            kind, fields, present = msgpack.unpackb(bytes(encode(message)[1]))
            fields[field.name] = value
            vectors = [bytes(frame) for frame in encode(message)[2:]]
            served.hear([bytes(encode(message)[0]), msgpack.packb([kind, fields, present]), *vectors])
            served.hear([bytes(frame) for frame in encode(push)])
            assert served.core.stream_tick(1.0) is not None
            assert served.given == []
            assert all(map(math.isfinite, served.core.master.params.tolist()))


class TestAnnouncements:
    """The server allocates nothing that this run's model does not need."""

    @pytest.mark.parametrize(
        "message",
        [
            replace(JOIN, incarnation=2, params=announced(1 << 34)),
            Push(0, 1, 3, 1, (0.1,), 4, 0.5, 1, announced(1 << 34)),
            Leave(0, 1, 3, announced(1 << 34), torch.zeros(2)),
            Leave(0, 1, 3, None, announced(1 << 34)),
            Bye(0, 1, 3, rest=announced(1 << 34)),
        ],
        ids=["join", "push", "give back", "buffers", "bye"],
    )
    def test_a_vector_that_does_not_fit_the_model(self, message):
        served, _ = started()
        before = served.core.master.params.clone()
        [reply] = served.hear([bytes(frame) for frame in encode(message)])
        # A worker that joins a run with parameters may bring a view, which is read only if it fits.
        reason = reply.header.refused if isinstance(reply, Streamed) else getattr(reply, "reason", "")
        assert bool(reason) == (not isinstance(message, Join))
        assert served.given == []
        assert torch.equal(served.core.master.params, before)

    @pytest.mark.parametrize("floats", [MACHINE_BYTES // 12 + 1, 1 << 34, 1 << 40])
    def test_a_first_join_of_a_model_that_the_machine_cannot_hold(self, floats):
        served = Served(make_core("dana", memory_bytes=float(MACHINE_BYTES)))
        join = replace(JOIN, layout=layout_of(floats), params=announced(floats))
        [reply] = served.hear([bytes(frame) for frame in encode(join)])
        assert isinstance(reply, Refusal)
        assert "does not fit into the 0.0 GiB of memory" in reply.reason
        assert served.given == []
        assert not served.core.members
        assert served.hear([bytes(frame) for frame in encode(JOIN)]), "a valid worker can still join as before"

    def test_buffers_count_too(self):
        served = Served(make_core("dana", memory_bytes=float(MACHINE_BYTES)))
        join = replace(JOIN, layout=layout_of(SIZE, buffers=1 << 30))
        [reply] = served.hear([bytes(frame) for frame in encode(join)])
        assert isinstance(reply, Refusal)
        assert "does not fit" in reply.reason

    def test_the_largest_model_that_fits_is_received(self):
        floats = MACHINE_BYTES // 12
        served = Served(make_core("dana", memory_bytes=float(MACHINE_BYTES)))
        join = Join(0, 1, 1, DIGEST, SGD, layout_of(floats), PLAN, 1, torch.ones(floats))
        replies = [reply for frames in split(join) for reply in served.hear([bytes(frame) for frame in frames])]
        assert [reply.header.view.numel() for reply in replies if isinstance(reply, Streamed)] == [floats]
        assert served.given == [floats]


class TestTime:
    """The cost of a layer table within its limits grows only with its length."""

    def test_many_tensors_in_many_groups_of_a_huge_model(self):
        tensors = [[str(n), [1 << 15], [1]] for n in range(MAX_TENSORS)]
        layout = Layout.from_lists([tensors, [], [1 << 30, *[0] * (MAX_GROUPS - 1)]])
        began = time.thread_time()
        assert len(Layers(layout)) == MAX_TENSORS
        assert sum(1 for _ in layout.layers()) == MAX_TENSORS
        assert sum(1 for _ in layout.slices()) == 1 << 12
        assert time.thread_time() - began < 20, "each tensor is read once, and not once for each slice or group"

    def test_layers_are_found_as_before(self):
        layout = layout_of(3, 0, 5, 2)
        assert list(layout.layers()) == [(0, 0, 3), (2, 3, 3), (2, 3, 8), (3, 8, 10)]
        layers = Layers(layout)
        assert [list(layers.within(*span)) for span in ((0, 3), (2, 4), (3, 8), (7, 10), (0, 10))] == [
            [0],
            [0, 1],
            [1],
            [1, 2],
            [0, 1, 2],
        ]
