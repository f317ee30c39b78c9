"""What a plan must know of a machine."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from launcher.hosts import Host

__all__ = ["Machine", "is_loopback", "is_this_machine", "local_machines", "this_machine"]


@dataclass(frozen=True)
class Machine:
    """The default is a machine of which nothing is known: its ranks get one thread each, as torchrun does it."""

    cores: int = 1
    gpus: int = 0
    address: str | None = None  # where other machines reach it; None: its host name
    interface: str | None = None  # the network interface of that address, for gloo


def this_machine() -> Machine:
    """The cores this process may use and the GPUs it may see, asked without CUDA (which a launcher must not start)."""
    return Machine(cores=len(os.sched_getaffinity(0)), gpus=_count_gpus())


def local_machines(hosts: Iterable[Host]) -> dict[str, Machine]:
    """What is known of those hosts that are this machine, for `plan`."""
    return {host.name: this_machine() for host in hosts if is_this_machine(host.name)}


def _count_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [device.strip() for device in visible.split(",")]
        # CUDA ends the list at the first entry that names no device, such as -1
        valid = [bool(device) and not device.startswith("-") for device in devices]
        return valid.index(False) if False in valid else len(valid)
    return sum(re.fullmatch("nvidia[0-9]+", name) is not None for name in os.listdir("/dev"))


def is_loopback(name: str) -> bool:
    """Whether a host is called by a name that no other machine can use: localhost, 127.x or ::1."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def is_this_machine(name: str) -> bool:
    own = socket.gethostname().lower()
    return is_loopback(name) or name.lower() in (own, own.partition(".")[0])
