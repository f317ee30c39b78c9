"""`--include a:0,2@b` and `--exclude b:1`: choose hosts and slots, in the notation of DeepSpeed.

    host[:slot[,slot…]][@host…]

`--include` keeps what it names and drops the rest; `--exclude` drops what it names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from launcher.hosts import Host, HostsError

__all__ = ["select_hosts"]

WHERE = re.compile(r"(?P<name>\[[^]]*\]|[^:]*)(?::(?P<slots>.*))?", re.DOTALL)


def select_hosts(hosts: Sequence[Host], include: str | None = None, exclude: str | None = None) -> tuple[Host, ...]:
    """Return the hosts and slots that remain. Raises HostsError."""
    if include is not None and exclude is not None:
        raise HostsError("--include and --exclude cannot be given together; one of them says it all")
    if include is not None:
        named = _parse(include, "--include", hosts)
        chosen = [_keep(host, named[host.name], "--include") for host in hosts if host.name in named]
    elif exclude is not None:
        named = _parse(exclude, "--exclude", hosts)
        kept = [_drop(host, named[host.name]) if host.name in named else host for host in hosts]
        chosen = [host for host in kept if host is not None]
    else:
        return tuple(hosts)
    if not chosen:
        raise HostsError(f"--exclude {exclude} leaves no host")
    return tuple(chosen)


def _parse(text: str, option: str, hosts: Sequence[Host]) -> dict[str, tuple[int, ...]]:
    """Return name of host -> its chosen slots; an empty tuple means all of them."""
    names = {host.name for host in hosts}
    named: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        match = WHERE.fullmatch(part.strip())
        name = match["name"].strip("[]") if match else part
        if match is None or name not in names:
            raise HostsError(f"{option}: {name!r} is none of the hosts: {', '.join(sorted(names))}")
        if name in named:
            raise HostsError(f"{option} names {name} twice; write all its slots at once, {name}:0,1")
        named[name] = () if match["slots"] is None else _slots(match["slots"], part, option)
    return named


def _slots(text: str, part: str, option: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,4}", word) for word in words):
        raise HostsError(f"{option}: {part!r} should be host:slot,slot,…, counted from 0")
    slots = tuple(int(word) for word in words)
    if len(set(slots)) < len(slots):
        raise HostsError(f"{option}: {part!r} names a slot twice")
    return slots


def _keep(host: Host, slots: tuple[int, ...], option: str) -> Host:
    beyond = [slot for slot in slots if host.slots is not None and slot >= host.slots]
    if beyond:
        raise HostsError(f"{option}: {host.name} has {host.slots} slots, 0 to {(host.slots or 1) - 1}; not {beyond[0]}")
    return replace(host, slots=len(slots), devices=tuple(sorted(slots))) if slots else host


def _drop(host: Host, slots: tuple[int, ...]) -> Host | None:
    if not slots:
        return None
    if host.slots is None:
        raise HostsError(f"--exclude {host.name}:… needs to know how many slots {host.name} has; write {host.name}:N")
    _keep(host, slots, "--exclude")
    left = tuple(slot for slot in range(host.slots) if slot not in slots)
    return _keep(host, left, "--exclude") if left else None
