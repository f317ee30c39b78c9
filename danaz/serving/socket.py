"""The server's socket. It needs only ZeroMQ, so that it can be bound before the slow imports begin."""

from __future__ import annotations

import zmq
from zmq.auth.thread import ThreadAuthenticator

from danaz.protocol.frames import MAX_FRAME_BYTES
from danaz.protocol.keys import ServerKeys
from danaz.protocol.memory import keep_freed_memory
from danaz.serving.doorkeeper import Doorkeeper

LINGER_MS = 5000  # the last replies have this long to leave when the server ends
HANDSHAKE_MS = 10_000  # a peer that does not finish it is dropped
AHEAD_MESSAGES = 4  # how many ZeroMQ receives from each peer before the router asks for them: 4 MB of a push
ANSWERS_MESSAGES = 16  # how many may wait for one peer to read them; the router raises it for longer answers
SILENCE_S = 60  # how long a peer may leave data unacknowledged before its connection is cut


class Admitted:
    """ZeroMQ asks this object about each connection. It admits only this run's workers."""

    def __init__(self, keys: ServerKeys):
        self._workers = {key.encode() for key in keys.workers}

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._workers


class BoundRouter:
    """A ROUTER that is bound to an address."""

    def __init__(self, address: str, keys: ServerKeys | None = None):
        """Bind to ``address``, such as tcp://127.0.0.1:*. With ``keys``, encrypt, and admit only this run's workers.

        A peer that sends a frame larger than MAX_FRAME_BYTES is disconnected before any of it is stored. The Doorkeeper
        limits what else a connection may cost. Raises zmq.ZMQError if the address cannot be bound.
        """
        keep_freed_memory()
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self.worker_of_key = None if keys is None else {key: number for number, key in enumerate(keys.workers)}
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self.socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self.socket.setsockopt(zmq.IPV6, "[" in address)
        self.socket.setsockopt(zmq.RCVHWM, AHEAD_MESSAGES)
        self.socket.setsockopt(zmq.SNDHWM, ANSWERS_MESSAGES)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # raise an error when one more message does not fit
        self.socket.setsockopt(zmq.TCP_MAXRT, 1000 * SILENCE_S)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self.socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, SILENCE_S)
        if keys is not None:
            self._guard(keys)
        self.doorkeeper = Doorkeeper(self.socket, None if keys is None else len(keys.workers))
        try:
            self.socket.bind(address)
        except zmq.ZMQError:
            self.close(linger_ms=0)
            raise
        endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.address = endpoint.decode()

    def _guard(self, keys: ServerKeys) -> None:
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=Admitted(keys))
        self._authenticator.start()
        self.socket.setsockopt(zmq.CURVE_SERVER, 1)
        self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        self.socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())

    def close(self, linger_ms: int = LINGER_MS) -> None:
        """Free everything. Replies that have not left yet have ``linger_ms`` to do so."""
        self.doorkeeper.close()
        self.socket.close(linger_ms)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
