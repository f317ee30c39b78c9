"""Vectors travel in slices: a view is computed as it is sent, and no client makes the others wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import zmq
from chunked import SIZE, inbox, push_of, take_all, travelling
from cluster import DIGEST, layout_of
from live import until
from sockets import PATIENCE_S, LiveWorker, received, serving, settings_for, stranger, until_done
from torch import Tensor

from danaz.optimizers import SGD
from danaz.protocol import wire
from danaz.protocol.messages import Heartbeat, Join, Leave, Parameters, Plan, Pull, Push, Refusal, Streamed, Streams
from danaz.protocol.wire import CHUNK, MAGIC, decode, encode
from danaz.server.core import ServerCore
from danaz.server.master import Master, UnsettledError
from danaz.server.members import Member
from danaz.vectors.cutting import SLICE_FLOATS
from danaz.vectors.layout import Layout
from danaz.worker.link import DealerLink

LAYOUT = Layout.from_lists([[["w", [SIZE], [1]]], [], [SLICE_FLOATS + 7, SLICE_FLOATS + 993]])


# ---- the server's vectors: applied as they are asked for -------------------------------------------------------------


def joined(algorithm: str, gap_every: int = 0, workers: int = 1) -> ServerCore:
    core = ServerCore(replace(settings_for(workers, algorithm), gap_every=gap_every))
    start = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    for number in range(workers):
        params = start if number == 0 else None
        core.handle(b"%d" % number, Join(number, 1, 1, DIGEST, SGD, LAYOUT, Plan(100, 1), 1, params), 0.0)
    return core


def pushes() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    while True:
        yield torch.randn(SIZE, generator=generator)


def lease_of(core: ServerCore, worker: int = 0) -> int:
    return core.leases.lease_up_to(worker, 1)[0]


@pytest.mark.parametrize("gap_every", [0, 1])
@pytest.mark.parametrize("algorithm", ["asgd", "dana", "nag-asgd", "dana-zero", "dana-ga", "dc-asgd", "easgd"])
def test_a_streamed_view_is_the_whole_view(algorithm, gap_every):
    streamed, whole = joined(algorithm, gap_every), joined(algorithm, gap_every)
    for request, vector in zip(range(2, 6), pushes(), strict=False):
        push = push_of(vector.clone(), request=request, view_version=request - 2, batch=lease_of(whole))
        [(_, reply)] = whole.handle(b"0", push, 0.0)
        [(_, stream)] = streamed.stream(b"0", replace(push, push=vector.clone()), 0.0)
        [arrived] = take_all(inbox(), travelling(stream))
        assert isinstance(arrived, Parameters)
        assert isinstance(reply, Parameters)
        assert reply.applied, reply.refused
        assert torch.equal(arrived.view, reply.view)
        assert replace(arrived, view=reply.view) == reply
    assert torch.equal(streamed.master.params, whole.master.params)


def test_a_slice_is_applied_when_it_is_asked_for():
    core = joined("dana")
    before = core.master.params.clone()
    [(_, stream)] = core.stream(b"0", push_of(torch.ones(SIZE), batch=lease_of(core)), 0.0)
    assert isinstance(stream, Streamed)
    first = next(stream.slices)
    assert torch.equal(first, before[:SLICE_FLOATS] + 1)
    with pytest.raises(UnsettledError):
        _ = core.master.params
    core.settle()
    assert torch.equal(core.master.params, before + 1)


def test_an_answer_that_nobody_took_is_applied_all_the_same():
    core = joined("dana")
    before = core.master.params.clone()
    core.stream(b"0", push_of(torch.ones(SIZE), batch=lease_of(core)), 0.0)
    core.handle(b"0", push_of(torch.ones(SIZE), request=3, view_version=1, batch=lease_of(core)), 0.0)
    assert torch.equal(core.master.params, before + 1 + 1)


def test_a_view_is_of_one_version():
    core = joined("dana")
    member: Member = core.members[0]
    view = core.master.take_view(member, keep=False)
    next(view)
    core.master.apply(torch.ones(SIZE), 1.0, (0.1, 0.1), member, 0)
    with pytest.raises(RuntimeError, match="version 0"):
        next(view)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_push_that_is_not_finite_is_refused_whole(bad):
    core = joined("dana")
    before = core.master.params.clone()
    vector = torch.ones(SIZE)
    vector[-1] = bad
    [push] = take_all(inbox(), travelling(push_of(vector, batch=lease_of(core))))
    [(_, reply)] = core.handle(b"0", push, 0.0)
    assert reply.refused == "push is not finite"
    assert torch.equal(core.master.params, before)


def test_a_square_that_overflows_is_no_refusal():
    core = joined("dana")
    [push] = take_all(inbox(), travelling(push_of(torch.full((SIZE,), 1e30), batch=lease_of(core))))
    assert push.square == float("inf")
    [(_, reply)] = core.handle(b"0", push, 0.0)
    assert reply.applied


def test_the_gap_of_layers_that_cross_slices():
    sizes = [5, SLICE_FLOATS, 0, SLICE_FLOATS - 7, 2, 1000]
    layers = [[f"layer{number}", [size], [1]] for number, size in enumerate(sizes)]
    layout = Layout.from_lists([layers, [], [sum(sizes)]])
    params, view = torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(3))
    master = Master(settings_for(1).rule(), layout, params)
    deltas = (params.double() - view.double()).split(sizes)
    expected = sum(float(delta.norm()) / size**0.5 for delta, size in zip(deltas, sizes, strict=True) if size)
    assert master.layers.gap(master.squares(view)) == pytest.approx(expected, rel=1e-6)


# ---- real sockets ----------------------------------------------------------------------------------------------------


def one_of_two(address: str, number: int) -> LiveWorker:
    worker = LiveWorker(address, number, settings_for(2), Plan(20, 1), size=SIZE)
    worker.start()
    return worker


def join_of(worker: int, params: Tensor | None, size: int = SIZE) -> Join:
    return Join(worker, 1, 1, DIGEST, SGD, layout_of(size, buffers=1), Plan(20, 1), 1, params)


def send(socket: zmq.Socket[bytes], messages: list[list[bytes]]) -> None:
    for frames in messages:
        socket.send_multipart(frames)


def test_half_a_push_stalls_nobody_and_touches_nothing():
    core = ServerCore(settings_for(2))
    with serving(core) as (address, _), stranger(address) as half:
        send(half, travelling(join_of(0, torch.zeros(SIZE))))
        other = one_of_two(address, 1)
        [first] = take_all(inbox(), receive_all(half))
        assert isinstance(first, Parameters)
        push = push_of(torch.full((SIZE,), 100.0), lr=(0.1,), batch=first.leases[0])
        messages = travelling(push)
        send(half, messages[:-1])
        # Its last chunk does not come. The other worker computes all batches but the one that this worker holds.
        # The core belongs to the server's thread, which may be within a view, so ask the other worker.
        soon(lambda: other.newest is not None and other.newest.version == 19, "19 updates")
        assert other.newest is not None
        assert other.newest.view.max() < 2
        # Then all of it comes, from the beginning. It was computed on an old view, which is allowed.
        send(half, messages)
        [second] = take_all(inbox(), receive_all(half))
        assert isinstance(second, Parameters)
        assert second.applied
        send(half, travelling(Leave(0, 1, 3, None, torch.zeros(1))))
        until_done(other)
    assert core.totals.updates == 20
    assert not core.totals.refusals


def receive_all(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """Receive a reply with a view of SIZE: a header and three chunks."""
    messages = []
    for _ in range(1 + 3):
        assert socket.poll(PATIENCE_S * 1000), "no answer"
        messages.append(socket.recv_multipart())
    return messages


def soon(condition: Callable[[], bool], what: str) -> None:
    until(condition, what, PATIENCE_S)


class Counting(ServerCore):
    """Counts the views that are computed."""

    views = 0
    asked = 0

    def stream(self, route, message, now) -> Streams:
        self.asked += isinstance(message, (Join, Pull))
        return [(route, self._counted(reply)) for route, reply in super().stream(route, message, now)]

    def _counted(self, reply):
        if not isinstance(reply, Streamed):
            return reply

        def slices():
            yield from reply.slices
            self.views += 1

        return replace(reply, slices=slices())


def test_who_never_reads_is_not_answered_for_ever():
    """The other workers do not wait, and the server's memory does not grow."""
    size = 40 * SLICE_FLOATS  # 40 MB, more than TCP holds for a client that does not read
    core = Counting(settings_for(1))
    with serving(core) as (address, _):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        deaf = context.socket(zmq.DEALER)
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.setsockopt(zmq.RCVBUF, 1 << 16)
        deaf.connect(address)
        join = join_of(0, torch.zeros(size), size)
        send(deaf, travelling(join))
        soon(lambda: core.views == 1, "the first view")
        for _ in range(30):
            send(deaf, travelling(replace(join, params=None)))
        soon(lambda: core.asked == 31, "every join is read")
        with stranger(address) as well:
            well.send_multipart(encode(Pull(5, 1, 1)))
            assert isinstance(received(well), Refusal)
        deaf.close(linger=0)
        context.term()
    assert core.views <= 3


