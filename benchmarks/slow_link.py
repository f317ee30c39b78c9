"""Machines on a slow link: network namespaces of this machine, each with an interface on one bridge.

It needs root, and the programs ip and tc. The rate of the link limits what leaves an interface and, separately, what
the bridge sends to it. The kernel adds the delay (netem). If it has no netem, a relay does: a process on the machine
that passes on every byte with a delay.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Queue

NETWORK = "10.79.0"
CLONE_NEWNET = 0x40000000
BURST = "128kb"  # data that may leave at once
QUEUE = "20ms"  # data may wait for the link for this long before the sender has to wait
RELAYED_BYTES = 64 * 1024  # what one read takes at most
RELAYED_AHEAD = 8  # reads that are in a relay at a time: more than 1 Gbit/s brings in a few ms
_numbers = itertools.count()  # number the networks that this process makes


def missing() -> str | None:
    """Return why this machine cannot have a slow link; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} missing; apt-get install iproute2" if absent else None


class SlowLink:
    """``machines`` namespaces, numbered from 0, that reach each other at ``gbit_per_s`` and ``delay_ms`` one way."""

    def __init__(self, machines: int, gbit_per_s: float, delay_ms: float):
        self._prefix = f"danaz{os.getpid()}.{next(_numbers)}"
        self._names = [f"{self._prefix}m{number}" for number in range(machines)]
        self._rate, self._delay = f"{1000 * gbit_per_s:g}mbit", f"{delay_ms:g}ms"
        self._delay_s = delay_ms / 1000
        self._has_netem = delay_ms > 0  # known once the link is up

    @property
    def manner(self) -> str:
        who = "by the kernel" if self._has_netem else "by a relay (no netem here)"
        return f"{self._rate} each way, " + (f"{self._delay} one way, {who}" if self._delay_s else "no delay")

    @property
    def needs_relay(self) -> bool:
        """Whether a machine must reach the others through a relay, because nothing else delays its bytes."""
        return self._delay_s > 0 and not self._has_netem

    def relay(self, machine: int, address: str, ready: Callable[[str], None]) -> None:
        """Relay connections from this machine to ``address``, with the delay each way. Never returns.

        ``ready`` is called with the address of the relay.
        """
        self.enter(machine)
        host, port = address.removeprefix("tcp://").split(":")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ready(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                for source, sink in ((near, far), (far, near)):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    _pass_on(source, sink, self._delay_s)

    def address(self, machine: int) -> str:
        return f"{NETWORK}.{machine + 1}"

    def enter(self, machine: int) -> None:
        """Move this process, which must have a single thread, to a machine permanently."""
        with open(f"/run/netns/{self._names[machine]}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def up(self) -> None:
        bridge = f"{self._prefix}b"
        _run("ip", "netns", "add", bridge)
        _run("ip", "-n", bridge, "link", "add", "br0", "up", "type", "bridge")
        for number, name in enumerate(self._names):
            _run("ip", "netns", "add", name)
            peer = ("peer", "name", "eth0", "netns", name)
            _run("ip", "-n", bridge, "link", "add", f"to{number}", "type", "veth", *peer)
            _run("ip", "-n", bridge, "link", "set", f"to{number}", "master", "br0", "up")
            _run("ip", "-n", name, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", link, "up")
            self._shape(name, "eth0")
            self._shape(bridge, f"to{number}")

    def _shape(self, namespace: str, link: str) -> None:
        add = ("tc", "-n", namespace, "qdisc", "add", "dev", link)
        if self._has_netem:
            self._has_netem = _succeeds(
                *add, "root", "netem", "delay", self._delay, "rate", self._rate, "limit", "10000"
            )
        if not self._has_netem:
            _run(*add, "root", "tbf", "rate", self._rate, "burst", BURST, "latency", QUEUE)

    def down(self) -> None:
        for name in (*self._names, f"{self._prefix}b"):
            _succeeds("ip", "netns", "delete", name)


def _pass_on(source: socket.socket, sink: socket.socket, delay_s: float) -> None:
    """Pass on bytes with a delay, in two threads, until one of the two connections ends."""
    under_way: Queue[tuple[float, bytes]] = Queue(RELAYED_AHEAD)

    def receive() -> None:
        with suppress(ConnectionError):
            while data := source.recv(RELAYED_BYTES):
                under_way.put((time.monotonic() + delay_s, data))

    def send() -> None:
        with suppress(ConnectionError):
            while True:
                due, data = under_way.get()
                time.sleep(max(0.0, due - time.monotonic()))
                sink.sendall(data)

    for part in (receive, send):
        threading.Thread(target=part, daemon=True).start()


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def _succeeds(*command: str) -> bool:
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


@contextmanager
def slow_link(machines: int, gbit_per_s: float, delay_ms: float) -> Iterator[SlowLink]:
    """Make a slow link for the length of a block. Everything on its machines should end within the block."""
    link = SlowLink(machines, gbit_per_s, delay_ms)
    try:
        link.up()
        yield link
    finally:
        link.down()
