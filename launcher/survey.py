"""Finds out what all machines of a run are, and how they reach each other, before the run is planned.

Every host reports its cores, GPUs and addresses. One of them, or the launching machine, is the hub: all others will
connect to it. We choose an address at which the others can reach the hub. Then all of them connect to it at the same
time, and each learns its own address on that route. Network interfaces may be named differently on each machine.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.agents import Agents, pump
from launcher.channel import Message
from launcher.checks import Check, FieldError, check_fields, optional, read_object, words
from launcher.hosts import Host
from launcher.logs import Logs, quiet
from launcher.machine import Machine, is_loopback, is_this_machine, source_address
from launcher.plan import PYTHON, Process, World
from launcher.probe import FIELDS, HUB
from launcher.signals import ENDING_SIGNALS, NotedSignals, noted_signals
from launcher.ssh import by_itself, cure
from launcher.transport import AgentCommand, AgentLink, TransportError

__all__ = ["ANY_HOST", "Finding", "Probe", "survey"]

ANY_HOST = "*"
CLOSE_S = 5.0
SHOWN_LINES = 3
NO_START = "does it have that working directory, and may you use it? If not, name another with --chdir"
NO_PROBE = "is this program whole there? Install it again, or name another Python with --remote-python"


@dataclass(frozen=True)
class Finding:
    """What we found out about one host."""

    machine: Machine = field(default_factory=Machine)
    report: Mapping[str, Any] = field(default_factory=dict)  # the checked output of the probe
    problem: str | None = None  # why it cannot take part: names the host and says what to do


@dataclass(frozen=True)
class Probe:
    """The command to run on each host, and what it may print: a JSON object with the fields of `launcher.probe`, plus
    others.
    """

    command: tuple[str, ...] = (PYTHON, "-m", "launcher.probe")
    fields: Mapping[str, Check] = field(default_factory=dict)  # further fields that it must print
    may_tell: Mapping[str, Check] = field(default_factory=dict)  # fields that it may print; others must be text or null

    def read(self, line: str) -> dict[str, Any]:
        """Read what the probe printed. Raises FieldError."""
        told = read_object(line)
        known = {key: check for key, check in self.may_tell.items() if key in told}
        return check_fields(told, {**FIELDS, **self.fields, **known}, optional(words))


def survey(
    hosts: Sequence[Host],
    agent_command: AgentCommand,
    *,
    hub: Host,
    cwd: str,
    probe: Probe | None = None,
    env: Mapping[str, str] | None = None,
    interfaces: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> dict[str, Finding]:
    """Return name of host -> what it is. The result includes the hub, even if it is not among `hosts`.

    `probe`, by default `Probe()`, runs on each host in `cwd`. `interfaces` names the network interface to use, by name
    of host or for ANY_HOST. A host has a `problem` if it cannot take part, or if its probe prints nonsense.
    Raises KeyboardInterrupt on an ending signal.
    """
    probe = probe or Probe()
    everybody = {host.name: host for host in (*hosts, hub)}
    asked_here = hub if hub not in hosts and is_this_machine(hub.name) else None  # `cwd` need not exist there
    probes = {
        host.name: Process(f"probe.{number}", host, probe.command, {}, cwd=os.getcwd() if host == asked_here else None)
        for number, host in enumerate(everybody.values())
    }
    with noted_signals(*ENDING_SIGNALS) as signals, tempfile.TemporaryDirectory() as folder:
        agents = Agents(probes.values(), Logs(folder, quiet))
        asked = _Survey(agents, signals, probes, hub, interfaces or {}, timeout_s)
        try:
            asked.connect(agent_command)
            asked.choose_hub_address()
            asked.probe(env or {}, cwd)
        finally:
            agents.stop(0.0)
            agents.close(time.monotonic() + CLOSE_S)
    return {name: asked.finding(name, probe) for name in everybody}


class _Survey:
    def __init__(
        self,
        agents: Agents,
        signals: NotedSignals,
        probes: Mapping[str, Process],
        hub: Host,
        interfaces: Mapping[str, str],
        timeout_s: float,
    ) -> None:
        self.agents, self.signals = agents, signals
        self.probes, self.hub, self.interfaces = probes, hub, interfaces
        self.timeout_s = timeout_s
        self.problems: dict[str, str] = {}  # by name of host
        self.hub_address: str | None = None

    # The story

    def connect(self, agent_command: AgentCommand) -> None:
        for name, process in self.probes.items():
            try:
                self.agents.connect(process.host, agent_command(process.host), grace_s=0.0)
            except TransportError as error:
                self.problems[name] = str(error)
        links = self.agents.links
        self._wait(lambda: all(link.said_hello or link.lost for link in links.values()))
        for name, link in links.items():
            if not link.said_hello:
                self.problems[name] = self._why_silent(link)

    def choose_hub_address(self) -> None:
        name = self.hub.name
        if name in self.problems:
            return
        others = [other for other in self._healthy() if other != name]
        if self._wanted_interface(name) is not None:
            self.hub_address = self._address_on_interface(name)
        elif all(is_this_machine(host) for host in (name, *others)):
            self.hub_address = "127.0.0.1"
        else:
            elsewhere = [other for other in others if not is_this_machine(other)]
            self.hub_address = self._launching_address(elsewhere) if is_this_machine(name) else self._reached_at(name)
        if self.hub_address is None:
            self.problems.setdefault(
                name,
                f"{name}: no address of it is known to be reached by the others; name its network interface with "
                f"--interface {name}=NAME; it has {self._describe_interfaces(name)}",
            )

    def probe(self, env: Mapping[str, str], cwd: str) -> None:
        port = self._listen_at_hub() if self.hub_address is not None else None
        if port is None:
            for name in self._healthy():
                self.problems[name] = f"{name}: not looked at, because of {self.hub.name}"
            return
        asked = [self.probes[name] for name in self._healthy()]
        for process in asked:
            self.agents.start(process, {**env, HUB: f"{self.hub_address}:{port}"}, cwd)
        links, exits = self.agents.links, self.agents.exits
        self._wait(lambda: all(process.name in exits or links[process.host.name].lost for process in asked))

    def finding(self, name: str, probe: Probe) -> Finding:
        if name in self.problems:
            return Finding(problem=self.problems[name])
        process = self.probes[name]
        end = self.agents.exits.get(process.name)
        if end is None:
            return Finding(problem=f"{name}: it did not say within {self.timeout_s:g} s what it is")
        lines = [line.text for line in self.agents.logs.tail(process, "stdout")]
        if end.status != 0 or not lines:
            errors = [line.text for line in self.agents.logs.tail(process, "stderr")[-SHOWN_LINES:]]
            complaint = end.error or "; ".join(errors) or "it said nothing"
            return Finding(problem=f"{name}: {complaint}; {NO_START if end.error else NO_PROBE}")
        try:
            report = probe.read(lines[-1])
        except FieldError as error:
            return Finding(problem=f"{name}: its probe sent something else than an answer: {error}; {NO_PROBE}")
        if report["unreachable"] is not None:
            return Finding(self._machine(name), report, self._why_unreachable(name, report["unreachable"]))
        try:
            return Finding(self._with_address(name, report["address"]), report)
        except LookupError as error:
            return Finding(self._machine(name), report, str(error))

    # Addresses

    def _launching_address(self, others: Sequence[str]) -> str | None:
        """Return the address at which the others can reach this machine.

        That is the address from which they see us connect or, if a jump host is between, our own on the route to them.
        """
        own, found = self._machine(self.hub.name).interfaces, list[str]()
        for name in others:
            seen = self._hello(name)
            ways: tuple[str | None, ...] = (
                seen["launcher_address"],
                source_address(seen["address"]),
                source_address(name),
            )
            found += [way for way in ways if way is not None and way in own and not is_loopback(way)]
        return _ipv4_first(found)

    def _reached_at(self, name: str) -> str | None:
        """Return the address at which the others can reach a machine.

        That is where we reached it, or the IPv4 address of the same network interface.
        """
        own, reached = self._machine(name).interfaces, self._hello(name)["address"]
        same_way = [address for address, interface in own.items() if interface == own.get(reached)]
        return _ipv4_first([reached, *same_way]) if reached in own else None

    def _hello(self, name: str) -> Message:
        return self.agents.links[name].hello or {}

    def _wanted_interface(self, name: str) -> str | None:
        return self.interfaces.get(name, self.interfaces.get(ANY_HOST))

    def _address_on_interface(self, name: str) -> str | None:
        wanted = self._wanted_interface(name)
        found = [address for address, interface in self._machine(name).interfaces.items() if interface == wanted]
        if not found:
            self.problems[name] = (
                f"{name}: it has no network interface {wanted} with an address; it has "
                f"{self._describe_interfaces(name)}; name the one to use with --interface {name}=NAME"
            )
        return found[0] if found else None

    def _with_address(self, name: str, on_route: str) -> Machine:
        """Return the machine with its address and interface. Raises LookupError if it lacks the wanted interface."""
        machine = self._machine(name)
        address = self.hub_address if name == self.hub.name else on_route
        if self._wanted_interface(name) is not None:
            address = self._address_on_interface(name)
            if address is None:
                raise LookupError(self.problems[name])
        return replace(machine, address=address, interface=machine.interfaces.get(str(address)))

    def _machine(self, name: str) -> Machine:
        hello = self._hello(name)
        return Machine(hello["cores"], hello["gpus"], interfaces=hello["interfaces"], identity=hello["identity"])

    def _describe_interfaces(self, name: str) -> str:
        return ", ".join(f"{nic} ({address})" for address, nic in self._machine(name).interfaces.items()) or "none"

    # Problems

    def _healthy(self) -> list[str]:
        return [name for name in self.probes if name not in self.problems]

    def _why_silent(self, link: AgentLink) -> str:
        name = link.host.name
        if link.lost is None:
            noise = f", but sent something else: {link.noise}" if link.noise else ""
            return f"{name}: it did not answer within {self.timeout_s:g} s{noise}; try: {_without_agent(link.command)}"
        advice = cure(link)
        last = next((word for word in reversed(link.last_words) if word.strip()), "")
        said = "; ".join(filter(None, (last.strip(), advice)))
        return f"{name}: {said}" if said else f"{name}: the agent there {link.lost}"

    def _why_unreachable(self, name: str, reason: str) -> str:
        hub = "this machine" if is_this_machine(self.hub.name) else self.hub.name
        return (
            f"{name}: cannot connect to {hub} at {self.hub_address}: {reason}; let its firewall pass TCP from "
            f"{name}, or name another way with --interface {self.hub.name}=NAME"
        )

    def _listen_at_hub(self) -> str | None:
        assert self.hub_address is not None
        world, link, ports = (
            World(0, self.hub, self.hub_address, 1),
            self.agents.links[self.hub.name],
            self.agents.ports,
        )
        self.agents.open_world(world)
        self._wait(lambda: bool(ports or link.lost))
        if not ports:
            self.problems[self.hub.name] = f"{self.hub.name}: it cannot listen on {self.hub_address}"
            return None
        return ports[world.index]["HOROVOD_GLOO_RENDEZVOUS_PORT"]

    def _wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.timeout_s
        while not condition() and time.monotonic() < deadline:
            if self.signals.received:
                raise KeyboardInterrupt
            pump([self.agents], self.signals, deadline - time.monotonic())


def _without_agent(command: Sequence[str]) -> str:
    """Return a command by which the user can test the connection. Over ssh, it runs `true` instead of the agent."""
    return shlex.join([*by_itself(command)[:-1], "true"] if command[0] == "ssh" else command)


def _ipv4_first(addresses: Sequence[str]) -> str | None:
    """Return the first IPv4 address, because Horovod and gloo speak nothing else; if there is none, the first one."""
    return min(addresses, key=lambda address: ":" in address, default=None)
