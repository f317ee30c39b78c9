"""Messages in chunks: what arrives is what was sent, whatever else comes touches nothing, nobody waits for others."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq
from cluster import DIGEST, layout_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_router import PATIENCE_S, LiveWorker, received, serving, settings_for, stranger
from torch import Tensor

from danaz.flat import SLICE_FLOATS, Layout
from danaz.server import wire
from danaz.server.answers import Streams
from danaz.server.core import ServerCore
from danaz.server.master import Master
from danaz.server.members import Member
from danaz.server.messages import (
    Final,
    Heartbeat,
    Join,
    Message,
    Parameters,
    Plan,
    Pull,
    Push,
    Refusal,
    Streamed,
    is_announced,
)
from danaz.server.recording import replay
from danaz.server.wire import CHUNK, CHUNK_MAGIC, MAGIC, Inbox, StrayChunkError, WireError, decode, encode, split
from danaz.worker.link import DealerLink

SIZE = 2 * SLICE_FLOATS + 1000  # three chunks
LAYOUT = Layout.from_lists([[["w", [SIZE], [1]]], [], [SLICE_FLOATS + 7, SLICE_FLOATS + 993]])


def push_of(vector: Tensor, **changes: object) -> Push:
    push = Push(0, 1, 2, 0, (0.1, 0.1), 1, None, 0, vector)
    return replace(push, **changes)  # type: ignore[arg-type]


def travelling(message: Message | Streamed) -> list[list[bytes]]:
    return [[bytes(frame) for frame in frames] for frames in split(message)]


def inbox(takes: bool = True, rooms: list[Tensor] | None = None) -> Inbox:
    def room(box: Inbox, message: object, size: int) -> Tensor:
        vector = torch.full((size,), 7.0)
        if rooms is not None:
            rooms.append(vector)
        return vector

    return Inbox(Message, lambda peer, message: takes, room)


def take_all(box: Inbox, messages: list[list[bytes]], peer: str = "a") -> list[Message]:
    return [message for frames in messages if (message := box.take(peer, frames)) is not None]


class TestInbox:
    @pytest.mark.parametrize("size", [SLICE_FLOATS + 1, 2 * SLICE_FLOATS, SIZE])
    def test_what_is_sent_is_what_arrives(self, size):
        vector = torch.randn(size, generator=torch.Generator().manual_seed(size))
        [arrived] = take_all(inbox(), travelling(push_of(vector)))
        assert isinstance(arrived, Push)
        assert torch.equal(arrived.push, vector)
        assert arrived.square == pytest.approx(float(vector.double().square().sum()), rel=1e-4)

    def test_several_vectors_one_of_them_empty(self):
        final = Final(3, 9, False, torch.arange(float(SIZE)), torch.empty(0))
        [arrived] = take_all(inbox(), travelling(final))
        assert isinstance(arrived, Final)
        assert torch.equal(arrived.params, final.params)
        assert arrived.buffers.numel() == 0

    def test_a_short_vector_travels_in_one_message(self):
        messages = travelling(push_of(torch.ones(SLICE_FLOATS)))
        assert [len(frames) for frames in messages] == [3]

    def test_peers_do_not_mix(self):
        one, other = torch.zeros(SIZE), torch.ones(SIZE)
        box, arrived = inbox(), []
        for frames, others in zip(travelling(push_of(one)), travelling(push_of(other)), strict=True):
            arrived += [box.take("a", frames), box.take("b", others)]
        pushes = [message.push for message in arrived if message is not None]
        assert len(pushes) == 2
        assert torch.equal(pushes[0], one)
        assert torch.equal(pushes[1], other)

    def test_a_header_starts_over(self):
        messages = travelling(push_of(torch.arange(float(SIZE))))
        [arrived] = take_all(inbox(), messages[:2] + messages)
        assert isinstance(arrived, Push)
        assert torch.equal(arrived.push, torch.arange(float(SIZE)))

    def test_what_is_not_wanted_gets_no_memory(self):
        rooms: list[Tensor] = []
        box = inbox(takes=False, rooms=rooms)
        header, *chunks = travelling(push_of(torch.ones(SIZE)))
        message = box.take("a", header)
        assert is_announced(message.push)
        assert message.push.numel() == SIZE
        with pytest.raises(StrayChunkError):
            box.take("a", chunks[0])
        assert not rooms

    @pytest.mark.parametrize("what", ["first of none", "skipped", "again", "of another request", "one too many"])
    def test_stray_chunks(self, what):
        header, *chunks = travelling(push_of(torch.ones(SIZE)))
        foreign = travelling(push_of(torch.ones(SIZE), request=3))[1]
        orders = {
            "first of none": [chunks[0]],
            "skipped": [header, chunks[1]],
            "again": [header, chunks[0], chunks[0]],
            "of another request": [header, foreign],
            "one too many": [header, *chunks, chunks[0]],
        }
        *before, last = orders[what]
        box = inbox()
        take_all(box, before)
        with pytest.raises(StrayChunkError):
            box.take("a", last)
        assert len(take_all(box, [header, *chunks])) == 1, "and the peer can begin anew"

    @pytest.mark.parametrize("data", [b"", b"1234", bytes(4 * SLICE_FLOATS - 1), bytes(4 * SLICE_FLOATS + 4)])
    def test_a_chunk_of_the_wrong_size(self, data):
        rooms: list[Tensor] = []
        box = inbox(rooms=rooms)
        header, [head, _], *_ = travelling(push_of(torch.ones(SIZE)))
        box.take("a", header)
        with pytest.raises(WireError, match="another size"):
            box.take("a", [head, data])
        assert (rooms[0] == 7).all(), "not a float of it was written"

    @pytest.mark.parametrize(
        "frames",
        [
            [CHUNK.pack(CHUNK_MAGIC, 2, 0)],
            [CHUNK.pack(CHUNK_MAGIC, 2, 0), b"", b""],
            [CHUNK.pack(b"DANAZ\x01+\0", 2, 0), b""],
            [bytes(CHUNK.size), b""],
        ],
    )
    def test_what_is_no_chunk(self, frames):
        with pytest.raises(WireError, match="not a chunk"):
            inbox().take("a", frames)

    @pytest.mark.parametrize(
        ("entry", "why"),
        [
            (["push", 1 << 60, "fp32"], "too large"),
            (["push", -1, "fp32"], "malformed"),
            (["push", True, "fp32"], "malformed"),
            (["push", 1.0, "fp32"], "malformed"),
            (["push", SIZE, "zip"], "unknown codec"),
            (["push", SIZE], "malformed"),
            ("push", "malformed"),
            (["tail", SIZE, "fp32"], "push has the wrong type"),
        ],
    )
    def test_announcements_that_are_none(self, entry, why):
        [_, packed], *_ = travelling(push_of(torch.ones(SIZE)))
        kind, header, _ = wire.msgpack.unpackb(packed)
        with pytest.raises(WireError, match=why):
            inbox().take("a", [MAGIC, wire.msgpack.packb([kind, header, [entry]])])

    def test_an_announcement_is_written_down_as_one(self):
        """A recording keeps it in a few bytes."""
        [header, *_] = travelling(push_of(torch.ones(SIZE)))
        message = decode(header)
        assert [bytes(frame) for frame in encode(message)] == header


# ---- fuzz ------------------------------------------------------------------------------------------------------------

LIMIT_FLOATS = 2 * SIZE
PARTS = travelling(push_of(torch.ones(SIZE)))


class Limited:
    """An inbox that gives no more memory than a job's layout is large."""

    def __init__(self) -> None:
        self.given = 0
        self.box = Inbox(Message, self.takes, self.room)

    def takes(self, peer: str, message: Message) -> bool:
        return isinstance(message, Push) and message.push.numel() == SIZE

    def room(self, box: Inbox, message: Message, size: int) -> Tensor:
        self.given = max(self.given, size)
        return ROOM[:size]


