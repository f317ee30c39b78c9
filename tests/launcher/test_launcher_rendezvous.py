"""The key-value store of Horovod's gloo client. The tests speak to it as that client does."""

from __future__ import annotations

import http.client
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from launcher import rendezvous
from launcher.agent import reserve_port
from launcher.rendezvous import MAX_VALUE_BYTES, Rendezvous


@pytest.fixture
def store() -> Iterator[Rendezvous]:
    store = Rendezvous()
    yield store
    store.close()


def ask(store: Rendezvous, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", store.port, timeout=10)
    connection.request(method, path, body, {"Content-Length": str(len(body))})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def test_put_get_delete(store: Rendezvous) -> None:
    assert ask(store, "GET", "/global_/0") == (404, b"")
    assert ask(store, "PUT", "/global_/0", b"\x00\xffaddress") == (200, b"")
    assert ask(store, "GET", "/global_/0") == (200, b"\x00\xffaddress")
    assert ask(store, "GET", "/local_::1/0") == (404, b"")
    assert ask(store, "PUT", "/global_/0", b"") == (200, b"")
    assert ask(store, "GET", "/global_/0") == (200, b"")
    assert ask(store, "DELETE", "/global_/0") == (200, b"")
    assert ask(store, "DELETE", "/global_/0") == (200, b"")
    assert ask(store, "GET", "/global_/0") == (404, b"")


def test_it_listens_on_loopback_alone(store: Rendezvous) -> None:
    assert store.server_address[0] == "127.0.0.1"


def test_two_stores_share_nothing(store: Rendezvous) -> None:
    other = Rendezvous()
    ask(store, "PUT", "/global_/0", b"one")
    assert ask(other, "GET", "/global_/0") == (404, b"")
    other.close()


def test_many_ranks_at_once(store: Rendezvous) -> None:
    with ThreadPoolExecutor(32) as pool:
        puts = list(pool.map(lambda rank: ask(store, "PUT", f"/g/{rank}", b"%d" % rank), range(200)))
        gets = list(pool.map(lambda rank: ask(store, "GET", f"/g/{rank}"), range(200)))
    assert puts == [(200, b"")] * 200
    assert gets == [(200, b"%d" % rank) for rank in range(200)]


@pytest.mark.parametrize("path", ["/", "/scope", "/scope/key/more", "//key", "/" + "x" * 513 + "/key"])
def test_other_paths_are_refused(store: Rendezvous, path: str) -> None:
    for method in ("GET", "PUT", "DELETE"):
        assert ask(store, method, path)[0] == 400


def raw(store: Rendezvous, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", store.port), timeout=10) as client:
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        return client.makefile("rb").read().partition(b"\r\n")[0]


def test_sizes_are_limited_before_anything_is_read(store: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> None:
    announce = b"PUT /scope/key HTTP/1.1\r\nContent-Length: %d\r\n\r\n"
    assert raw(store, announce % (MAX_VALUE_BYTES + 1)).split()[1] == b"413"
    assert raw(store, b"PUT /scope/key HTTP/1.1\r\n\r\n").split()[1] == b"411"
    assert raw(store, b"PUT /scope/key HTTP/1.1\r\nContent-Length: -1\r\n\r\n").split()[1] == b"411"
    assert raw(store, announce % 10 + b"short").split()[1] == b"400"
    monkeypatch.setattr(rendezvous, "MAX_STORE_BYTES", 5)
    assert ask(store, "PUT", "/scope/key", b"123456")[0] == 507
    assert ask(store, "PUT", "/scope/key", b"12345")[0] == 200
    assert ask(store, "PUT", "/scope/key", b"54321")[0] == 200
    assert ask(store, "DELETE", "/scope/key")[0] == 200
    assert ask(store, "PUT", "/scope/other", b"12345")[0] == 200


IP_LOCAL_PORT_RANGE = 51  # <linux/in.h>, since Linux 6.3: the range a socket takes free ports from


@pytest.mark.parametrize("reuse", [0, 1])
def test_a_reserved_port_is_given_to_nobody_who_asks_for_any(reuse: int) -> None:
    with reserve_port() as reserved, socket.socket() as other:
        port = reserved.getsockname()[1]
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        try:
            other.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", port << 16 | port))
        except OSError:  # an older kernel: ask for the port by number, which only a listener with SO_REUSEADDR may
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", port))
        else:
            with pytest.raises(OSError, match="in use"):
                other.bind(("127.0.0.1", 0))


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_its_owner_can_listen_on_it(address: str) -> None:
    with reserve_port() as reserved, socket.socket() as owner:
        owner.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        owner.bind((address, reserved.getsockname()[1]))
        owner.listen()
        with socket.create_connection(("127.0.0.1", owner.getsockname()[1]), timeout=10):
            pass
