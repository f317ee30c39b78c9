"""Reads the list of machines: `--hosts a:4,b:4`, or a hostfile as Horovod, Open MPI, DeepSpeed and CNTK write it.

    [user@]host[:N] [slots=N] [max_slots=N] [ssh_port=P] [# comment]

Write an IPv6 address in brackets, `[fe80::1]:4`. A host without a number of slots gets one slot per GPU, or 1 if it has
none. Node files of PBS, LSF and Open MPI name a host once for each of its slots: if any host is repeated, each line is
one slot.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

__all__ = ["Host", "HostsError", "parse_hostfile", "parse_hosts"]

MOST_SLOTS = 1024  # per host; a larger number is a typing mistake
KEYS = {"slots": "slots", "max_slots": "max_slots", "max-slots": "max_slots", "ssh_port": "ssh_port"}

# A name cannot begin with "-", because ssh would take it for an option, nor hold "/", because it names a log folder.
NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\$?")
SCOPE = re.compile(r"[A-Za-z0-9._-]+")
ADDRESS = re.compile(r"(?:(?P<user>[^@]*)@)?(?:\[(?P<ipv6>[^]]*)\]|(?P<name>[^:\[\]]*))(?::(?P<slots>.*))?", re.DOTALL)


class HostsError(ValueError):
    """A list of hosts that cannot be used; the message says where, what was expected and what to write."""


@dataclass(frozen=True)
class Host:
    """One machine. `str()` returns its line in a hostfile."""

    name: str
    slots: int | None = None  # how many ranks it may hold; None: one per GPU, or 1
    user: str | None = None
    ssh_port: int | None = None
    max_slots: int | None = None
    devices: tuple[int, ...] | None = None  # which of its slots are used (--include, --exclude); None: the first ones
    place: str = field(default="", compare=False, repr=False)  # where the user named it, for error messages

    def __str__(self) -> str:
        words = [f"{self.user}@" if self.user else "", f"[{self.name}]" if ":" in self.name else self.name]
        options = {"slots": self.slots, "max_slots": self.max_slots, "ssh_port": self.ssh_port}
        return "".join(words) + "".join(f" {key}={value}" for key, value in options.items() if value is not None)


def parse_hosts(text: str) -> tuple[Host, ...]:
    """Parse `[user@]host[:N],…`. Raises HostsError."""
    if not text.strip():
        raise HostsError("--hosts is empty; expected host:slots,…, for example localhost:4")
    entries = [(f"--hosts entry {number}", entry) for number, entry in enumerate(text.split(","), start=1)]
    for place, entry in entries:
        if not entry.strip():
            raise HostsError(f"{place} is empty in {text!r}; remove the comma")
        if len(entry.split()) > 1:
            raise HostsError(f"{place}: {entry.strip()!r} holds a space; put options such as slots= into a --hostfile")
    return _count_slots(_parse_line(entry.strip(), place) for place, entry in entries)


def parse_hostfile(path: str | Path) -> tuple[Host, ...]:
    """Parse a hostfile, whose grammar stands at the top of this module.

    Raises HostsError for a wrong line, and for a file that cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise HostsError(f"hostfile {path} does not exist") from None
    except OSError as error:
        raise HostsError(f"hostfile {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise HostsError(f"hostfile {path} is not text in UTF-8 (byte {error.start})") from None
    lines = [(number, line.partition("#")[0].strip()) for number, line in enumerate(text.split("\n"), start=1)]
    hosts = [(f"{path} line {number}", line) for number, line in lines if line]
    if not hosts:
        raise HostsError(f"hostfile {path} names no host; expected lines such as: localhost slots=4")
    return _count_slots(_parse_line(line, place) for place, line in hosts)


def _parse_line(line: str, place: str) -> Host:
    address, *options = re.sub(r"\s*=\s*", "=", line).split()
    user, name, colon_slots = _parse_address(address, place)
    values: dict[str, int] = {} if colon_slots is None else {"slots": colon_slots}
    for option in options:
        word, equals, number = option.partition("=")
        key = KEYS.get(word)
        if key is None or not equals:
            raise HostsError(f"{place}: {option!r} is not known; expected slots=N, max_slots=N or ssh_port=N")
        if key in values:
            raise HostsError(f"{place}: {key} is given twice; remove one")
        values[key] = _number(number, key, place)
    slots, max_slots = values.get("slots"), values.get("max_slots")
    if slots is not None and max_slots is not None and slots > max_slots:
        raise HostsError(f"{place}: slots={slots} is more than max_slots={max_slots}")
    return Host(name, slots, user, values.get("ssh_port"), max_slots, place=place)


def _parse_address(address: str, place: str) -> tuple[str | None, str, int | None]:
    if address.count(":") > 1 and "[" not in address:
        raise HostsError(f"{place}: {address!r} holds several colons; write an IPv6 address in brackets, [fe80::1]:4")
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise HostsError(f"{place}: {address!r} is not a host; expected [user@]host[:slots]")
    user, name, slots = match["user"], match["name"], match["slots"]
    if user is not None and not USER.fullmatch(user):
        raise HostsError(f"{place}: {user!r} is not a user name")
    if name is None:
        name = _ipv6(match["ipv6"], place)
    elif not NAME.fullmatch(name):
        raise HostsError(f"{place}: {name!r} is not a host name; expected letters, digits, '.', '-' and '_'")
    if slots is None:
        return user, name, None
    if slots in ("22", "2222"):
        raise HostsError(
            f"{place}: {address!r} reads as {slots} slots, but looks like a port; in a hostfile write "
            f"{name} ssh_port={slots}, or {name} slots={slots} if you mean {slots} slots"
        )
    return user, name, _number(slots, "slots", place)


def _ipv6(text: str, place: str) -> str:
    address, percent, scope = text.partition("%")
    try:
        canonical = str(ipaddress.IPv6Address(address))
    except ValueError:
        raise HostsError(f"{place}: [{text}] is not an IPv6 address") from None
    if percent and not SCOPE.fullmatch(scope):
        raise HostsError(f"{place}: {scope!r} is not an interface name")
    return canonical + percent + scope


def _number(text: str, key: str, place: str) -> int:
    most = 65535 if key == "ssh_port" else MOST_SLOTS
    if not re.fullmatch("[0-9]{1,9}", text):
        raise HostsError(f"{place}: {key} is {text!r}; expected a number from 1 to {most}")
    number = int(text)
    if number == 0 and key != "ssh_port":
        raise HostsError(f"{place}: zero {key}; remove the host to leave it out")
    if not 1 <= number <= most:
        hint = "; if it is a port, write ssh_port=" + text if key == "slots" else ""
        raise HostsError(f"{place}: {key} is {number}; expected 1 to {most}{hint}")
    return number


def _count_slots(hosts: Iterable[Host]) -> tuple[Host, ...]:
    """Merge repeated hosts. If any host is repeated, each host without a number has one slot for each time it is named.

    Raises HostsError.
    """
    named: dict[str, list[Host]] = {}
    for host in hosts:
        named.setdefault(host.name.lower(), []).append(host)
    if all(len(same) == 1 for same in named.values()):
        return tuple(same[0] for same in named.values())
    for first, *others in named.values():
        for other in others:
            _check_repeats(first, other)
    counted = [(same[0], len(same)) for same in named.values()]
    for host, number in counted:
        if number > (host.max_slots or MOST_SLOTS):
            raise HostsError(f"{host.name} is named {number} times, more than its {host.max_slots or MOST_SLOTS} slots")
    return tuple(host if host.slots else replace(host, slots=number) for host, number in counted)


def _check_repeats(first: Host, other: Host) -> None:
    """Raise HostsError if a repeated host has a number of slots, or differs from its first mention."""
    if first.slots is not None or replace(first, name=other.name) != other:
        raise HostsError(
            f"{other.name} is named twice: {first.place} and {other.place}; write it once, with all its slots, or "
            f"once for each slot, without a number"
        )
