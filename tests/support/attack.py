"""A server process with keys to attack, and the means for it: raw connections, and a worker's sockets."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import live
import zmq
from cluster import DIGEST

from danaz.protocol.keys import SECRET_FD, WorkerKeys, make_keys, to_json
from danaz.run.settings import Settings

GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
LONG_COMMAND = struct.Struct(">BQ")  # flags, size
MB = 1 << 20


@dataclass(frozen=True)
class Victim:
    """`danaz serve` with keys for its workers."""

    process: subprocess.Popen[str]
    address: str  # tcp://HOST:PORT
    keys: list[WorkerKeys]
    settings: Settings
    folder: Path

    @property
    def place(self) -> tuple[str, int]:
        host, port = self.address.removeprefix("tcp://").rsplit(":", 1)
        return host, int(port)

    def forget_peak(self) -> None:
        """Let ``peak_mb`` measure only from now on."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    @property
    def peak_mb(self) -> float:
        """The most resident memory that the process has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) / 1024

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))


@contextmanager
def victim(folder: Path, workers: int = 2) -> Iterator[Victim]:
    """Start a server that has finished its imports; it is killed at the end if it has not ended."""
    server_keys, worker_keys = make_keys(workers)
    settings = Settings(algorithm="dana", workers=workers, digest=DIGEST)
    secret = os.memfd_create("secret")
    os.write(secret, to_json(server_keys).encode())
    os.lseek(secret, 0, os.SEEK_SET)
    environment = {**os.environ, "DANAZ_SETTINGS": settings.to_json(), SECRET_FD: str(secret), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "danaz", "serve", "--bind", "tcp://127.0.0.1:*", "--run", str(folder)],
        env=environment,
        pass_fds=[secret],
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(secret)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip().removeprefix("DANAZ_SERVER=")
        yield Victim(process, address, worker_keys, settings, folder)
    finally:
        process.kill()
        process.communicate()


def knock(victim: Victim) -> socket.socket:
    """Open a raw connection that has sent its greeting. It never becomes more than a stranger's connection."""
    raw = socket.create_connection(victim.place, timeout=live.DEADLINE_S)
    raw.sendall(GREETING)
    return raw


@contextmanager
def as_worker(victim: Victim, number: int, connections: int = 1) -> Iterator[list[zmq.Socket[bytes]]]:
    """Open DEALER sockets with a worker's key."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sockets = []
    for _ in range(connections):
        dealer = context.socket(zmq.DEALER)
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.setsockopt(zmq.CURVE_SERVERKEY, victim.keys[number].server.encode())
        dealer.setsockopt(zmq.CURVE_PUBLICKEY, victim.keys[number].public.encode())
        dealer.setsockopt(zmq.CURVE_SECRETKEY, victim.keys[number].secret.encode())
        dealer.connect(victim.address)
        sockets.append(dealer)
    try:
        yield sockets
    finally:
        for dealer in sockets:
            dealer.close(linger=0)
        context.term()
