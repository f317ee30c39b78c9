"""The probe, `python -m danaz.launch.probe`: a host prints what it is, as one JSON line. It imports no torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import struct
import time
from typing import Any

from launcher.checks import name, number, optional, record, words
from launcher.probe import way_to_hub

PACKAGES = ("danaz", "torch", "horovod")
METER = "DANAZ_METER"  # address:port of a `danaz.launch.meter.Meter`; without it, nothing is measured

PINGS = 21
CLOCK = struct.Struct("!d")  # seconds since 1970
TOTAL = struct.Struct("!Q")  # bytes
SENT_BYTES = 1 << 28  # the bandwidth is measured with at most this much…
SENDING_S = 1.0  # …and for about this long
MOST = 1e18  # a larger figure is nonsense
TIMEOUT_S = 60.0  # the meter serves one host after the other, so that they do not share the network

# What the launching machine accepts as an answer, besides `launcher.probe.FIELDS`. MEASURED needs a meter.
FIELDS = {"versions": record({package: optional(name) for package in ("python", *PACKAGES)})}
MEASURED = {
    "round_trip_ms": number(0.0, MOST, "milliseconds"),
    "clock_ahead_s": number(-MOST, MOST, "seconds"),
    "bandwidth_mb_s": number(0.0, MOST, "MB/s"),
    "free_disk_bytes": number(0, MOST, "bytes"),
    "horovod_problem": optional(words),
}


def version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions that should be the same on all machines of a run."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def measure(meter: str) -> dict[str, Any]:
    """Measure the way to the meter, how far our clock is ahead of its clock, and the free disk; check Horovod."""
    address, _, port = meter.rpartition(":")
    with socket.create_connection((address, int(port)), timeout=TIMEOUT_S) as link:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        receive(link, 1)  # it is our turn
        rounds = [_ping(link) for _ in range(PINGS)]
        bandwidth = _send(link)
    trip_s, ahead_s = min(rounds)  # the quickest answer knows the time best
    return {
        "round_trip_ms": 1000 * trip_s,
        "clock_ahead_s": ahead_s,
        "bandwidth_mb_s": bandwidth / 1e6,
        "free_disk_bytes": shutil.disk_usage(".").free,
        "horovod_problem": _horovod_problem(),
    }


def receive(link: socket.socket, size: int) -> bytes:
    """Receive ``size`` bytes. Raises EOFError when fewer arrive."""
    data = link.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise EOFError(f"the other end closed after {len(data)} of {size} bytes")
    return data


def _ping(link: socket.socket) -> tuple[float, float]:
    """Return the seconds of a round trip, and how far our clock is ahead."""
    sent_s, began_s = time.time(), time.perf_counter()
    link.sendall(b".")
    (there_s,) = CLOCK.unpack(receive(link, CLOCK.size))
    trip_s = time.perf_counter() - began_s
    return trip_s, sent_s + trip_s / 2 - there_s


def _send(link: socket.socket) -> float:
    """Return the bytes per second that arrive at the meter."""
    piece, sent_bytes, began_s = bytes(1 << 18), 0, time.perf_counter()
    while sent_bytes < SENT_BYTES and time.perf_counter() < began_s + SENDING_S:
        link.sendall(piece)
        sent_bytes += len(piece)
    link.shutdown(socket.SHUT_WR)
    (arrived_bytes,) = TOTAL.unpack(receive(link, TOTAL.size))
    return float(arrived_bytes / (time.perf_counter() - began_s))


def _horovod_problem() -> str | None:
    from danaz.horovod_install.check import fitting_version
    from danaz.horovod_install.errors import HorovodError

    try:
        fitting_version()
    except HorovodError as error:
        return str(error)
    return None


if __name__ == "__main__":
    found = {**way_to_hub(), "versions": versions()}
    if METER in os.environ and found["unreachable"] is None:
        found |= measure(os.environ[METER])
    print(json.dumps(found))
