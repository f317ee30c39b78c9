"""The other end of `danaz.launch.probe.measure`. It answers pings with its clock, and counts the bytes that follow."""

from __future__ import annotations

import socket
import threading
import time
from types import TracebackType

from danaz.launch.probe import CLOCK, PINGS, TOTAL, receive

TIMEOUT_S = 10.0


class Meter:
    """Listens on `address` at the free port `port` in a `with` block, and serves one host after the other."""

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:  # the end of the block
                return
            with link:
                link.settimeout(TIMEOUT_S)
                try:
                    _serve_host(link)
                except (OSError, EOFError):
                    continue  # the host reports it


def _serve_host(link: socket.socket) -> None:
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.sendall(b".")
    for _ in range(PINGS):
        receive(link, 1)
        link.sendall(CLOCK.pack(time.time()))
    arrived_bytes = 0
    while data := link.recv(1 << 20):
        arrived_bytes += len(data)
    link.sendall(TOTAL.pack(arrived_bytes))
