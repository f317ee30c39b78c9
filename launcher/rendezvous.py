"""Where the ranks of one Horovod world find each other: the key-value store that Horovod 0.28.1's gloo client asks.

The client (horovod/common/gloo/http_store.cc) sends HTTP over IPv4, with one connection per request:

    PUT /scope/key      keep this value (a rank's addresses)
    GET /scope/key      the value, or 404 while it is missing: the client asks again every 10 ms
    DELETE /scope/key   this rank has connected to all others and no longer needs its key

A rank deletes its own key only after a barrier, so we can drop it at once, and a world can be formed again.
One store serves one world, so ranks of other worlds and runs never meet here.
"""

from __future__ import annotations

import re
import socket
import socketserver
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer

__all__ = ["Rendezvous"]

MAX_VALUE_BYTES = 1 << 20  # in a world of 1000 ranks, each publishes about 100 kB
MAX_STORE_BYTES = 1 << 28
REQUEST_TIMEOUT_S = 10.0
PATH = re.compile(r"/([^/]{1,512})/([^/]{1,512})")


class Rendezvous(socketserver.ThreadingMixIn, HTTPServer):
    """The store of one world. It listens on `address`, at the free port `port`, until `close`."""

    daemon_threads = True
    request_queue_size = 1024  # all ranks connect at the same moment

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), _Handler)
        self.lock = threading.Lock()
        self.values: dict[str, bytes] = {}
        self.store_bytes = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def server_bind(self) -> None:
        # HTTPServer would look up its own name here, which takes seconds if DNS does not answer.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    @property
    def port(self) -> int:
        return self.server_port

    def put(self, path: str, value: bytes) -> bool:
        """Keep a value. Return False when the store is full."""
        with self.lock:
            grown = self.store_bytes + len(value) - len(self.values.get(path, b""))
            if grown > MAX_STORE_BYTES:
                return False
            self.values[path], self.store_bytes = value, grown
            return True

    def get(self, path: str) -> bytes | None:
        with self.lock:
            return self.values.get(path)

    def delete(self, path: str) -> None:
        with self.lock:
            self.store_bytes -= len(self.values.pop(path, b""))

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Rendezvous
    timeout = REQUEST_TIMEOUT_S

    def do_GET(self) -> None:
        if not self._path_is_valid():
            return
        value = self.server.get(self.path)
        if value is None:
            self._answer(HTTPStatus.NOT_FOUND)
        else:
            self._answer(HTTPStatus.OK, value)

    def do_PUT(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not self._path_is_valid():
            return
        if not re.fullmatch("[0-9]{1,18}", length):
            self._answer(HTTPStatus.LENGTH_REQUIRED)
        elif int(length) > MAX_VALUE_BYTES:
            self._answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        else:
            self._keep(self.rfile.read(int(length)), int(length))

    def do_DELETE(self) -> None:
        if self._path_is_valid():
            self.server.delete(self.path)
            self._answer(HTTPStatus.OK)

    def _keep(self, value: bytes, expected_bytes: int) -> None:
        if len(value) < expected_bytes:
            self._answer(HTTPStatus.BAD_REQUEST)
        elif self.server.put(self.path, value):
            self._answer(HTTPStatus.OK)
        else:
            self._answer(HTTPStatus.INSUFFICIENT_STORAGE)

    def _path_is_valid(self) -> bool:
        valid = PATH.fullmatch(self.path) is not None
        if not valid:
            self._answer(HTTPStatus.BAD_REQUEST)
        return valid

    def _answer(self, status: HTTPStatus, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: ranks that wait for each other ask a hundred times a second."""
