"""Facts about a machine that a plan needs."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import os
import re
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from launcher.hosts import Host

__all__ = [
    "Machine",
    "in_url",
    "interfaces",
    "is_loopback",
    "is_this_machine",
    "local_machines",
    "source_address",
    "this_machine",
]

# <linux/sockios.h>, and struct ifreq of <net/if.h> on 64-bit Linux
SIOCGIFCONF = 0x8912
IFREQ = struct.Struct("16s2xH4s16x")  # name, then a sockaddr_in: family (skipped with the padding), port, address


@dataclass(frozen=True)
class Machine:
    """What we know about a machine. The default is an unknown one: each rank gets one thread, as with torchrun."""

    cores: int = 1
    gpus: int = 0
    address: str | None = None  # at which other machines reach it; None: its host name
    interface: str | None = None  # the network interface of that address, for gloo
    interfaces: Mapping[str, str] = field(default_factory=dict)  # each of its addresses, IPv4 first -> interface
    identity: str | None = None  # the same for all its names, unique to it; None: unknown


def this_machine() -> Machine:
    """Describe this machine: the cores that this process may use and the GPUs that it may see.

    It does not ask CUDA, because a launcher must not start CUDA.
    """
    found = interfaces()
    return Machine(cores=len(os.sched_getaffinity(0)), gpus=_count_gpus(), interfaces=found, identity=_identity(found))


def _identity(addresses: Iterable[str]) -> str | None:
    """Identify the boot of a kernel, and a container on it, which has its own processes, network or host name.

    The addresses are included, because virtual machines that continue from one snapshot share everything else.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net", "uts")]
    except OSError:  # a /proc that hides them
        return None
    return " ".join([boot, *spaces, *sorted(addresses)])


def local_machines(hosts: Iterable[Host]) -> dict[str, Machine]:
    """Return the facts, for `plan`, about those hosts that are this machine."""
    return {host.name: this_machine() for host in hosts if is_this_machine(host.name)}


def _count_gpus() -> int:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [device.strip() for device in visible.split(",")]
        # CUDA ends the list at the first entry that names no device, such as -1
        valid = [bool(device) and not device.startswith("-") for device in devices]
        return valid.index(False) if False in valid else len(valid)
    return sum(re.fullmatch("nvidia[0-9]+", name) is not None for name in os.listdir("/dev"))


def interfaces() -> dict[str, str]:
    """Return every address of this machine, IPv4 first, and its network interface."""
    return {**_ipv4_interfaces(), **_ipv6_interfaces()}


def _ipv4_interfaces() -> dict[str, str]:
    """Return every IPv4 address of this machine and its network interface."""
    buffer = array.array("B", bytes(IFREQ.size * 1024))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("iL", len(buffer), buffer.buffer_info()[0])
        used_bytes: int = struct.unpack("iL", fcntl.ioctl(any_socket, SIOCGIFCONF, request))[0]
    found = IFREQ.iter_unpack(buffer.tobytes()[:used_bytes])
    # "eth0:1" is an alias of eth0, which is the name that gloo looks for
    return {
        socket.inet_ntoa(address): os.fsdecode(name.rstrip(b"\0")).partition(":")[0] for name, _port, address in found
    }


def _ipv6_interfaces() -> dict[str, str]:
    """Return every IPv6 address and its interface, except link-local ones (fe80::…), which hold on one link only."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except FileNotFoundError:  # a kernel without IPv6
        return {}
    # address in hex, index, prefix length, scope, flags, interface
    found = ((ipaddress.IPv6Address(bytes.fromhex(line.split()[0])), line.split()[5]) for line in lines)
    return {str(address): interface for address, interface in found if not address.is_link_local}


def source_address(destination: str | None) -> str | None:
    """Return this machine's address on the route to another; None if there is no route. Send no packet.

    The address is IPv4, unless an IPv6 address is given.
    """
    if destination is None:
        return None
    family = socket.AF_INET6 if ":" in destination else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination, 9))  # the discard port: connecting a UDP socket sends nothing
        except (OSError, UnicodeError):  # no route, no such name, no name at all
            return None
        address: str = probe.getsockname()[0]
        return address


def is_loopback(name: str) -> bool:
    """Return whether the name means the local machine everywhere: localhost, 127.x or ::1."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def in_url(address: str) -> str:
    """Return the address as it is written before a port: an IPv6 address gets brackets."""
    return f"[{address}]" if ":" in address else address


def is_this_machine(name: str) -> bool:
    """Return whether a name is loopback, one of this machine's addresses, or its host name with or without a domain.

    If the domain differs from the host name's own, the name must resolve to this machine, because a machine elsewhere
    may have the same short name.
    """
    own, name = socket.gethostname().lower(), name.lower()
    short = own.partition(".")[0]
    if is_loopback(name) or name in (own, short):
        return True
    if not _is_address(name):
        return name.partition(".")[0] == short and any(map(_is_own_address, _resolve(name)))
    return _is_own_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_own_address(text: str) -> bool:
    address = ipaddress.ip_address(text)
    return address.is_loopback or str(address) in interfaces()


@cache
def _resolve(name: str) -> tuple[str, ...]:
    """Return the addresses of a name, or none. The answer is cached: if no DNS answers, asking takes seconds."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(str(address[0]) for *_, address in found)
