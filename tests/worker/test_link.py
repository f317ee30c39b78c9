"""The worker's end of the link: what it repeats, which answers it takes, and when it gives up."""

from __future__ import annotations

import threading

import pytest
import torch
import zmq
from cluster import DIGEST, layout_of
from sockets import PATIENCE_S, settings_for, silent_server

from danaz.optimizers import SGD
from danaz.protocol.messages import Heartbeat, Noted, Parameters, Plan, Pull, Push, Reply, Request
from danaz.protocol.wire import CHUNK, decode, encode
from danaz.server.core import ServerCore
from danaz.torch.alone import LocalLink
from danaz.vectors.cutting import SLICE_FLOATS
from danaz.worker import link as link_module
from danaz.worker.core import Role, WorkerCore
from danaz.worker.link import DealerLink, ServerLostError


class Clock:
    """Stands in for the module ``time``. Its time stands still unless the test moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.looked = threading.Event()

    def monotonic(self) -> float:
        self.looked.set()
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Move the time, and return when the code under test has read the new time, acted on it, and read it again."""
        self.now_s += seconds
        for _ in range(3):
            self.looked.clear()
            assert self.looked.wait(PATIENCE_S)


class Asking(threading.Thread):
    """A thread that makes a few exchanges."""

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
    def test_an_unanswered_request_is_repeated_unchanged(self, monkeypatch):
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

    def test_a_request_that_is_still_being_sent_is_not_repeated(self, monkeypatch):
        """The reader is so slow that a push takes many times the wait before a repetition. It gets only one copy."""
        clock = Clock()
        monkeypatch.setattr(link_module, "time", clock)
        monkeypatch.setattr(link_module, "RETRY_FIRST_S", 0.05)
        monkeypatch.setattr(link_module, "LEAVING_S", 0.005)
        push = Push(0, 1, 2, 0, (0.1,), 1, None, 0, torch.ones(20 * SLICE_FLOATS + 5))  # more than TCP buffers unread
        with silent_server(slow=True) as (socket, address):
            asking = Asking(address, push, Pull(0, 1, 3))
            asking.start()
            route, *heard = socket.recv_multipart()
            assert decode(heard).push.numel() == push.push.numel()
            for number in range(21):
                if number < 8:  # 12 MB are still to come
                    clock.advance(1.0)
                assert CHUNK.unpack(socket.recv_multipart()[1])[2] == number
            socket.send_multipart([route, *encode(Noted(2))])
            assert decode(socket.recv_multipart()[1:]) == Pull(0, 1, 3), "the push must not come again"
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
        """ZeroMQ connects and reconnects by itself."""
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

    def test_an_answer_that_is_not_danaz_is_an_error(self):
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
        role = Role(0, 1, DIGEST, SGD, layout_of(3), Plan(1, 1))
        reply = link.exchange(WorkerCore(role, settings_for(1).rule().worker_rule).join(torch.ones(3)))
        assert isinstance(reply, Parameters)
        link.close()
        assert closed == [True]

    def test_it_does_not_wait_for_workers_that_never_come(self):
        link = LocalLink(ServerCore(settings_for(2)))
        role = Role(0, 1, DIGEST, SGD, layout_of(3), Plan(1, 1))
        with pytest.raises(ServerLostError, match="waits for other workers, and it can have none"):
            link.exchange(WorkerCore(role, settings_for(2).rule().worker_rule).join(torch.ones(3)))
