"""Attacks on a server process with keys: their cost is bounded, and the workers do not notice them."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import live
import msgpack
import pytest
import torch
import zmq
from attack import GREETING, LONG_COMMAND, MB, Victim, as_worker, knock, victim
from cluster import DIGEST, layout_of
from sockets import LiveWorker, received, serving, settings_for, until_done

from danaz.optimizers import SGD
from danaz.protocol import wire
from danaz.protocol.frames import MAX_FRAME_BYTES
from danaz.protocol.messages import Bye, Heartbeat, Join, Leave, Message, Parameters, Plan, Pull, Push, Refusal
from danaz.protocol.wire import encode
from danaz.server.core import ServerCore
from danaz.serving.doorkeeper import MAX_STRANGERS, MAX_UNREAD, SPARE, WORKER_CONNECTIONS
from danaz.vectors.codecs import push_codec
from danaz.vectors.cutting import SLICE_FLOATS, announced
from danaz.vectors.layout import Layout
from danaz.worker.link import DealerLink

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WORKERS = 2
STRANGER_MB = 64  # docs/security.md
WORKER_MB = (WORKER_CONNECTIONS + 2 * WORKERS + SPARE) * MAX_UNREAD / MB + 64
READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
CURVE_BYTES = 64  # that encryption adds to a frame, at most
JOIN = Join(0, 1, 1, DIGEST, SGD, layout_of(1000), Plan(5, 2), 1, torch.ones(1000))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with victim(tmp_path_factory.mktemp("attacked") / "run", WORKERS) as attacked:
        is_served(attacked)  # it has finished its imports
        yield attacked


def is_served(attacked: Victim) -> None:
    """Check that the server answers a worker."""
    link = DealerLink(attacked.address, Heartbeat(0, 1), give_up_s=live.DEADLINE_S, keys=attacked.keys[0])
    reply = link.exchange(Pull(0, 1, 1))
    link.close()
    assert isinstance(reply, Refusal)


def read_until_cut(raw: socket.socket) -> None:
    """Wait until the other side has closed the connection."""
    raw.settimeout(live.DEADLINE_S)
    with suppress(ConnectionError):
        while raw.recv(4096):
            pass


class TestStrangers:
    """All connections without a key together cost at most 64 MB."""

    def test_frames_within_the_limit_on_many_connections(self, server):
        server.forget_peak()
        before = server.peak_mb
        held = []
        frame = LONG_COMMAND.pack(6, MAX_FRAME_BYTES) + bytes(MAX_FRAME_BYTES - 1)  # all but its last byte
        for _ in range(100):
            with suppress(ConnectionError):
                held.append(knock(server))
                held[-1].sendall(frame)
        is_served(server)
        assert server.peak_mb - before < STRANGER_MB
        for raw in held:
            raw.close()

    def test_a_frame_of_8_gb_is_cut_before_any_of_it_is_stored(self, server):
        server.forget_peak()
        before = server.peak_mb
        for _ in range(4):
            raw = knock(server)
            with suppress(ConnectionError):
                raw.sendall(LONG_COMMAND.pack(6, 7900 * MB))
                for _ in range(100):
                    raw.sendall(bytes(MB))
            read_until_cut(raw)
            raw.close()
        assert server.peak_mb - before < 8
        is_served(server)

    def test_half_open_connections_are_few(self, server):
        before, held = server.descriptors, []
        for number in range(300):
            held.append(knock(server) if number % 2 else socket.create_connection(server.place))
        live.until(lambda: server.descriptors - before <= 2 * MAX_STRANGERS + 2, "the oldest are cut")
        is_served(server)
        for raw in held:
            raw.close()


class TestWorkers:
    """A connection with a key costs at most a fixed multiple of the model, and a worker may have a limited number."""

    @pytest.mark.parametrize("parts", [[bytes(MB)] * 400, [b""] * 3_000_000], ids=["of 400 MB", "of nothing"])
    def test_a_message_that_does_not_end(self, server, parts):
        server.forget_peak()
        before = server.peak_mb
        with as_worker(server, 1) as [dealer]:
            monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            for part in parts:
                dealer.send(part, zmq.SNDMORE, copy=False)
            dealer.send(b"")
            assert monitor.poll(1000 * live.DEADLINE_S), "it was cut"
            dealer.disable_monitor()
            monitor.close(linger=0)
        is_served(server)
        assert server.peak_mb - before < WORKER_MB

    def test_many_connections_that_hold_as_much_as_they_may(self, server):
        server.forget_peak()
        before, descriptors = server.peak_mb, server.descriptors
        with as_worker(server, 1, connections=150) as dealers:
            for dealer in dealers:
                dealer.send_multipart([bytes(MB)] * 11, copy=False)
            most = WORKER_CONNECTIONS + 2 * WORKERS + SPARE + MAX_STRANGERS
            live.until(lambda: server.descriptors - descriptors <= 2 * most, "the others are cut")
            is_served(server)
        assert server.peak_mb - before < WORKER_MB


HUGE_LAYOUT = [[["w", [1 << 42], [1]]], [], [1 << 42]]
HOSTILE: dict[str, Message] = {
    "a Join that announces 16 G floats": replace(JOIN, params=announced(1 << 34)),
    "a Join of a model of 16 G floats": replace(JOIN, layout=layout_of(1 << 34), params=announced(1 << 34)),
    "a Bye that announces 16 G floats": Bye(0, 1, 2, rest=announced(1 << 34)),
    "a Leave that announces 16 G floats": Leave(0, 1, 2, None, announced(1 << 34)),
    "a Push that announces 16 G floats": Push(0, 1, 2, 0, (0.1,), 1, None, 0, announced(1 << 34)),
}


class TestMessages:
    @pytest.mark.parametrize("what", HOSTILE)
    def test_hostile_announcements_are_answered_and_the_server_goes_on(self, server, what):
        server.forget_peak()
        before = server.peak_mb
        with as_worker(server, 0) as [dealer]:
            dealer.send_multipart(encode(HOSTILE[what]))
            assert isinstance(received(dealer), Refusal)
        is_served(server)
        assert server.peak_mb - before < 32

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("request", -1),
            ("request", 1 << 63),
            ("layout", [[["w", [1 << 42], [1]]], [], [1 << 42]]),
            ("ahead", 1 << 40),
        ],
    )
    def test_hostile_numbers_are_refused_and_the_server_goes_on(self, server, field, value):
        magic, header, *_ = (bytes(frame) for frame in encode(replace(JOIN, params=None)))
        kind, fields, present = msgpack.unpackb(header)
        with as_worker(server, 0) as [dealer]:
            dealer.send_multipart([magic, msgpack.packb([kind, {**fields, field: value}, present])])
            refusal = received(dealer)
            assert isinstance(refusal, Refusal)
            assert refusal.reason.startswith(f"unreadable: field {field} ")
        is_served(server)

    def test_workers_train_after_all_that_and_a_signal_ends_the_server(self, tmp_path):
        with victim(tmp_path / "run", 1) as attacked:
            for message in HOSTILE.values():
                with as_worker(attacked, 0) as [dealer]:
                    dealer.send_multipart(encode(message))
                    assert isinstance(received(dealer), Refusal)
            link = DealerLink(attacked.address, Heartbeat(0, 1), give_up_s=live.DEADLINE_S, keys=attacked.keys[0])
            assert isinstance(link.exchange(JOIN), Parameters)
            attacked.process.send_signal(signal.SIGTERM)
            assert attacked.process.wait(live.DEADLINE_S) == 0
            link.close()


class TestLimits:
    """The limits leave room for honest traffic."""

    def test_every_frame_that_danaz_sends_fits(self):
        largest_slice = max(push_codec(name).encoded_bytes(SLICE_FLOATS) for name in ("fp32", "onebit", "topk:0.999"))
        assert max(largest_slice, wire.MAX_HEADER_BYTES) + CURVE_BYTES <= MAX_FRAME_BYTES

    def test_a_model_of_many_tensors_joins_and_trains(self):
        """The model has 18,000 tensors with long names, as a mixture of experts may have."""
        rows = [
            [f"model.layers.{layer}.mlp.experts.{expert}.{kind}.weight", [8, 4], [4, 1]]
            for layer in range(60)
            for expert in range(100)
            for kind in ("gate_proj", "up_proj", "down_proj")
        ]
        layout = Layout.from_lists([rows, [["running_mean", [1], [1]]], [32 * len(rows)]])
        core, settings = ServerCore(settings_for(1)), settings_for(1)
        with serving(core) as (address, thread):
            worker = LiveWorker(address, 0, settings, Plan(3, 1), size=layout.size)
            worker.role = replace(worker.role, layout=layout)
            worker.start()
            until_done(worker)
            thread.join(live.DEADLINE_S)
        assert core.totals.updates == 3

    def test_without_keys_a_connection_is_bounded_too(self):
        """An insecure server limits each connection, but not their number."""
        core = ServerCore(settings_for(1))
        with serving(core) as (address, _):
            host, port = address.removeprefix("tcp://").rsplit(":", 1)
            raw = socket.create_connection((host, int(port)), timeout=live.DEADLINE_S)
            raw.sendall(GREETING.replace(b"CURVE", b"NULL\0"))
            raw.sendall(bytes([4, len(READY)]) + READY)
            sent = 0
            began = time.monotonic()
            with suppress(ConnectionError):
                while time.monotonic() < began + live.DEADLINE_S:
                    raw.sendall(LONG_COMMAND.pack(3, MB) + bytes(MB))  # a frame, and more to come
                    sent += 1
            raw.close()
        assert sent >= MAX_UNREAD // MB, "as much as a slow server may have waiting"
        assert time.monotonic() < began + live.DEADLINE_S, "it was cut"
