"""The server's socket. Needs nothing but ZeroMQ, so that it is bound before the slow imports begin."""

from __future__ import annotations

import zmq

LINGER_MS = 5000  # for the last replies to leave when the server ends
MAX_MESSAGE_BYTES = 8 << 30


def bind_router(address: str) -> tuple[zmq.Socket[bytes], str]:
    """A ROUTER bound to ``address`` such as tcp://127.0.0.1:0, and the address with its port.

    A peer that sends a larger frame than MAX_MESSAGE_BYTES is disconnected before the frame is read. Raises
    zmq.ZMQError if the address cannot be bound.
    """
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.SNDHWM, 0)  # one reply a request: the workers bound it
    socket.bind(address)
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return socket, endpoint.decode()
