"""Keys travel in a descriptor, and are read once."""

from __future__ import annotations

import os

import pytest

from danaz.protocol.keys import SECRET_FD, make_keys, take_server_keys, take_worker_keys, to_json
from launcher.agent import keep_in_memory


def handed_over(text: str) -> dict[str, str]:
    (fd,) = keep_in_memory(text)
    return {SECRET_FD: str(fd)}


def test_what_was_made_is_what_is_taken() -> None:
    server, workers = make_keys(3)
    assert take_server_keys(handed_over(to_json(server))) == server
    assert [take_worker_keys(handed_over(to_json(keys))) for keys in workers] == workers
    assert len({*server.workers, server.public}) == 4
    assert all(keys.server == server.public for keys in workers)


def test_they_are_read_once() -> None:
    _, [keys] = make_keys(1)
    environment = handed_over(to_json(keys))
    fd = int(environment[SECRET_FD])
    assert take_worker_keys(environment) == keys
    assert environment == {}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_without_a_launcher_there_are_none() -> None:
    assert take_server_keys({}) is None
    assert take_worker_keys({}) is None


def test_they_are_not_shown() -> None:
    server, [keys] = make_keys(1)
    assert server.secret not in repr(server)
    assert keys.secret not in repr(keys)
