"""The ROUTER loop on a real socket: garbage does not disturb those who train, and a recorded run replays to the bit."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq
from cluster import DIGEST, layout_of
from torch import Tensor

from danaz.flat import SLICE_FLOATS
from danaz.keys import ServerKeys, WorkerKeys, make_keys
from danaz.server import router as router_module
from danaz.server import socket as socket_module
from danaz.server.answers import Replies, Streams
from danaz.server.core import ServerCore
from danaz.server.messages import (
    Final,
    Heartbeat,
    Noted,
    Parameters,
    Plan,
    Pull,
    Push,
    Refusal,
    Reply,
    Request,
    Streamed,
)
from danaz.server.recording import Recorder, replay
from danaz.server.router import Router
from danaz.server.settings import ServerSettings
from danaz.server.socket import BoundRouter
from danaz.server.wire import CHUNK, MAGIC, decode, encode
from danaz.worker import link as link_module
from danaz.worker.core import Role, WorkerCore
from danaz.worker.link import DealerLink, LocalLink, ServerLostError

SIZE = 1000
ANYWHERE = "tcp://127.0.0.1:0"
PATIENCE_S = 30.0


class Listening(ServerCore):
    """Keeps what it says, as bytes."""

    def __init__(self, settings: ServerSettings):
        super().__init__(settings)
        self.said: list[list[tuple[object, list[bytes]]]] = []

    def stream(self, route, message, now) -> Streams:
        return self._kept(super().stream(route, message, now))

    def stream_tick(self, now) -> Streams:
        return self._kept(super().stream_tick(now))

    def _kept(self, replies: Streams) -> Streams:
        """A Streamed is heard as it is sent."""
        said: list[tuple[object, list[bytes]]] = []
        self.said.append(said)
        heard: Streams = []
        for route, reply in replies:
            said.append((route, []))
            if isinstance(reply, Streamed):
                reply = replace(reply, slices=self._overheard(reply, said[-1][1]))
            else:
                said[-1][1].extend(bytes(frame) for frame in encode(reply))
            heard.append((route, reply))
        return heard

    def _overheard(self, reply: Streamed, frames: list[bytes]) -> Iterator[Tensor]:
        pieces = []
        for piece in reply.slices:
            pieces.append(piece.clone())
            yield piece
        view = torch.cat(pieces)
        frames.extend(bytes(frame) for frame in encode(replace(reply.header, view=view)))


def as_bytes(replies: Replies) -> list[tuple[object, list[bytes]]]:
    return [(route, [bytes(frame) for frame in encode(reply)]) for route, reply in replies]


def settings_for(workers: int, algorithm: str = "dana") -> ServerSettings:
    return ServerSettings(algorithm=algorithm, workers=workers, digest=DIGEST)


@contextmanager
def serving(
    core: ServerCore, recording: Path | None = None, keys: ServerKeys | None = None
) -> Iterator[tuple[str, threading.Thread]]:
    """A server in a thread; it ends when the run has finished, or with the block."""
    stop = threading.Event()
    bound = BoundRouter(ANYWHERE, keys)
    recorder = Recorder(recording, "") if recording else None
    thread = threading.Thread(target=Router(bound).serve, args=(core, recorder, stop.is_set))
    thread.start()
    try:
        yield bound.address, thread
    finally:
        stop.set()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
        bound.close(linger_ms=0)
        if recorder:
            recorder.close()


class LiveWorker(threading.Thread):
    """Trains ½‖θ − 1‖² over a real socket, from the join to the last word."""

    def __init__(
        self,
        address: str,
        number: int,
        settings: ServerSettings,
        plan: Plan,
        keys: WorkerKeys | None = None,
        size: int = SIZE,
    ):
        super().__init__()
        self.size = size
        self.keys = keys
        self.settings, self.address = settings, address
        self.role = Role(number, 1, DIGEST, 0.9, layout_of(size, buffers=1), plan)
        self.final: Final | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        link = DealerLink(self.address, Heartbeat(self.role.worker, 1), give_up_s=PATIENCE_S, keys=self.keys)
        try:
            self.train(link)
        except (ServerLostError, AssertionError) as error:
            self.error = error
        finally:
            link.close()

    def train(self, link: DealerLink) -> None:
        core = WorkerCore(self.role, self.settings.rule(0.9).worker_rule)

        def ask(request: Request) -> Reply:
            reply = link.exchange(request)
            core.receive(reply)
            return reply

        reply = ask(core.join(torch.zeros(self.size) if self.role.worker == 0 else None))
        while True:
            assert isinstance(reply, Parameters), reply
            if reply.done:
                break
            if reply.leases:
                grad: Tensor = reply.view - 1
                reply = ask(core.push(grad, (0.05,), 4, float(grad.square().sum() / 2), reply.leases[0]))
            else:
                reply = ask(core.pull())
        final = ask(core.leave(torch.ones(1)))
        assert isinstance(final, Final), final
        self.final = final
        assert isinstance(ask(core.bye()), Noted)


@contextmanager
def stranger(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A raw DEALER."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(address)
    try:
        yield socket
    finally:
        socket.close(linger=0)
        context.term()


def received(socket: zmq.Socket[bytes]) -> Reply:
    assert socket.poll(PATIENCE_S * 1000), "no answer"
    reply: Reply = decode(socket.recv_multipart(), Reply)
    return reply


PULL = [bytes(frame) for frame in encode(Pull(0, 1, 7))]
GARBAGE = {
    "nothing": [b""],
    "two nothings": [b"", b""],
    "text": [b"GET / HTTP/1.1\r\n\r\n"],
    "a pickle": [pickle.dumps({"worker": 0}), b""],
    "a pickle behind the magic": [MAGIC, pickle.dumps({"worker": 0})],
    "no header": [MAGIC],
    "half a header": [MAGIC, PULL[1][:-3]],
    "a promise of gigabytes": [MAGIC, b"\xdd\xff\xff\xff\xff"],
    "a nest": [MAGIC, b"\x91" * 10_000],
    "a reply": [bytes(frame) for frame in encode(Noted(1))],
    "a tensor too many": [*PULL, b"\0\0\0\0"],
    "a tensor of seven bytes": [
        *[bytes(f) for f in encode(Push(0, 1, 1, 0, (0.1,), 1, None, 0, torch.ones(1)))[:2]],
        b"1234567",
    ],
    "many frames": [b"x"] * 300,
}


def test_garbage_is_refused_with_a_reason_while_others_train_on():
    settings = settings_for(workers=2)
    core = ServerCore(settings)
    with serving(core) as (address, server), stranger(address) as socket:
        workers = [LiveWorker(address, number, settings, Plan(50, 2)) for number in range(2)]
        workers[0].start()  # waits for the other: the run is alive, but not over before the garbage is in
        for frames in GARBAGE.values():
            socket.send_multipart(frames)
            refusal = received(socket)
            assert isinstance(refusal, Refusal)
            assert refusal.reason.startswith("unreadable: ")
            assert (refusal.request, refusal.rejoin) == (0, False)
        workers[1].start()
        for _ in range(20):
            for frames in GARBAGE.values():
                socket.send_multipart(frames)
        for worker in workers:
            worker.join(PATIENCE_S)
            assert worker.error is None
        server.join(PATIENCE_S)
        assert core.finished
    unreadable = sum(count for reason, count in core.figures.refusals.items() if reason.startswith("unreadable"))
    assert unreadable >= len(GARBAGE)
    assert sum(core.figures.refusals.values()) == unreadable, "no worker was refused anything"
    assert core.figures.updates == 100
    for worker in workers:
        assert worker.final is not None
        assert torch.equal(worker.final.params, core.master.params)
        assert (worker.final.params - 1).abs().max() < 0.05, "and it learned"


def test_a_well_formed_stranger_is_refused_too():
    core = ServerCore(settings_for(workers=1))
    with serving(core) as (address, _), stranger(address) as socket:
        socket.send_multipart(PULL)
        assert received(socket) == Refusal(7, "worker has not joined", rejoin=True)
    assert core.figures.refusals == {"worker has not joined": 1}


def test_an_oversized_frame_costs_its_sender_the_connection(monkeypatch):
    monkeypatch.setattr(socket_module, "MAX_MESSAGE_BYTES", 100_000)
    settings = settings_for(workers=1)
    core = ServerCore(settings)
    with serving(core) as (address, _), stranger(address) as socket:
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send_multipart([MAGIC, bytes(200_000)])
        disconnected = monitor.poll(PATIENCE_S * 1000)
        socket.disable_monitor()
        monitor.close(linger=0)
        assert disconnected
        worker = LiveWorker(address, 0, settings, Plan(5, 1))
        worker.start()
        worker.join(PATIENCE_S)
        assert worker.error is None
        assert worker.final is not None
    assert not core.figures.refusals, "not a byte of it was read"


@pytest.mark.parametrize("algorithm", ["dana", "dana-zero", "ssgd"])
def test_a_recorded_live_run_replays_to_the_bit(tmp_path, monkeypatch, algorithm):
    monkeypatch.setattr(router_module, "TICK_S", 0.005)  # so that ticks fall between messages
    settings = settings_for(workers=3, algorithm=algorithm)
    live = Listening(settings)
    path = tmp_path / "recording.bin"
    with serving(live, path) as (address, server), stranger(address) as socket:
        workers = [LiveWorker(address, number, settings, Plan(20, 2)) for number in range(3)]
        for worker in workers:
            worker.start()
            socket.send_multipart([b"garbage in between"])
        for worker in workers:
            worker.join(PATIENCE_S)
            assert worker.error is None
        server.join(PATIENCE_S)
    fresh = ServerCore(settings)
    assert [as_bytes(replies) for replies in replay(path, fresh)] == live.said
    assert torch.equal(fresh.master.params, live.master.params)
    assert fresh.figures.updates == live.figures.updates == (40 if algorithm != "ssgd" else live.master.version)
    assert any(said == [] for said in live.said), "some of them ticks"


# ---- the other end -----------------------------------------------------------------------------------------------


@contextmanager
def silent_server(slow: bool = False) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """A ROUTER that the test answers for; a ``slow`` one takes little before the test has read it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    if slow:
        socket.setsockopt(zmq.RCVHWM, 1)
        socket.setsockopt(zmq.RCVBUF, 1 << 16)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    try:
        yield socket, f"tcp://127.0.0.1:{port}"
    finally:
        socket.close(linger=0)
        context.term()


