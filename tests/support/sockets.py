"""Servers and workers on real sockets of this machine, in threads of the test process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import zmq
from cluster import DIGEST, layout_of
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.keys import ServerKeys, WorkerKeys
from danaz.protocol.messages import Final, Heartbeat, Noted, Parameters, Plan, Reply, Request
from danaz.protocol.wire import decode
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.serving.recording import Recorder
from danaz.serving.router import Router
from danaz.serving.socket import BoundRouter
from danaz.worker.core import Role, Step, WorkerCore
from danaz.worker.link import DealerLink, ServerLostError

ANYWHERE = "tcp://127.0.0.1:0"
PATIENCE_S = 30.0


def settings_for(workers: int, algorithm: str = "dana") -> ServerSettings:
    return ServerSettings(algorithm=algorithm, workers=workers, digest=DIGEST)


@contextmanager
def serving(
    core: ServerCore, recording: Path | None = None, keys: ServerKeys | None = None
) -> Iterator[tuple[str, threading.Thread]]:
    """Run a server in a thread. It ends when the run has finished, or at the end of the block."""
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


@contextmanager
def silent_server(slow: bool = False) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """Open a ROUTER socket that the test reads and answers; a ``slow`` one buffers little until the test reads."""
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


class LiveWorker(threading.Thread):
    """Trains ½‖θ − 1‖² over a real socket, from the join to the good-bye."""

    def __init__(
        self,
        address: str,
        number: int,
        settings: ServerSettings,
        plan: Plan,
        keys: WorkerKeys | None = None,
        size: int = 1000,
        optimizers: Optimizers = SGD,
    ):
        super().__init__()
        self.size = size
        self.keys = keys
        self.settings, self.address = settings, address
        self.role = Role(number, 1, DIGEST, optimizers, layout_of(size, buffers=1), plan)
        self.newest: Parameters | None = None  # the last view that it got
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
        core = WorkerCore(self.role, self.settings.rule(self.role.optimizers).worker_rule)

        def ask(request: Request) -> Reply:
            reply = link.exchange(request)
            core.receive(reply)
            return reply

        reply = ask(core.join(torch.zeros(self.size) if self.role.worker == 0 else None))
        while True:
            assert isinstance(reply, Parameters), reply
            self.newest = reply
            if reply.done:
                break
            if reply.leases:
                grad: Tensor = reply.view - 1
                step = Step(reply.leases[0], (0.05,), 4, float(grad.square().sum() / 2))
                reply = ask(core.push(step, grad, reply.view))
            else:
                reply = ask(core.pull())
        final = ask(core.leave(torch.ones(1)))
        assert isinstance(final, Final), final
        self.final = final
        assert isinstance(ask(core.bye()), Noted)


def until_done(*workers: LiveWorker) -> None:
    """Wait until the workers have trained to the end of the run."""
    for worker in workers:
        worker.join(PATIENCE_S)
        assert worker.error is None
        assert worker.final is not None


@contextmanager
def stranger(address: str) -> Iterator[zmq.Socket[bytes]]:
    """Open a raw DEALER socket."""
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