def test_who_asks_for_more_and_never_reads_is_not_answered_for_ever():
    """A new request implies that earlier answers were read; what the connection holds shows that they were not."""
    size = 40 * SLICE_FLOATS
    core = Counting(settings_for(1))
    with serving(core) as (address, _):
        with stranger(address) as deaf:
            deaf.setsockopt(zmq.RCVHWM, 1)
            send(deaf, travelling(join_of(0, torch.zeros(size), size)))
            soon(lambda: core.views == 1, "the first view")
            for request in range(2, 40):
                send(deaf, travelling(Pull(0, 1, request)))
            soon(lambda: core.asked == 39, "every pull is read")
            with stranger(address) as well:
                well.send_multipart(encode(Pull(5, 1, 1)))
                assert isinstance(received(well), Refusal)
            held = core.views
            answers = [decode(deaf.recv_multipart(), Parameters)]
            for _ in range(40):
                deaf.recv_multipart()
            assert answers[0].view.numel() == size, "the answer that was sent before is whole"
        assert held < 10


def test_a_long_answer_arrives_whole():
    """More messages than a connection holds before anyone has joined."""
    size = 40 * SLICE_FLOATS
    core = ServerCore(settings_for(1))
    with serving(core) as (address, _):
        link = DealerLink(address, Heartbeat(0, 1), give_up_s=PATIENCE_S)
        reply = link.exchange(join_of(0, torch.arange(float(size)), size))
        for request in range(2, 8):
            assert isinstance(reply, Parameters)
            assert torch.equal(reply.view, torch.arange(float(size)))
            reply = link.exchange(Pull(0, 1, request))
        link.close()