ROOM = torch.empty(LIMIT_FLOATS)


def garbled(rng: random.Random) -> list[bytes]:
    frames = list(rng.choice(PARTS))
    which = rng.randrange(len(frames))
    short = frames[which] if len(frames[which]) < 1000 else frames[which][: rng.choice([0, 3, 4, 4000])]
    frame = bytearray(short)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(frame) + 1)
        match rng.randrange(4):
            case 0 if frame:
                frame[at % len(frame)] = rng.randrange(256)
            case 1:
                del frame[at : at + rng.randrange(4)]
            case 2:
                frame[at:at] = rng.randbytes(rng.randrange(6))
            case 3:
                frames.insert(rng.randrange(3), rng.randbytes(rng.choice([0, 4, CHUNK.size])))
                return frames
    frames[which] = bytes(frame)
    return frames


@given(
    st.randoms(use_true_random=False),
    st.lists(st.lists(st.binary(max_size=40), max_size=4), max_size=50),
)
@settings(max_examples=1100, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_100_000_inputs_and_never_anything_but_a_wire_error(rng, nonsense):
    limited = Limited()
    inputs = [*nonsense, *(garbled(rng) for _ in range(95))]
    assert len(inputs) >= 95  # times 1100 examples
    rng.shuffle(inputs)
    for frames in inputs:
        try:
            message = limited.box.take(rng.choice("ab"), frames)
        except WireError:
            continue
        assert message is None or isinstance(message, Message)
    assert limited.given <= SIZE


# ---- the server's vectors: applied as they are asked for -------------------------------------------------------------


def joined(algorithm: str, gap_every: int = 0, workers: int = 1) -> ServerCore:
    core = ServerCore(replace(settings_for(workers, algorithm), gap_every=gap_every))
    start = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    for number in range(workers):
        params = start if number == 0 else None
        core.handle(b"%d" % number, Join(number, 1, 1, DIGEST, 0.9, LAYOUT, Plan(100, 1), 1, params), 0.0)
    return core


def pushes() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(2)
    while True:
        yield torch.randn(SIZE, generator=generator)


def lease_of(core: ServerCore, worker: int = 0) -> int:
    return core.leases.top_up(worker, 1)[0]


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
    assert torch.equal(core.master._params[SLICE_FLOATS:], before[SLICE_FLOATS:]), "the rest is as it was"
    assert torch.equal(core.master.params, before + 1), "but whoever asks for all gets all"


def test_an_answer_that_nobody_took_is_applied_all_the_same():
    core = joined("dana")
    before = core.master.params.clone()
    core.stream(b"0", push_of(torch.ones(SIZE), batch=lease_of(core)), 0.0)
    core.handle(b"0", push_of(torch.ones(SIZE), request=3, view_version=1, batch=lease_of(core)), 0.0)
    assert torch.equal(core.master.params, before + 1 + 1)


def test_a_view_is_of_one_version():
    core = joined("dana")
    member: Member = core.members[0]
    view = core.master.view(member, keep=False)
    next(view)
    core.master.apply(torch.ones(SIZE), (0.1, 0.1), member, 0)
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


# ---- real sockets ----------------------------------------------------------------------------------------------------


def live_worker(address: str, number: int, algorithm: str, workers: int, plan: Plan) -> LiveWorker:
    worker = LiveWorker(address, number, settings_for(workers, algorithm), plan, size=SIZE)
    worker.start()
    return worker


def until_done(*workers: LiveWorker) -> None:
    for worker in workers:
        worker.join(PATIENCE_S)
        assert worker.error is None
        assert worker.final is not None


def join_of(worker: int, params: Tensor | None, size: int = SIZE) -> Join:
    return Join(worker, 1, 1, DIGEST, 0.9, layout_of(size, buffers=1), Plan(20, 1), 1, params)


@pytest.mark.parametrize("algorithm", ["dana", "dana-zero", "dana-ga", "ssgd"])
def test_a_recorded_run_in_chunks_replays_to_the_bit(tmp_path: Path, algorithm: str):
    core = ServerCore(settings_for(2, algorithm))
    path = tmp_path / "recording.bin"
    with serving(core, path) as (address, server):
        until_done(*[live_worker(address, number, algorithm, 2, Plan(10, 1)) for number in range(2)])
        server.join(PATIENCE_S)
    fresh = ServerCore(settings_for(2, algorithm))
    for _ in replay(path, fresh):
        pass
    assert torch.equal(fresh.master.params, core.master.params)
    assert fresh.summary() == core.summary()
    assert not core.figures.refusals


def send(socket: zmq.Socket[bytes], messages: list[list[bytes]]) -> None:
    for frames in messages:
        socket.send_multipart(frames)


def test_half_a_push_stalls_nobody_and_touches_nothing():
    core = ServerCore(settings_for(2))
    with serving(core) as (address, _), stranger(address) as half:
        send(half, travelling(join_of(0, torch.zeros(SIZE))))
        other = live_worker(address, 1, "dana", 2, Plan(20, 1))
        [first] = take_all(inbox(), receive_all(half))
        assert isinstance(first, Parameters)
        push = push_of(torch.full((SIZE,), 100.0), lr=(0.1,), batch=first.leases[0])
        messages = travelling(push)
        send(half, messages[:-1])
        # Its last chunk never comes. The other worker does all batches but the one that this one holds.
        wait_for(lambda: core.figures.updates == 19)
        assert core.master.params.max() < 2
        # Then all of it comes, from the beginning: it was sent to a view long gone, and a push on that is fine.
        send(half, messages)
        [second] = take_all(inbox(), receive_all(half))
        assert isinstance(second, Parameters)
        assert second.applied
        leave = wire_leave(request=3)
        send(half, travelling(leave))
        until_done(other)
    assert core.figures.updates == 20
    assert not core.figures.refusals


def wire_leave(request: int) -> Message:
    from danaz.server.messages import Leave

    return Leave(0, 1, request, None, torch.zeros(1))


def receive_all(socket: zmq.Socket[bytes]) -> list[list[bytes]]:
    """A reply with a view of SIZE: a header and three chunks."""
    messages = []
    for _ in PARTS:
        assert socket.poll(PATIENCE_S * 1000), "no answer"
        messages.append(socket.recv_multipart())
    return messages


def wait_for(condition) -> None:
    done = threading.Event()
    for _ in range(int(PATIENCE_S / 0.02)):
        if condition():
            return
        done.wait(0.02)
    raise AssertionError("it never came true")


class Counting(ServerCore):
    """Counts the views that are worked out."""

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
    """Neither the others nor the server's memory suffer."""
    size = 40 * SLICE_FLOATS  # 40 MB: more than what TCP holds for a reader that does not read
    core = Counting(settings_for(1))
    with serving(core) as (address, _):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        deaf = context.socket(zmq.DEALER)
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.setsockopt(zmq.RCVBUF, 1 << 16)
        deaf.connect(address)
        join = join_of(0, torch.zeros(size), size)
        send(deaf, travelling(join))
        wait_for(lambda: core.views == 1)
        for _ in range(30):
            send(deaf, travelling(replace(join, params=None)))
        wait_for(lambda: core.asked == 31)
        with stranger(address) as well:
            well.send_multipart(encode(Pull(5, 1, 1)))
            assert isinstance(received(well), Refusal)
        deaf.close(linger=0)
        context.term()
    assert core.views <= 3


def test_who_asks_for_more_and_never_reads_is_not_answered_for_ever():
    """A new request claims that the answers before it were read; what the connection holds says that they were not."""
    size = 40 * SLICE_FLOATS
    core = Counting(settings_for(1))
    with serving(core) as (address, _):
        with stranger(address) as deaf:
            deaf.setsockopt(zmq.RCVHWM, 1)
            send(deaf, travelling(join_of(0, torch.zeros(size), size)))
            wait_for(lambda: core.views == 1)
            for request in range(2, 40):
                send(deaf, travelling(Pull(0, 1, request)))
            wait_for(lambda: core.asked == 39)
            with stranger(address) as well:
                well.send_multipart(encode(Pull(5, 1, 1)))
                assert isinstance(received(well), Refusal)
            held = core.views
            answers = [decode(deaf.recv_multipart(), Parameters)]
            for _ in range(40):
                deaf.recv_multipart()
            assert answers[0].view.numel() == size, "what was sent before is whole"
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
        wait_for(lambda: sum(core.figures.refusals.values()) == 200)
        worker = LiveWorker(address, 0, settings, Plan(5, 1))
        worker.start()
        until_done(worker)


def test_garbage_in_chunks_disturbs_nobody():
    core = ServerCore(settings_for(2))
    header, *chunks = travelling(push_of(torch.full((SIZE,), 100.0), worker=1, lr=(0.1,)))
    huge = [MAGIC, header[1].replace(wire.msgpack.packb(SIZE), wire.msgpack.packb((8 << 30) // 4))]
    with serving(core) as (address, server), stranger(address) as socket:
        workers = [live_worker(address, 0, "dana", 2, Plan(20, 1))]
        send(socket, [header])  # of a worker that has not joined
        assert received(socket) == Refusal(2, "worker has not joined", rejoin=True)
        send(socket, [huge])
        assert received(socket) == Refusal(2, "worker has not joined", rejoin=True)
        workers.append(live_worker(address, 1, "dana", 2, Plan(20, 1)))
        for _ in range(3):
            send(socket, [*chunks, [chunks[0][0], b"1234"], [bytes(CHUNK.size), b""], [chunks[0][0]]])
        until_done(*workers)
        server.join(PATIENCE_S)
    assert core.figures.updates == 20
    assert core.master.params.max() < 2
    assert set(core.figures.refusals) == {
        "worker has not joined",
        "chunk of no message under way",
        "unreadable: not a chunk of this version of danaz",
    }


def test_a_view_stays_until_the_answer_after_the_next():
    """Its worker may compare it with the parameters that its local steps led to."""
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
        assert third.view.data_ptr() == first.view.data_ptr(), "no new memory for each"
        link.close()


def test_the_gap_of_layers_that_cross_slices():
    sizes = [5, SLICE_FLOATS, 0, SLICE_FLOATS - 7, 2, 1000]
    layers = [[f"layer{number}", [size], [1]] for number, size in enumerate(sizes)]
    layout = Layout.from_lists([layers, [], [sum(sizes)]])
    params, view = torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(3))
    master = Master(settings_for(1).rule(0.9), layout, params)
    deltas = (params.double() - view.double()).split(sizes)
    expected = sum(float(delta.norm()) / size**0.5 for delta, size in zip(deltas, sizes, strict=True) if size)
    assert master.layers.gap(master.squares(view)) == pytest.approx(expected, rel=1e-6)
