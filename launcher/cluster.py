"""The agents of one unit, and what they have told so far: the launcher's hands and ears. What it means, others say."""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launcher.channel import ChannelError, Message, text_to_bytes, wait_ready
from launcher.gate import Gate, delay_s
from launcher.hosts import Host
from launcher.logs import Logs
from launcher.machine import is_this_machine
from launcher.plan import Process, World
from launcher.signals import NotedSignals
from launcher.ssh import passing_obstacle
from launcher.transport import AgentLink, TransportError

__all__ = ["Cluster", "Exit", "LostAgent", "pump"]

PING_S = 15.0  # an agent on another machine hears from us at least so often…
SILENCE_S = 90.0  # …and ends its tree when it has heard nothing for so long


@dataclass(frozen=True)
class Exit:
    """How a process ended."""

    status: int  # exit code, or minus the signal that killed it
    error: str | None  # why it could not even be started
    at_s: float  # time.monotonic() here, when we heard of it


@dataclass(frozen=True)
class LostAgent:
    """An agent that ended, or spoke nonsense, although nobody asked it to; with it its processes are lost."""

    link: AgentLink
    reason: str


class Cluster:
    """Orders go out by `connect`, `open_world`, `start` and `stop`; `pump` takes in what the agents report."""

    def __init__(self, processes: Iterable[Process], logs: Logs, gate: Gate | None = None) -> None:
        """`gate` is common to all that connect at the same time."""
        self.processes = {process.name: process for process in processes}
        self.logs, self.gate = logs, gate or Gate()
        self.links: dict[str, AgentLink] = {}  # by host name
        self.announced: dict[str, str] = {}
        self.ports: dict[int, dict[str, str]] = {}  # world -> environment variables that name its ports
        self.exits: dict[str, Exit] = {}  # by process name
        self.lost: LostAgent | None = None  # the first
        self.file_came_s = -math.inf  # when the last piece of a returned file came
        self._stopping = False
        self.next_ping_s = time.monotonic() + PING_S

    def connect(self, host: Host, command: Sequence[str], grace_s: float) -> None:
        """Have an agent started, as soon as the gate admits it."""
        # On this machine the pipe tells all, and Ctrl-Z must not end the run.
        silence_s = None if is_this_machine(host.name) else SILENCE_S
        greeting = {"do": "hello", "grace_s": grace_s, "silence_s": silence_s}
        self.links[host.name] = AgentLink(host, command, greeting)

    def dial(self, now_s: float) -> float:
        """Start the agents that are due, and that the gate admits; returns when to look again."""
        waiting = [] if self._stopping else [link for link in self.links.values() if now_s >= link.next_attempt_s]
        for link in waiting:
            if not self.gate.admits(link, now_s):
                break
            try:
                link.open(now_s)
            except TransportError as error:
                self.gate.gave_up(link)
                self._lose(link, str(error))
        due_s = min((link.next_attempt_s for link in self.links.values() if not self._stopping), default=math.inf)
        return due_s if due_s > now_s else self.gate.next_s

    def open_world(self, world: World) -> None:
        order = {"do": "world", "world": world.index, "address": world.address}
        self.links[world.host.name].channel.send(order)

    def start(
        self, process: Process, env: Mapping[str, str], cwd: str, argv: Sequence[str] = (), folder: str = ""
    ) -> None:
        """Start a process with `env` on top of its machine's own environment. Raises OSError for want of logs.

        `argv` takes the place of its command; `folder` names the one on its machine where it leaves what it returns.
        """
        self.logs.open(process)
        order = {
            "do": "start",
            "name": process.name,
            "argv": argv or process.argv,
            "env": dict(env),
            "defaults": dict(process.defaults),
            "returns": process.returns,
            "folder": folder,
            "secret": process.secret,
            "cwd": process.cwd or cwd,
        }
        self.links[process.host.name].channel.send(order)

    def stop(self, grace_s: float, keep_files: bool = False) -> None:
        """Ask all agents to end their process trees; with `keep_files`, what these would return stays for a restart."""
        self._stopping = True
        for link in self.open_links():
            link.channel.send({"do": "stop", "grace_s": grace_s, "keep_files": keep_files})

    def open_links(self) -> list[AgentLink]:
        return [link for link in self.links.values() if link.is_open]

    def busy_links(self) -> list[AgentLink]:
        """Agents that may have processes: one that never said hello was given none."""
        return [link for link in self.open_links() if link.said_hello]

    def close(self, deadline: float) -> None:
        """Leave the agents, which end by that if they have not yet; by the deadline they are killed."""
        for link in self.links.values():
            link.close(max(0.0, deadline - time.monotonic()) if link.said_hello else 0.0)

    def have_ended(self, processes: Iterable[Process]) -> bool:
        return all(process.name in self.exits for process in processes)

    def running(self) -> list[Process]:
        return [process for process in self.processes.values() if process.name not in self.exits]

    def ping_if_due(self, now_s: float) -> None:
        """Tell the agents that we are alive; those of a machine that cannot be reached would end their trees."""
        if now_s < self.next_ping_s:
            return
        self.next_ping_s = now_s + PING_S
        for link in self.open_links():
            if not link.channel.pending_bytes:  # where the last one has not left yet, another would not help
                link.channel.send({"do": "ping"})

    def hear(self, link: AgentLink) -> None:
        try:
            for message in link.channel.receive():
                self._note(link, message)
        except ChannelError as error:
            self._lose(link, f"sent something else than an answer: {error}")
        if link.closed and not self._will_try_again(link):
            self.gate.gave_up(link)
            self._lose(link, "ended although nobody asked it to")

    def _will_try_again(self, link: AgentLink) -> bool:
        """Whether an agent that could not be reached now may be reached soon."""
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

    def _note(self, link: AgentLink, message: Message) -> None:
        match message["is"]:
            case "hello":
                link.hello = message
                self.gate.connected(link)
            case "world":
                self.ports[message["world"]] = {
                    "HOROVOD_GLOO_RENDEZVOUS_PORT": str(message["rendezvous_port"]),
                    "MASTER_PORT": str(message["master_port"]),
                }
            case "output":
                self._take_output(self.processes[message["name"]], message["stream"], text_to_bytes(message["text"]))
            case "file":
                self.file_came_s = time.monotonic()
                self._keep_file(message)
            case "exit":
                self.logs.close(self.processes[message["name"]])
                self.exits[message["name"]] = Exit(message["status"], message["error"], time.monotonic())
            case "stopping":
                self._lose(link, f"stopped: {message['why']}")

    def _keep_file(self, message: Message) -> None:
        """Raises ChannelError for what no agent of ours would send, and OSError when it cannot be written."""
        try:
            self.logs.keep_file(message["path"], base64.b64decode(message["data"], validate=True), message["last"])
        except ValueError as error:
            raise ChannelError(str(error)) from error

    def _take_output(self, process: Process, stream: str, data: bytes) -> None:
        lines = self.logs.write(process, stream, data)
        if process.announces is None or stream != "stdout":
            return
        for line in lines:
            name, equals, value = line.partition("=")
            if equals and name in (process.announces, process.begins):
                self.announced.setdefault(name, value.strip())

    def _lose(self, link: AgentLink, reason: str) -> None:
        if self._stopping or link.lost is not None:
            return
        link.lost = reason
        self.lost = self.lost or LostAgent(link, reason)


def pump(clusters: Iterable[Cluster], signals: NotedSignals, timeout_s: float) -> None:
    """Wait for something to happen, and take note of all that did. Raises OSError when logs cannot be written.

    It may return early, and is to be called again and again: it also tells the agents that we are alive.
    """
    now_s = time.monotonic()
    clusters = list(clusters)
    timeout_s = max(0.0, min([timeout_s, *(cluster.dial(now_s) - now_s for cluster in clusters)]))
    owners = {link: cluster for cluster in clusters for link in cluster.open_links()}
    for cluster in set(owners.values()):
        cluster.ping_if_due(now_s)
        timeout_s = min(timeout_s, cluster.next_ping_s - now_s)
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