def test_small_answers_that_nobody_reads_are_bounded_too():
    settings = settings_for(1)
    core = ServerCore(settings)
    with serving(core) as (address, _), stranger(address) as deaf:
        deaf.setsockopt(zmq.RCVHWM, 1)
        for _ in range(200):
            deaf.send_multipart([b"?" * 10])
        soon(lambda: sum(core.totals.refusals.values()) == 200, "every refusal")
        worker = LiveWorker(address, 0, settings, Plan(5, 1))
        worker.start()
        until_done(worker)


def test_garbage_in_chunks_disturbs_nobody():
    core = ServerCore(settings_for(2))
    header, *chunks = travelling(push_of(torch.full((SIZE,), 100.0), worker=1, lr=(0.1,)))
    huge = [MAGIC, header[1].replace(wire.msgpack.packb(SIZE), wire.msgpack.packb((8 << 30) // 4))]
    with serving(core) as (address, server), stranger(address) as socket:
        workers = [one_of_two(address, 0)]
        send(socket, [header])  # from a worker that has not joined
        assert received(socket) == Refusal(2, "worker has not joined", rejoin=True)
        send(socket, [huge])
        assert received(socket) == Refusal(2, "worker has not joined", rejoin=True)
        workers.append(one_of_two(address, 1))
        for _ in range(3):
            send(socket, [*chunks, [chunks[0][0], b"1234"], [bytes(CHUNK.size), b""], [chunks[0][0]]])
        until_done(*workers)
        server.join(PATIENCE_S)
    assert core.totals.updates == 20
    assert core.master.params.max() < 2
    assert set(core.totals.refusals) == {
        "worker has not joined",
        "chunk of no message under way",
        "unreadable: not a chunk of this version of danaz",
    }


def test_a_view_stays_until_the_answer_after_the_next():
    """The worker may compare it with the parameters after its local steps."""
    core = ServerCore(settings_for(1))
    with serving(core) as (address, _):
        link = DealerLink(address, Heartbeat(0, 1), give_up_s=PATIENCE_S)
        first = link.exchange(join_of(0, torch.zeros(SIZE)))
        assert isinstance(first, Parameters)
        push = Push(0, 1, 2, 0, (0.1,), 1, None, first.leases[0], torch.ones(SIZE))
        second = link.exchange(push)
        assert isinstance(second, Parameters)
        assert (first.view == 0).all()
        assert (second.view == 1).all()
        third = link.exchange(replace(push, request=3, view_version=1, batch=second.leases[0]))
        assert isinstance(third, Parameters)
        assert (second.view == 1).all()
        assert third.view.data_ptr() == first.view.data_ptr(), "the memory is used again"
        link.close()
