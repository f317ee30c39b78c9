"""CURVE keys, made for one run, which say who may talk to its server, and as which worker.

The server knows the public keys of its workers and admits nobody else. It accepts a message only from the worker whose
key the connection holds. Keys travel through the launcher's own connection, in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass

import zmq

SECRET_FD = "DANAZ_SECRET_FD"  # set by the launcher's agent


@dataclass(frozen=True, repr=False)
class ServerKeys:
    """The server's own key pair and the public key of each worker, in Z85."""

    public: str
    secret: str
    workers: tuple[str, ...]


@dataclass(frozen=True, repr=False)
class WorkerKeys:
    """A worker's own key pair and the server's public key, in Z85."""

    public: str
    secret: str
    server: str


def make_keys(workers: int) -> tuple[ServerKeys, list[WorkerKeys]]:
    """Make fresh keys for a server and this number of workers."""
    public, secret = _pair()
    pairs = [_pair() for _ in range(workers)]
    return ServerKeys(public, secret, tuple(mine for mine, _ in pairs)), [WorkerKeys(*pair, public) for pair in pairs]


def _pair() -> tuple[str, str]:
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()


def to_json(keys: ServerKeys | WorkerKeys) -> str:
    return json.dumps(asdict(keys))


def take_server_keys(environment: MutableMapping[str, str] = os.environ) -> ServerKeys | None:
    """Return the keys that this server process was started with, if any. They can be taken once."""
    values = _take(environment)
    return None if values is None else ServerKeys(values["public"], values["secret"], tuple(values["workers"]))


def take_worker_keys(environment: MutableMapping[str, str] = os.environ) -> WorkerKeys | None:
    """Return the keys that this worker process was started with, if any. They can be taken once."""
    values = _take(environment)
    return None if values is None else WorkerKeys(**values)


def _take(environment: MutableMapping[str, str]) -> dict[str, str] | None:
    """Read the secret, so that afterwards neither this process nor its children find it. Raises ValueError."""
    fd = environment.pop(SECRET_FD, None)
    if fd is None:
        return None
    try:
        with open(int(fd), "rb") as file:
            values: dict[str, str] = json.loads(file.read())
    except (OSError, ValueError) as error:
        raise ValueError(f"{SECRET_FD} is {fd!r}, where no keys can be read: the launcher's agent sets it") from error
    return values
