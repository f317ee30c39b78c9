"""The reports that an agent may send. They are checked here, as they arrive: its machine may be broken, or may lie.

Each kind of report declares the type and range of every field. `agents` decides whether an agent may report on the
process, world or file that a report names, because `agents` knows what was ordered.
"""

from __future__ import annotations

import base64
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.channel import ChannelError, Message, text_to_bytes
from launcher.checks import Check, FieldError, check_fields, flag, integer, name, number, optional, shown, words

__all__ = [
    "FILE_PIECE_BYTES",
    "LEAVING",
    "MOST_REACHED",
    "Ended",
    "FilePiece",
    "Hello",
    "Output",
    "Report",
    "Returned",
    "Started",
    "Stopping",
    "WorldOpened",
    "read_report",
]

LEAVING = "leave"  # the milestone that a process reaches when it begins to end
FILE_PIECE_BYTES = 1 << 20  # the largest piece of a file in one report
MOST_REACHED = 32  # the most milestones of one process
MOST_ADDRESSES = 4096  # the most addresses of one machine
MOST_SECONDS = 1e9


@dataclass(frozen=True)
class Hello:
    """The facts about the agent's machine, as in `Machine`, and about its connection to the launcher."""

    facts: Mapping[str, Any]


@dataclass(frozen=True)
class WorldOpened:
    """Ports were found for a world."""

    world: int
    rendezvous_port: int
    master_port: int


@dataclass(frozen=True)
class Started:
    """A process was started."""

    name: str
    pid: int


@dataclass(frozen=True)
class Output:
    """A piece of what a process wrote."""

    name: str
    stream: str
    text: bytes


@dataclass(frozen=True)
class FilePiece:
    """A piece of a file that a process leaves behind."""

    path: str
    data: bytes
    last: bool


@dataclass(frozen=True)
class Returned:
    """All files of a folder were sent."""

    folder: str


@dataclass(frozen=True)
class Ended:
    """A process ended, or could not start."""

    name: str
    status: int  # exit code, or minus the signal that killed it
    error: str | None  # why it could not start
    reached: tuple[str, ...]  # its milestones
    leaving_s: float  # how long before its end it reported that it would end
    out_of_memory: bool  # while it ran, its machine's kernel killed a process because memory ran out


@dataclass(frozen=True)
class Stopping:
    """The agent ends its tree."""

    why: str


Report = Hello | WorldOpened | Started | Output | FilePiece | Returned | Ended | Stopping


def read_report(message: Message) -> Report:
    """Check a message and turn it into a report. Raises ChannelError for one that no agent of ours would send."""
    kind = message.get("is")
    if not isinstance(kind, str) or kind not in REPORTS:
        raise ChannelError(f"a report of the kind {shown(kind)}")
    make, checks = REPORTS[kind]
    # A hello may hold further fields about the machine, as text.
    others = optional(name) if kind == "hello" else None
    try:
        return make(**check_fields({key: value for key, value in message.items() if key != "is"}, checks, others))
    except FieldError as error:
        raise ChannelError(f"a report of the kind {kind} in which {error}") from error


# ---- the checks of these reports alone -------------------------------------------------------------------------------


def _stream(value: object) -> str:
    if value not in ("stdout", "stderr"):
        raise ValueError("stdout or stderr")
    return str(value)


def _raw(value: object) -> bytes:
    try:
        return text_to_bytes(value)  # type: ignore[arg-type]
    except (AttributeError, UnicodeEncodeError):
        raise ValueError("bytes as text") from None


def _piece(value: object) -> bytes:
    expected = f"at most {FILE_PIECE_BYTES} bytes in base64"
    try:
        data = base64.b64decode(value, validate=True)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    if len(data) > FILE_PIECE_BYTES:
        raise ValueError(expected)
    return data


def _milestones(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MOST_REACHED:
        raise ValueError(f"at most {MOST_REACHED} words")
    return tuple(map(name, value))


def _interfaces(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MOST_ADDRESSES:
        raise ValueError(f"at most {MOST_ADDRESSES} addresses, each with its network interface")
    return {name(address): name(interface) for address, interface in value.items()}


_port = integer(1, 65535)
_count = integer(0, 1 << 16)
_pid = integer(1, (1 << 31) - 1)
_seconds = number(0.0, MOST_SECONDS, "seconds")

REPORTS: Mapping[str, tuple[Callable[..., Report], Mapping[str, Check]]] = {
    "hello": (
        lambda **facts: Hello(facts),
        {
            "pid": _pid,
            "cores": _count,
            "gpus": _count,
            "address": optional(name),
            "launcher_address": optional(name),
            "interface": optional(name),
            "interfaces": _interfaces,
            "identity": optional(words),
        },
    ),
    "world": (WorldOpened, {"world": integer(0, 1 << 31), "rendezvous_port": _port, "master_port": _port}),
    "started": (Started, {"name": name, "pid": _pid}),
    "output": (Output, {"name": name, "stream": _stream, "text": _raw}),
    "file": (FilePiece, {"path": name, "data": _piece, "last": flag}),
    "returned": (Returned, {"folder": name}),
    "exit": (
        Ended,
        {
            "name": name,
            "status": integer(-signal.NSIG, 255),
            "error": optional(words),
            "reached": _milestones,
            "leaving_s": _seconds,
            "out_of_memory": flag,
        },
    ),
    "stopping": (Stopping, {"why": words}),
}
