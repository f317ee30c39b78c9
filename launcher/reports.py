"""What an agent may say, checked once, where it comes in: the machine it runs on may be broken, or lie.

Each kind of report declares the type and range of every field. Whether an agent may speak of the process, world or
file that a report names, `cluster` judges, for it knows what was ordered.
"""

from __future__ import annotations

import base64
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.channel import ChannelError, Message, text_to_bytes

__all__ = [
    "FILE_PIECE_BYTES",
    "LEAVING",
    "MOST_REACHED",
    "MOST_WORDS",
    "NAME",
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

LEAVING = "leave"  # the milestone of a process that begins to end
FILE_PIECE_BYTES = 1 << 20  # the largest piece of a file in one report
MOST_NAME = 255  # characters of a name: of a process, a file, an address
MOST_WORDS = 4096  # characters of an explanation
MOST_REACHED = 32  # milestones of one process
MOST_ADDRESSES = 4096  # of one machine
MOST_SECONDS = 1e9
NAME = re.compile(rf"[\x21-\x7e]{{1,{MOST_NAME}}}")


@dataclass(frozen=True)
class Hello:
    """What the agent's machine is, as `Machine` has it, and how the agent sees the way to the launcher."""

    facts: Mapping[str, Any]


@dataclass(frozen=True)
class WorldOpened:
    """Ports were found for a world."""

    world: int
    rendezvous_port: int
    master_port: int


@dataclass(frozen=True)
class Started:
    """A process runs."""

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
    leaving_s: float  # so long before its end it said that it would end
    out_of_memory: bool  # while it ran, the kernel of its machine killed a process for want of memory


@dataclass(frozen=True)
class Stopping:
    """The agent ends its tree."""

    why: str


Report = Hello | WorldOpened | Started | Output | FilePiece | Returned | Ended | Stopping
Check = Callable[[Any], Any]  # of one field: the value as the launcher uses it. Raises ValueError(what was expected).


def read_report(message: Message) -> Report:
    """Raises ChannelError for what no agent of ours would send."""
    kind = message.get("is")
    if not isinstance(kind, str) or kind not in REPORTS:
        raise ChannelError(f"a report of the kind {_shown(kind)}")
    make, checks = REPORTS[kind]
    given = {key: value for key, value in message.items() if key != "is"}
    missing, unknown = checks.keys() - given.keys(), given.keys() - checks.keys()
    if kind == "hello":
        # A machine may tell more of itself, in words.
        checks, unknown = {**dict.fromkeys(unknown, _name_or_none), **checks}, set()
    if missing or unknown:
        raise ChannelError(f"a report of the kind {kind} in which {_shown(sorted(missing | unknown)[0])} is not right")
    return make(**{key: _checked(key, given[key], check) for key, check in checks.items()})


def _checked(key: str, value: object, check: Check) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise ChannelError(f"a report in which {_shown(key)} is {_shown(value)}; expected {error}") from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


# ---- the checks ------------------------------------------------------------------------------------------------------


def _integer(low: int, high: int) -> Check:
    def check(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def _seconds(value: object) -> float:
    if not isinstance(value, float) or not 0.0 <= value <= MOST_SECONDS:
        raise ValueError(f"seconds from 0.0 to {MOST_SECONDS}")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _name(value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"1 to {MOST_NAME} printable ASCII characters without spaces")
    return value


def _name_or_none(value: object) -> str | None:
    return None if value is None else _name(value)


def _words(value: object) -> str:
    if not isinstance(value, str) or len(value) > MOST_WORDS:
        raise ValueError(f"text of at most {MOST_WORDS} characters")
    return value


def _words_or_none(value: object) -> str | None:
    return None if value is None else _words(value)


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
    return tuple(map(_name, value))


def _interfaces(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MOST_ADDRESSES:
        raise ValueError(f"at most {MOST_ADDRESSES} addresses, each with its network interface")
    return {_name(address): _name(interface) for address, interface in value.items()}


_port = _integer(1, 65535)
_count = _integer(0, 1 << 16)
_pid = _integer(1, (1 << 31) - 1)

REPORTS: Mapping[str, tuple[Callable[..., Report], Mapping[str, Check]]] = {
    "hello": (
        lambda **facts: Hello(facts),
        {
            "pid": _pid,
            "cores": _count,
            "gpus": _count,
            "address": _name_or_none,
            "launcher_address": _name_or_none,
            "interface": _name_or_none,
            "interfaces": _interfaces,
            "identity": _words_or_none,
        },
    ),
    "world": (WorldOpened, {"world": _integer(0, 1 << 31), "rendezvous_port": _port, "master_port": _port}),
    "started": (Started, {"name": _name, "pid": _pid}),
    "output": (Output, {"name": _name, "stream": _stream, "text": _raw}),
    "file": (FilePiece, {"path": _name, "data": _piece, "last": _flag}),
    "returned": (Returned, {"folder": _name}),
    "exit": (
        Ended,
        {
            "name": _name,
            "status": _integer(-signal.NSIG, 255),
            "error": _words_or_none,
            "reached": _milestones,
            "leaving_s": _seconds,
            "out_of_memory": _flag,
        },
    ),
    "stopping": (Stopping, {"why": _words}),
}