class Clock:
    """In place of the module ``time``: it stands, unless the test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.looked = threading.Event()

    def monotonic(self) -> float:
        self.looked.set()
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        """Returns when somebody has looked at the new time, and again after having thought about it."""
        self.now_s += seconds
        for _ in range(3):
            self.looked.clear()
            assert self.looked.wait(PATIENCE_S)


class Asking(threading.Thread):
    """A few exchanges, in a thread of its own."""

    def __init__(self, address: str, *requests: Request, give_up_s: float = PATIENCE_S):
        super().__init__()
        self.address, self.requests, self.give_up_s = address, requests, give_up_s
        self.reply: Reply | None = None
        self.error: ServerLostError | None = None

    def run(self) -> None:
        link = DealerLink(self.address, Heartbeat(0, 1), self.give_up_s)
        try:
            for request in self.requests:
                self.reply = link.exchange(request)
        except ServerLostError as error:
            self.error = error
        finally:
            link.close()


class TestDealerLink:
    def test_what_is_not_answered_is_said_again_the_same(self, monkeypatch):
        monkeypatch.setattr(link_module, "RETRY_FIRST_S", 0.05)
        push = Push(0, 1, 2, 0, (0.1,), 1, None, 0, torch.arange(5.0))
        with silent_server() as (socket, address):
            asking = Asking(address, push)
            asking.start()
            copies = [socket.recv_multipart() for _ in range(3)]
            assert copies[0] == copies[1] == copies[2]
            assert torch.equal(decode(copies[0][1:]).push, push.push)
            socket.send_multipart([copies[0][0], *encode(Noted(2))])
            asking.join(PATIENCE_S)
        assert asking.reply == Noted(2)

    def test_what_is_still_leaving_is_not_said_again(self, monkeypatch):
        """A reader so slow that a push takes many times the wait before a repetition gets one copy."""
        clock = Clock()
        monkeypatch.setattr(link_module, "time", clock)
        monkeypatch.setattr(link_module, "RETRY_FIRST_S", 0.05)
        monkeypatch.setattr(link_module, "LEAVING_S", 0.005)
        push = Push(0, 1, 2, 0, (0.1,), 1, None, 0, torch.ones(20 * SLICE_FLOATS + 5))  # more than TCP takes unread
        with silent_server(slow=True) as (socket, address):
            asking = Asking(address, push, Pull(0, 1, 3))
            asking.start()
            route, *heard = socket.recv_multipart()
            assert decode(heard).push.numel() == push.push.numel()
            for number in range(21):
                if number < 8:  # 12 MB are still to come
                    clock.pass_s(1.0)
                assert CHUNK.unpack(socket.recv_multipart()[1])[2] == number
            socket.send_multipart([route, *encode(Noted(2))])
            assert decode(socket.recv_multipart()[1:]) == Pull(0, 1, 3), "and not the push again"
            socket.send_multipart([route, *encode(Noted(3))])
            asking.join(PATIENCE_S)
        assert asking.reply == Noted(3)

    def test_late_answers_are_dropped(self):
        with silent_server() as (socket, address):
            asking = Asking(address, Pull(0, 1, 5))
            asking.start()
            route = socket.recv_multipart()[0]
            for number in (3, 4, 5):
                socket.send_multipart([route, *encode(Noted(number))])
            asking.join(PATIENCE_S)
        assert asking.reply == Noted(5)

    def test_it_gives_up_and_says_where(self, monkeypatch):
        monkeypatch.setattr(link_module, "RETRY_FIRST_S", 0.02)
        with silent_server() as (_, address):
            asking = Asking(address, Pull(0, 1, 1), give_up_s=0.2)
            asking.start()
            asking.join(PATIENCE_S)
            assert asking.error is not None
            assert address in str(asking.error)

    def test_it_finds_a_server_that_comes_later(self, monkeypatch):
        """ZeroMQ connects, and connects again, by itself."""
        with silent_server() as (_, address):
            pass
        asking = Asking(address, Pull(0, 1, 1))
        asking.start()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.ROUTER)
        socket.bind(address)
        try:
            assert socket.poll(PATIENCE_S * 1000)
            route = socket.recv_multipart()[0]
            socket.send_multipart([route, *encode(Noted(1))])
            asking.join(PATIENCE_S)
        finally:
            socket.close(linger=0)
            context.term()
        assert asking.reply == Noted(1)

    def test_what_is_no_danaz_server(self):
        with silent_server() as (socket, address):
            asking = Asking(address, Pull(0, 1, 1))
            asking.start()
            route = socket.recv_multipart()[0]
            socket.send_multipart([route, b"HTTP/1.1 400 Bad Request"])
            asking.join(PATIENCE_S)
            assert asking.error is not None
            assert "no danaz server" in str(asking.error)

    def test_its_heart_beats_while_it_computes(self, monkeypatch):
        monkeypatch.setattr(link_module, "HEARTBEAT_S", 0.02)
        with silent_server() as (socket, address):
            link = DealerLink(address, Heartbeat(3, 2))
            beats = [socket.recv_multipart() for _ in range(3)]
            link.close()
        assert {decode(frames[1:]) for frames in beats} == {Heartbeat(3, 2)}


class TestLocalLink:
    def test_a_lone_worker_needs_no_socket(self):
        closed = []
        link = LocalLink(ServerCore(settings_for(1)), on_close=lambda: closed.append(True))
        role = Role(0, 1, DIGEST, 0.9, layout_of(3), Plan(1, 1))
        reply = link.exchange(WorkerCore(role, settings_for(1).rule(0.9).worker_rule).join(torch.ones(3)))
        assert isinstance(reply, Parameters)
        link.close()
        assert closed == [True]

    def test_waiting_for_others_would_be_for_ever(self):
        link = LocalLink(ServerCore(settings_for(2)))
        role = Role(0, 1, DIGEST, 0.9, layout_of(3), Plan(1, 1))
        with pytest.raises(ServerLostError, match="never come"):
            link.exchange(WorkerCore(role, settings_for(2).rule(0.9).worker_rule).join(torch.ones(3)))


class TestKeys:
    """CURVE: this run's workers get through, each as itself; nobody else gets anything."""

    def test_workers_with_their_keys_train(self) -> None:
        server_keys, worker_keys = make_keys(2)
        settings, plan = settings_for(2), Plan(6, 1)
        core = ServerCore(settings)
        with serving(core, keys=server_keys) as (address, thread):
            workers = [LiveWorker(address, n, settings, plan, keys) for n, keys in enumerate(worker_keys)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join(PATIENCE_S)
                assert worker.error is None
            thread.join(PATIENCE_S)
        assert core.figures.updates == 6

    def test_a_worker_cannot_speak_as_another(self) -> None:
        server_keys, (_, of_one) = make_keys(2)
        core = ServerCore(settings_for(2))
        with serving(core, keys=server_keys) as (address, _):
            link = DealerLink(address, Heartbeat(0, 1), give_up_s=PATIENCE_S, keys=of_one)
            reply = link.exchange(Pull(0, 1, 1))
            link.close()
        assert isinstance(reply, Refusal)
        assert reply.reason == "worker number is not the one of this key"
        assert core.figures.refusals == {"worker number is not the one of this key": 1}

    @pytest.mark.parametrize("whose", ["nobody's", "another run's", "the right ones for another server"])
    def test_strangers_get_nothing(self, whose: str) -> None:
        server_keys, [right] = make_keys(1)
        _, [foreign] = make_keys(1)
        keys = {
            "nobody's": None,
            "another run's": WorkerKeys(foreign.public, foreign.secret, right.server),
            "the right ones for another server": WorkerKeys(right.public, right.secret, foreign.server),
        }[whose]
        core = ServerCore(settings_for(1))
        with serving(core, keys=server_keys) as (address, _):
            link = DealerLink(address, Heartbeat(0, 1), give_up_s=1.0, keys=keys)
            with pytest.raises(ServerLostError, match="did not answer"):
                link.exchange(Pull(0, 1, 1))
            link.close()
        assert core.figures.refusals == {}  # it never reached the core
