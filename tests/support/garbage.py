"""Sends bytes that are not ZeroMQ, and messages of random frames. Some begin as danaz' own messages do.

python tests/support/garbage.py HOST:PORT SEED
"""

from __future__ import annotations

import random
import socket
import sys
from contextlib import suppress

import zmq

from danaz.protocol.wire import MAGIC

MESSAGES = 200
SENDING_MS = 1000  # the longest time to send: an encrypted server takes nothing from here


def send(address: str, chance: random.Random) -> None:
    host, port = address.rsplit(":", 1)
    with suppress(OSError), socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(chance.randbytes(4096))
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"tcp://{address}")
    for _ in range(MESSAGES):
        frames = [chance.randbytes(chance.randrange(64)) for _ in range(chance.randrange(1, 6))]
        with suppress(zmq.Again):
            dealer.send_multipart([MAGIC, *frames] if chance.random() < 0.5 else frames, zmq.NOBLOCK)
    dealer.close(linger=SENDING_MS)
    context.term()


if __name__ == "__main__":
    send(sys.argv[1], random.Random(int(sys.argv[2])))
