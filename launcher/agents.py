"""Gives orders to the agents of one unit and collects their reports. Other modules decide what the reports mean."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launcher.channel import ChannelError, wait_ready
from launcher.gate import Gate, delay_s
from launcher.hosts import Host
from launcher.logs import Logs, printable
from launcher.machine import is_this_machine
from launcher.plan import PREFIX, Process, World
from launcher.reports import (
    LEAVING,
    Ended,
    FilePiece,
    Hello,
    Output,
    Report,
    Returned,
    Started,
    Stopping,
    WorldOpened,
    read_report,
)
from launcher.signals import NotedSignals
from launcher.ssh import forget_connection, passing_obstacle, shared_connection
from launcher.transport import AgentLink, TransportError

__all__ = ["Agents", "Exit", "LostAgent", "pump"]

PING_S = 15.0  # an agent on another machine hears from us at least once in this time…
SILENCE_S = 90.0  # …and ends its process tree when it has heard nothing for this long
ANNOUNCEMENT = re.compile(r"[\x21-\x7e]{1,1024}")  # it goes into environments and commands
MOST_FILES = 10_000  # files that the processes of one machine may return…
MOST_RETURNED_BYTES = 1 << 38  # …and their total size


@dataclass(frozen=True)
class Exit:
    """How a process ended."""

    status: int  # exit code, or minus the signal that killed it
    error: str | None  # why it could not even be started
    at_s: float  # time.monotonic() on this machine when it began to end, as far as we know
    missing: str | None = None  # what it left undone, if it ended with exit code 0
    out_of_memory: bool = False  # while it ran, its machine's kernel killed processes because memory ran out
    said_that_it_leaves: bool = False  # it reported that it was about to end; `at_s` is the time of that report


@dataclass(frozen=True)
class LostAgent:
    """An agent that ended although nobody asked it to, or that sent nonsense. Its processes are lost with it."""

    link: AgentLink
    reason: str


class Agents:
    """`connect`, `open_world`, `start` and `stop` send orders to the agents; `pump` receives their reports."""

    def __init__(
        self, processes: Iterable[Process], logs: Logs, gate: Gate | None = None, prefix: str = PREFIX
    ) -> None:
        """`gate` is shared by all lives that connect at the same time. `prefix` is like `Plan.prefix`."""
        self.processes = {process.name: process for process in processes}
        self.logs, self.gate, self.prefix = logs, gate or Gate(), prefix
        self.links: dict[str, AgentLink] = {}  # by host name
        self.announced: dict[str, str] = {}
        self.ports: dict[int, dict[str, str]] = {}  # world -> environment variables that name its ports
        self.exits: dict[str, Exit] = {}  # by process name
        self.lost: LostAgent | None = None  # the first
        self.returned_bytes = 0  # total size of the files that arrived
        self.refused: list[str] = []  # invalid reports that agents sent while they were stopping
        self._started: set[str] = set()  # names of the processes that were ordered to start
        self._opening: dict[int, str] = {}  # world -> the host whose agent was asked to open it
        self._files: set[str] = set()  # paths of files that arrived, complete or in part
        self._folders: set[tuple[str, str]] = set()  # host, and folder of the files its processes return
        self._distrusted: set[str] = set()  # hosts whose agents sent invalid reports; we ignore them now
        self._stopping = False
        self.next_ping_s = time.monotonic() + PING_S

    def connect(self, host: Host, command: Sequence[str], grace_s: float) -> None:
        """Start an agent as soon as the gate admits it."""
        # On this machine the closed pipe alone shows that we are gone, and Ctrl-Z must not end the run.
        silence_s = None if is_this_machine(host.name) else SILENCE_S
        greeting = {"do": "hello", "grace_s": grace_s, "silence_s": silence_s}
        self.links[host.name] = AgentLink(host, command, greeting)

    def dial(self, now_s: float) -> float:
        """Start the agents that are due and that the gate admits. Return when to look again."""
        if self._stopping:
            return math.inf
        for link in self.links.values():
            if link.next_attempt_s > now_s or not self.gate.admit(link, now_s, shared_connection(link.command)):
                continue
            try:
                link.open(now_s)
            except TransportError as error:
                self.gate.gave_up(link)
                self._lose(link, str(error))
        due_s = [link.next_attempt_s for link in self.links.values()]
        return min([each_s if each_s > now_s else self.gate.next_s for each_s in due_s], default=math.inf)

    def open_world(self, world: World) -> None:
        order = {"do": "world", "world": world.index, "address": world.address}
        self._opening[world.index] = world.host.name
        self.links[world.host.name].channel.send(order)

    def start(
        self, process: Process, env: Mapping[str, str], cwd: str, argv: Sequence[str] = (), folder: str = ""
    ) -> None:
        """Start a process with `env` on top of its machine's own environment.

        `argv` replaces its command if given. `folder` names the folder on its machine where it leaves the files that it
        returns. Raises OSError if its logs cannot be made.
        """
        self.logs.open(process)
        self._started.add(process.name)
        if folder:
            self._folders.add((process.host.name, folder))
        order = {
            "do": "start",
            "name": process.name,
            "argv": argv or process.argv,
            "env": dict(env),
            "defaults": dict(process.defaults),
            "returns": None if process.returns is None else process.returns.variable,
            "files": [] if process.returns is None else process.returns.files,
            "folder": folder,
            "milestones": bool(process.milestones),
            "secret": process.secret,
            "prefix": self.prefix,
            "cwd": process.cwd or cwd,
        }
        self.links[process.host.name].channel.send(order)

    def stop(self, grace_s: float, keep_files: bool = False) -> None:
        """Ask all agents to end their process trees. With `keep_files`, files to return stay there for a restart."""
        self._stopping = True
        for link in self.open_links():
            link.channel.send({"do": "stop", "grace_s": grace_s, "keep_files": keep_files})

    def open_links(self) -> list[AgentLink]:
        return [link for link in self.links.values() if link.is_open]

    def busy_links(self) -> list[AgentLink]:
        """Return the agents that may have processes. We give no process to an agent that has not said hello."""
        return [link for link in self.open_links() if link.said_hello]

    def close(self, deadline: float, forget_silent: bool = False) -> None:
        """Close the connections to the agents. That ends those that still run; kill them at the deadline.

        With `forget_silent`, later agents do not share a connection over which no answer came.
        """
        for link in self.links.values():
            self.gate.gave_up(link)
            is_silent = link.is_open and not link.said_hello
            link.close(max(0.0, deadline - time.monotonic()) if link.said_hello else 0.0)
            if is_silent and forget_silent:
                forget_connection(link.command)

    def have_ended(self, processes: Iterable[Process]) -> bool:
        return all(process.name in self.exits for process in processes)

    def running(self) -> list[Process]:
        return [process for process in self.processes.values() if process.name not in self.exits]

    def ping_if_due(self, now_s: float) -> None:
        """Tell the agents that we are alive. An agent that cannot be reached ends its process tree."""
        if now_s < self.next_ping_s:
            return
        self.next_ping_s = now_s + PING_S
        for link in self.open_links():
            if not link.channel.pending_bytes:  # if the last message has not left yet, another does not help
                link.channel.send({"do": "ping"})

    def hear(self, link: AgentLink) -> None:
        try:
            for message in link.channel.receive():
                if link.host.name not in self._distrusted:
                    self._note(link, read_report(message))
        except ChannelError as error:
            self._distrust(link, str(error))
        if link.closed and not self._try_again(link):
            self.gate.gave_up(link)
            self._lose(link, "ended although nobody asked it to")

    def _try_again(self, link: AgentLink) -> bool:
        """Schedule another attempt if an agent that could not be reached is worth one. Return whether it is."""
        obstacle = None if self._stopping or link.said_hello else passing_obstacle(link, time.monotonic())
        if obstacle is None:
            return False
        link.close(0.0)
        if obstacle == "crowded":
            self.gate.dropped(link)
        else:
            self.gate.gave_up(link)
        link.next_attempt_s = time.monotonic() + delay_s(link.attempts)
        return True

    def _note(self, link: AgentLink, report: Report) -> None:
        """Take note of a report. Raises ChannelError for one that this agent has no right to send."""
        match report:
            case Hello():
                if link.hello is not None:
                    raise ChannelError("a second hello")
                link.hello = dict(report.facts)
                self.gate.connected(link)
            case WorldOpened():
                self._note_ports(link, report)
            case Started():
                self._own(link, report.name)
            case Output():
                self._take_output(self._own(link, report.name), report.stream, report.text)
            case FilePiece():
                self._keep_file(link, report)
            case Returned():
                self._answer_return(link, report)
            case Ended():
                self._note_end(self._own(link, report.name), report)
            case Stopping():
                self._lose(link, f"stopped: {printable(report.why)}")

    def _own(self, link: AgentLink, name: str) -> Process:
        """Return the running process of that name. Raises ChannelError if this agent does not run it."""
        process = self.processes.get(name)
        if process is None or process.host.name != link.host.name or name not in self._started or name in self.exits:
            raise ChannelError(f"a report on {name!r}, which it does not run")
        return process

    def _note_ports(self, link: AgentLink, report: WorldOpened) -> None:
        if self._opening.pop(report.world, None) != link.host.name:
            raise ChannelError(f"the ports of world {report.world}, for which nobody asked it")
        self.ports[report.world] = {
            "HOROVOD_GLOO_RENDEZVOUS_PORT": str(report.rendezvous_port),
            "MASTER_PORT": str(report.master_port),
        }

    def _note_end(self, process: Process, report: Ended) -> None:
        self.logs.close(process)
        missing = process.missing(report.reached) if report.status == 0 else None
        error = None if report.error is None else printable(report.error)
        began_s = time.monotonic() - report.leaving_s
        leaves = LEAVING in report.reached
        self.exits[process.name] = Exit(report.status, error, began_s, missing, report.out_of_memory, leaves)

    def _keep_file(self, link: AgentLink, piece: FilePiece) -> None:
        """Keep a piece of a file.

        Raises ChannelError if no process of this agent owes that file, or if there are too many files or bytes.
        """
        running = [self.processes[name] for name in self._started if self.processes[name].host.name == link.host.name]
        owed = [pattern for process in running if process.returns is not None for pattern in process.returns.files]
        if not any(re.fullmatch(pattern, piece.path, re.ASCII) for pattern in owed):
            raise ChannelError(f"a file {piece.path!r}, which none of its processes owes")
        self.returned_bytes += len(piece.data)
        self._files.add(piece.path)
        if len(self._files) > MOST_FILES or self.returned_bytes > MOST_RETURNED_BYTES:
            raise ChannelError(f"more than {MOST_FILES} files, or more than {MOST_RETURNED_BYTES >> 30} GB of them")
        try:
            self.logs.keep_file(piece.path, piece.data, piece.last)
        except ValueError as error:
            raise ChannelError(str(error)) from error

    def _answer_return(self, link: AgentLink, report: Returned) -> None:
        """Tell the agent whether all files were kept. If not, it leaves the folder on its machine.

        Raises ChannelError for a folder that none of its processes has.
        """
        if (link.host.name, report.folder) not in self._folders:
            raise ChannelError(f"the end of the folder {report.folder!r}, which none of its processes has")
        self._folders.remove((link.host.name, report.folder))
        kept = not self.logs.lost_files
        if not kept:
            self.logs.note(
                f"what could not be kept is still in {report.folder}, among {link.host.name}'s temporary files"
            )
        link.channel.send({"do": "forget", "folder": report.folder, "kept": kept})

    def _take_output(self, process: Process, stream: str, data: bytes) -> None:
        lines = self.logs.write(process, stream, data)
        if process.announces is None or stream != "stdout":
            return
        for line in lines:
            name, equals, value = line.partition("=")
            if equals and name in (process.announces, process.begins):
                if not ANNOUNCEMENT.fullmatch(value.strip()):
                    raise ChannelError(f"{name}={value[:80]!r}; expected printable ASCII without spaces after the sign")
                self.announced.setdefault(name, value.strip())

    def _distrust(self, link: AgentLink, what: str) -> None:
        if link.host.name in self._distrusted:
            return
        self._distrusted.add(link.host.name)
        reason = f"sent something else than an answer: {printable(what)}"
        if self._stopping:
            self.refused.append(f"the agent on {link.host.name} {reason}")
        self._lose(link, reason)

    def _lose(self, link: AgentLink, reason: str) -> None:
        if self._stopping or link.lost is not None:
            return
        link.lost = reason
        self.lost = self.lost or LostAgent(link, reason)


def pump(groups: Iterable[Agents], signals: NotedSignals, timeout_s: float) -> None:
    """Wait until something happens, and handle all that did. Raises OSError when logs cannot be written.

    It may return early. Call it in a loop, because it also tells the group that we are alive.
    """
    now_s = time.monotonic()
    groups = list(groups)
    timeout_s = max(0.0, min([timeout_s, *(group.dial(now_s) - now_s for group in groups)]))
    owners = {link: group for group in groups for link in group.open_links()}
    for group in set(owners.values()):
        group.ping_if_due(now_s)
        timeout_s = min(timeout_s, group.next_ping_s - now_s)
    answers = {link.channel.read_fd: link for link in owners}
    complaints = {link.stderr_fd: link for link in owners if not link.stderr_closed}
    orders = {link.channel.write_fd: link for link in owners if link.channel.pending_bytes}
    readable, writable = wait_ready([signals.wakeup_fd, *answers, *complaints], orders, timeout_s)
    if signals.wakeup_fd in readable:
        signals.rest()
    for fd in writable:
        orders[fd].channel.flush()
    for fd in readable & complaints.keys():
        complaints[fd].read_stderr()
    for fd in readable & answers.keys():
        owners[answers[fd]].hear(answers[fd])
