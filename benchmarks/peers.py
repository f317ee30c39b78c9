"""danaz and other parameter servers, to be compared: each answers a vector f32[P] with a vector f32[P].

A peer consists of two functions. ``serve(ready, floats, workers)`` calls ``ready(address)`` once and then serves until
its process is killed. ``connect(address, floats, worker, workers)`` returns a function that makes one exchange.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import zmq

from danaz.optimizers import SGD
from danaz.protocol.keys import ServerKeys, WorkerKeys, make_keys

Exchange = Callable[[], object]
Ready = Callable[[str], None]


@dataclass(frozen=True)
class Peer:
    """A parameter server that can be measured."""

    name: str
    serve: Callable[[Ready, int, int], None]
    connect: Callable[[str, int, int, int], Exchange]
    needs: str = ""  # a package in the extra `bench`

    @property
    def missing(self) -> str:
        """Why it cannot be measured here; empty if it can."""
        there = not self.needs or importlib.util.find_spec(self.needs)
        return "" if there else f"{self.name} is left out: {self.needs} is not installed (pip install 'danaz[bench]')"


# ---- danaz -----------------------------------------------------------------------------------------------------------


MOST_WORKERS = 64


@cache
def _keys() -> tuple[ServerKeys, list[WorkerKeys]]:
    return make_keys(MOST_WORKERS)


def danaz(algorithm: str, gap: bool = False, encrypted: bool = False, shards: int = 1) -> Peer:
    """Return danaz with its real server loop and link. Like every peer, it pushes the same vector again and again."""

    def serve(ready: Ready, floats: int, workers: int) -> None:
        from danaz.server.core import ServerCore
        from danaz.server.settings import ServerSettings
        from danaz.serving.router import Router
        from danaz.serving.socket import BoundRouter

        def serve_slice(shard: int, tell: Ready) -> None:
            bound = BoundRouter("tcp://127.0.0.1:0", _keys()[0] if encrypted else None)
            tell(bound.address)
            core = ServerCore(ServerSettings(algorithm, workers, gap_every=int(gap), shard=shard, shards=shards))
            Router(bound).serve(core, None, lambda: False)

        others = [_fork(lambda tell, shard=shard: serve_slice(shard, tell)) for shard in range(1, shards)]
        serve_slice(0, lambda address: ready(" ".join([address, *others])))

    def connect(address: str, floats: int, worker: int, workers: int) -> Exchange:
        from danaz.protocol.messages import Heartbeat, Join, Parameters, Plan, Push
        from danaz.vectors.layout import Layout
        from danaz.worker.link import DealerLink
        from danaz.worker.sharded import connect as connect_all

        layout, plan = Layout.from_lists([[["w", [floats], [1]]], [], [floats]]), Plan(1 << 40, 1)
        heartbeat, keys = Heartbeat(worker, 1), _keys()[1][worker] if encrypted else None
        link = connect_all(address.split(), layout, lambda each: DealerLink(each, heartbeat, keys=keys))
        grad = torch.full((floats,), 1e-6)
        params = torch.zeros(floats) if worker == 0 else None
        last = link.exchange(Join(worker, 1, 1, "", SGD, layout, plan, 1, params))
        request = 1

        def exchange() -> object:
            nonlocal last, request
            assert isinstance(last, Parameters), last
            request += 1
            last = link.exchange(
                Push(worker, 1, request, last.version, (1e-6,), 1, None, last.leases[0], grad),
            )
            return last

        return exchange

    if encrypted:
        _keys()  # made before any process is forked, so that all have the same
    many = [f"{shards} shards"] if shards > 1 else []
    name = " ".join(["danaz", algorithm, *["gap on"] * gap, *["encrypted"] * encrypted, *many])
    return Peer(name, serve, connect)


def _fork(serve: Callable[[Ready], None]) -> str:
    """Serve in a child process, which the benchmark kills in the end. Returns the address."""
    read, write = os.pipe()
    if os.fork() == 0:
        with os.fdopen(write, "w", buffering=1) as pipe:
            serve(lambda address: print(address, file=pipe))
        os._exit(0)
    with os.fdopen(read) as pipe:
        return pipe.readline().strip()


# ---- the same bytes, without arithmetic ------------------------------------------------------------------------------


def _serve_echo(ready: Ready, floats: int, workers: int) -> None:
    router = zmq.Context.instance().socket(zmq.ROUTER)
    ready(f"tcp://127.0.0.1:{router.bind_to_random_port('tcp://127.0.0.1')}")
    while True:
        router.send_multipart(router.recv_multipart(copy=False), copy=False)


def _connect_echo(address: str, floats: int, worker: int, workers: int) -> Exchange:
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.connect(address)
    payload = np.zeros(floats, np.float32)

    def exchange() -> object:
        dealer.send(payload, copy=False)
        return dealer.recv(copy=False)

    return exchange


def _serve_tcp(ready: Ready, floats: int, workers: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    ready(f"{listener.getsockname()[1]}")

    def answer(connection: socket.socket) -> None:
        buffer = memoryview(bytearray(4 * floats))
        while _receive(connection, buffer):
            connection.sendall(buffer)

    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=answer, args=(connection,), daemon=True).start()


def _connect_tcp(address: str, floats: int, worker: int, workers: int) -> Exchange:
    connection = socket.create_connection(("127.0.0.1", int(address)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = memoryview(bytearray(4 * floats))

    def exchange() -> object:
        connection.sendall(buffer)
        return _receive(connection, buffer)

    return exchange


def _receive(connection: socket.socket, buffer: memoryview) -> bool:
    done = 0
    while done < len(buffer):
        count = connection.recv_into(buffer[done:])
        if not count:
            return False
        done += count
    return True


# ---- torch: both apply θ ← θ − ηg, as danaz asgd does ----------------------------------------------------------------


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _serve_gloo(ready: Ready, floats: int, workers: int) -> None:
    import torch.distributed as dist

    address = f"tcp://127.0.0.1:{_free_port()}"
    ready(address)
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=workers + 1)
    params, buffer = torch.zeros(floats), torch.empty(floats)
    while True:
        source = dist.recv(buffer)
        params.sub_(buffer, alpha=1e-6)
        dist.send(params, source)


def _connect_gloo(address: str, floats: int, worker: int, workers: int) -> Exchange:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=address, rank=worker + 1, world_size=workers + 1)
    grad, view = torch.full((floats,), 1e-6), torch.empty(floats)

    def exchange() -> object:
        dist.send(grad, 0)
        return dist.recv(view, 0)

    return exchange


_params = torch.empty(0)


def _apply(grad: torch.Tensor) -> torch.Tensor:
    """Apply a gradient f32[P]; called on the RPC server."""
    global _params
    if not _params.numel():
        _params = torch.zeros_like(grad)
    return _params.sub_(grad, alpha=1e-6)


def _init_rpc(address: str, name: str, rank: int, workers: int) -> None:
    from torch.distributed import rpc

    # TCP, like all other peers. By default, TensorPipe uses shared memory between processes of one machine.
    options = rpc.TensorPipeRpcBackendOptions(init_method=address, _transports=["uv"], _channels=["basic"])
    rpc.init_rpc(name, rank=rank, world_size=workers + 1, rpc_backend_options=options)


def _serve_rpc(ready: Ready, floats: int, workers: int) -> None:
    address = f"tcp://127.0.0.1:{_free_port()}"
    ready(address)
    _init_rpc(address, "server", 0, workers)
    threading.Event().wait()


def _connect_rpc(address: str, floats: int, worker: int, workers: int) -> Exchange:
    from torch.distributed import rpc

    _init_rpc(address, f"worker{worker}", worker + 1, workers)
    grad = torch.full((floats,), 1e-6)
    return lambda: rpc.rpc_sync("server", _apply, args=(grad,))


# ---- Ray: an actor that applies θ ← θ − ηg; arrays travel through its shared-memory store --------------------------


os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # there is no token file for processes that join Ray's cluster


def _serve_ray(ready: Ready, floats: int, workers: int) -> None:
    import ray

    context = ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, logging_level="error")

    @ray.remote(num_cpus=0)
    class Server:
        def __init__(self) -> None:
            self.params = np.zeros(floats, np.float32)

        def update(self, grad: np.ndarray) -> np.ndarray:
            self.params -= 1e-6 * grad
            return self.params

    server = Server.options(name="server", namespace="bench").remote()
    ray.get(server.update.remote(np.zeros(floats, np.float32)))
    ready(context.address_info["address"])
    threading.Event().wait()


def _connect_ray(address: str, floats: int, worker: int, workers: int) -> Exchange:
    import ray

    ray.init(address=address, namespace="bench", log_to_driver=False, logging_level="error")
    server = ray.get_actor("server")
    grad = np.full(floats, 1e-6, np.float32)
    return lambda: ray.get(server.update.remote(grad))


PEERS = [
    danaz("asgd"),
    danaz("dana"),
    danaz("dana-zero"),
    danaz("dana-ga"),
    danaz("dana", gap=True),
    danaz("dana", encrypted=True),
    Peer("ROUTER echo", _serve_echo, _connect_echo),
    Peer("TCP ping-pong", _serve_tcp, _connect_tcp),
    Peer("gloo send/recv", _serve_gloo, _connect_gloo),
    Peer("torch RPC", _serve_rpc, _connect_rpc),
    Peer("Ray actor", _serve_ray, _connect_ray, needs="ray"),
]


def exchanges_per_second(exchange: Exchange, seconds: float) -> float:
    """Return the rate of one worker, measured for about ``seconds`` after one exchange that is not counted."""
    exchange()
    count, began = 0, time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        exchange()
        count += 1
    return count / (now - began)
