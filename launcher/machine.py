"""What a plan must know of a machine."""

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

__all__ = ["Machine", "in_url", "is_loopback", "is_this_machine", "local_machines", "source_address", "this_machine"]

# <linux/sockios.h>, and struct ifreq of <net/if.h> on 64-bit Linux
SIOCGIFCONF = 0x8912
IFREQ = struct.Struct("16s2xH4s16x")  # name, then a sockaddr_in: family (skipped with the padding), port, address


@dataclass(frozen=True)
class Machine:
    """The default is a machine of which nothing is known: its ranks get one thread each, as torchrun does it."""

    cores: int = 1
    gpus: int = 0
    address: str | None = None  # where other machines reach it; None: its host name
    interface: str | None = None  # the network interface of that address, for gloo
    interfaces: Mapping[str, str] = field(default_factory=dict)  # each of its addresses, IPv4 first -> interface
    identity: str | None = None  # the same under all its names, and of no other machine; None: unknown


def this_machine() -> Machine:
    """The cores this process may use and the GPUs it may see, asked without CUDA (which a launcher must not start)."""
    interfaces = {**_interfaces(), **_ipv6_interfaces()}
    return Machine(
        cores=len(os.sched_getaffinity(0)), gpus=_count_gpus(), interfaces=interfaces, identity=_identity(interfaces)
    )


def _identity(addresses: Iterable[str]) -> str | None:
    """A boot of a kernel; and on it a container, which has its own processes, network or host name.

    With its addresses, for virtual machines that go on from one snapshot share all the rest.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net", "uts")]
    except OSError:  # a /proc that hides them
        return None
    return " ".join([boot, *spaces, *sorted(addresses)])


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


def _interfaces() -> dict[str, str]:
    """Every IPv4 address of this machine and its network interface."""
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
    """Every IPv6 address and its network interface, but for those that mean something on one link only (fe80::…)."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except FileNotFoundError:  # a kernel without
        return {}
    # address in hex, index, prefix length, scope, flags, interface
    found = ((ipaddress.IPv6Address(bytes.fromhex(line.split()[0])), line.split()[5]) for line in lines)
    return {str(address): interface for address, interface in found if not address.is_link_local}


def source_address(destination: str | None) -> str | None:
    """This machine's address on the route to another, without a packet sent; None where there is no route.

    IPv4, unless an IPv6 address is given.
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
    """Whether a host is called by a name that no other machine can use: localhost, 127.x or ::1."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name.lower() == "localhost"


def in_url(address: str) -> str:
    """As it stands in front of a port: an IPv6 address in brackets."""
    return f"[{address}]" if ":" in address else address


def is_this_machine(name: str) -> bool:
    """By a name of loopback, by an address of its own, or by its host name, with a domain or without.

    With another domain than the host name has, the name must lead here: a machine elsewhere may be called alike.
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
    return address.is_loopback or str(address) in {**_interfaces(), **_ipv6_interfaces()}


@cache
def _resolve(name: str) -> tuple[str, ...]:
    """The addresses of a name; none if it has none. Asked once: where no DNS answers, that takes seconds."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(str(address[0]) for *_, address in found)
