"""The ROUTER loop on a real socket: garbage and strangers do not disturb those who train."""

from __future__ import annotations

import pickle

import pytest
import torch
import zmq
from sockets import PATIENCE_S, LiveWorker, received, serving, settings_for, stranger, until_done

from danaz.protocol.keys import WorkerKeys, make_keys
from danaz.protocol.messages import Heartbeat, Noted, Plan, Pull, Push, Refusal
from danaz.protocol.wire import MAGIC, encode
from danaz.server.core import ServerCore
from danaz.serving import socket as socket_module
from danaz.worker.link import DealerLink, ServerLostError

PULL = [bytes(frame) for frame in encode(Pull(0, 1, 7))]
GARBAGE = {
    "nothing": [b""],
    "two nothings": [b"", b""],
    "text": [b"GET / HTTP/1.1\r\n\r\n"],
    "a pickle": [pickle.dumps({"worker": 0}), b""],
    "a pickle after the magic": [MAGIC, pickle.dumps({"worker": 0})],
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
        workers[0].start()  # waits for the other one, so that the run is not over before the garbage has come
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
        until_done(*workers)
        server.join(PATIENCE_S)
        assert core.finished
    unreadable = sum(count for reason, count in core.totals.refusals.items() if reason.startswith("unreadable"))
    assert unreadable >= len(GARBAGE)
    assert sum(core.totals.refusals.values()) == unreadable, "no worker was refused anything"
    assert core.totals.updates == 100
    for worker in workers:
        assert torch.equal(worker.final.params, core.master.params)
        assert (worker.final.params - 1).abs().max() < 0.05, "it learned"


def test_a_well_formed_stranger_is_refused_too():
    core = ServerCore(settings_for(workers=1))
    with serving(core) as (address, _), stranger(address) as socket:
        socket.send_multipart(PULL)
        assert received(socket) == Refusal(7, "worker has not joined", rejoin=True)
    assert core.totals.refusals == {"worker has not joined": 1}


def test_an_oversized_frame_costs_its_sender_the_connection(monkeypatch):
    monkeypatch.setattr(socket_module, "MAX_FRAME_BYTES", 100_000)
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
        until_done(worker)
    assert not core.totals.refusals, "not a byte of it was read"


class TestKeys:
    """With CURVE, this run's workers are admitted, each as itself, and all others get no answer."""

    def test_workers_with_their_keys_train(self) -> None:
        server_keys, worker_keys = make_keys(2)
        settings, plan = settings_for(2), Plan(6, 1)
        core = ServerCore(settings)
        with serving(core, keys=server_keys) as (address, thread):
            workers = [LiveWorker(address, n, settings, plan, keys) for n, keys in enumerate(worker_keys)]
            for worker in workers:
                worker.start()
            until_done(*workers)
            thread.join(PATIENCE_S)
        assert core.totals.updates == 6

    def test_a_worker_cannot_speak_as_another(self) -> None:
        server_keys, (_, of_one) = make_keys(2)
        core = ServerCore(settings_for(2))
        with serving(core, keys=server_keys) as (address, _):
            link = DealerLink(address, Heartbeat(0, 1), give_up_s=PATIENCE_S, keys=of_one)
            reply = link.exchange(Pull(0, 1, 1))
            link.close()
        assert isinstance(reply, Refusal)
        assert reply.reason == "worker number is not the one of this key"
        assert core.totals.refusals == {"worker number is not the one of this key": 1}

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
            link = DealerLink(address, Heartbeat(0, 1), give_up_s=0.5, keys=keys)
            for number in (1, 2):  # ZeroMQ gives the connection up after the first one, and then takes no more
                with pytest.raises(ServerLostError, match="did not answer"):
                    link.exchange(Pull(0, 1, number))
            link.close()
        assert core.totals.refusals == {}  # it never reached the core
