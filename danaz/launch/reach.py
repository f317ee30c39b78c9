"""How the machines of a run are reached, what is sent to them, and whether they can take part."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from danaz.launch.probe import FIELDS, MEASURED, versions
from launcher.hosts import Host
from launcher.machine import Machine, local_machines
from launcher.plan import INTERFACE_VARIABLES, LAUNCHING_MACHINE, PYTHON, Plan
from launcher.slurm import Srun
from launcher.ssh import Ssh
from launcher.survey import ANY_HOST, Finding, Probe, survey
from launcher.transport import AgentCommand, local_agent_command

PROBE = Probe((PYTHON, "-m", "danaz.launch.probe"), FIELDS, MEASURED)
PREFIX = "DANAZ_"  # of danaz's own variables
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
QUOTED = re.compile(r"""'(?P<plain>[^']*)'|"(?P<escaped>(?:[^"\\]|\\.)*)\"""")


class ReachError(ValueError):
    """A machine that cannot take part, or an option that makes no sense; the message names it and the cure."""


@dataclass(frozen=True)
class Reach:
    """The options of `danaz launch` that concern other machines."""

    transport: Ssh | Srun = field(default_factory=Ssh)
    only_here: bool = False  # --launcher local
    cwd: str = field(default_factory=os.getcwd)  # of the ranks, on every machine
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # -x, --env-file: may hold secrets
    interfaces: Mapping[str, str] = field(default_factory=dict)  # by name of host, or ANY_HOST
    server: Host = LAUNCHING_MACHINE
    more_servers: Sequence[Host] = ()  # further machines for its shards, in turn
    server_port: int = 0  # 0: any free port
    insecure: bool = False  # a server without keys and encryption

    @property
    def agent_command(self) -> AgentCommand:
        return local_agent_command if self.only_here else self.transport

    def server_of(self, shard: int) -> Host:
        """Return the machine of this shard."""
        hosts = (self.server, *self.more_servers)
        return hosts[shard % len(hosts)]

    def is_direct(self, host: Host) -> bool:
        """Return whether processes there are children of this one, and see the files of this machine."""
        return self.only_here or self.transport.reaches_directly(host)

    def survey(self, hosts: Sequence[Host], hub: Host) -> dict[str, Finding]:
        """Find out what each host is, and why it cannot take part. Raises KeyboardInterrupt, ReachError."""
        try:
            tempfile.gettempdir()
        except FileNotFoundError as error:
            raise ReachError(f"{error.strerror}; name a folder that you may write to by TMPDIR") from None
        return survey(
            hosts, self.agent_command, hub=hub, cwd=self.cwd, probe=PROBE, env=self.env, interfaces=self.interfaces
        )


def find_machines(
    hosts: Sequence[Host], reach: Reach, *, hub: Host, collective: str
) -> tuple[dict[str, Machine], list[str]]:
    """Return the facts that a run needs about each machine, and what to tell the user. Raises ReachError.

    If all hosts are this machine, no survey is needed.
    """
    everybody = (*hosts, *reach.more_servers)
    if all(reach.is_direct(host) for host in (*everybody, hub)):
        machines = local_machines(everybody)
        _check_distinct(hosts, machines)
        return machines, []
    findings = reach.survey(everybody, hub)
    problems = [finding.problem for finding in findings.values() if finding.problem]
    if not problems:
        problems = [problem for name, finding in findings.items() for problem in unfit(name, finding, collective)]
    if problems:
        raise ReachError("\n".join(problems))
    machines = {name: finding.machine for name, finding in findings.items()}
    _check_distinct(hosts, machines)
    notes = [note for name, finding in findings.items() for note in _differences(name, finding)]
    return machines, notes


def _check_distinct(hosts: Sequence[Host], machines: Mapping[str, Machine]) -> None:
    """Raise ReachError if two hosts are one machine."""
    problems = namesakes(hosts, machines)
    if problems:
        raise ReachError("\n".join(problems.values()))


def namesakes(hosts: Sequence[Host], machines: Mapping[str, Machine]) -> dict[str, str]:
    """Return name of a host that is the same machine as an earlier one -> the sentence that says so.

    Both would count as workers, and each would use the machine's first GPU.
    """
    first: dict[str, Host] = {}  # by identity
    found = {}
    for host in hosts:
        identity = machines.get(host.name, Machine()).identity
        other = host if identity is None else first.setdefault(identity, host)
        if other is not host:
            found[host.name] = (
                f"{host.name}{_at(host)} and {other.name}{_at(other)} are one machine; name it once, with all its "
                "slots (--workers-per-host makes several workers of them)"
            )
    return found


def _at(host: Host) -> str:
    return f" ({host.place})" if host.place else ""


def unfit(name: str, finding: Finding, collective: str) -> list[str]:
    """Return the problems of a host that would end the run, or make its machines misunderstand each other."""
    here, there = versions(), finding.report["versions"]
    if there["danaz"] != here["danaz"]:
        return [
            f"{name}: danaz {there['danaz']} there, {here['danaz']} here; install the same there, or name another "
            "Python with --remote-python"
        ]
    if there["torch"] is None:
        return [f"{name}: torch is not installed there; pip install torch=={here['torch']}"]
    if collective == "horovod" and there["horovod"] is None:
        return [f"{name}: Horovod is not installed there; run `danaz horovod install` there, or use --collective torch"]
    return []


def _differences(name: str, finding: Finding) -> list[str]:
    here, there = versions(), finding.report["versions"]
    return [
        f"{name}: {package} {there[package]} there, {here[package]} here"
        for package in ("python", "torch", "horovod")
        if there[package] != here[package]
    ]


def parse_environment(variables: Sequence[str], env_file: Path | None) -> dict[str, str]:
    """Read `-x NAME`, `-x NAME=VALUE` and the lines of --env-file; `-x` wins. Raises ReachError."""
    found = _read_env_file(env_file) if env_file is not None else {}
    for variable in variables:
        name, equals, value = variable.partition("=")
        if not NAME.fullmatch(name):
            raise ReachError(f"-x {variable!r}: expected NAME or NAME=VALUE")
        if not equals and name not in os.environ:
            raise ReachError(f"-x {name}: it is not set here; write -x {name}=VALUE")
        found[name] = value if equals else os.environ[name]
    own = sorted(name for name in found if name.startswith(PREFIX))
    if own:
        raise ReachError(f"{', '.join(own)}: what begins with {PREFIX} is set by danaz itself; give it another name")
    return found


def replaced_here(plan: Plan, reach: Reach) -> list[str]:
    """Return what to tell the user about variables of this machine that its ranks do not get."""
    ranks = [rank for rank in plan.ranks if reach.is_direct(rank.host)]
    replaced = {
        name: rank.env[name]
        for rank in ranks
        for name in INTERFACE_VARIABLES
        if name in rank.env and os.environ.get(name) not in (None, rank.env[name])
    }
    return [
        f"{name} is {os.environ[name]} here, but ranks get {value}, the way to the other ranks; to choose "
        f"it, use --interface, or -x {name}"
        for name, value in replaced.items()
    ]


def _read_env_file(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ReachError(f"--env-file {path} cannot be read: {error}") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not equals or not NAME.fullmatch(name):
            raise ReachError(f"--env-file {path} line {number}: expected NAME=VALUE")
        found[name] = _unquoted(value, f"--env-file {path} line {number}")
    return found


def _unquoted(value: str, where: str) -> str:
    """Remove a pair of quotes around a value. A backslash is an escape in double quotes, and only there.

    Raises ReachError for a quote that is not closed, or closed before the end.
    """
    if value[:1] not in ("'", '"'):
        return value
    match = QUOTED.fullmatch(value)
    if match is None:
        raise ReachError(f"{where}: {value} is not one quoted text; close the quote at the end, or leave it out")
    return match["plain"] if match["plain"] is not None else re.sub(r'\\(["\\$`])', r"\1", match["escaped"])


def parse_interfaces(texts: Sequence[str], hosts: Sequence[Host]) -> dict[str, str]:
    """Read `--interface NIC` for all machines and `--interface HOST=NIC` for one. Raises ReachError."""
    names = {host.name for host in (*hosts, LAUNCHING_MACHINE)}
    found = {}
    for text in texts:
        host, equals, nic = text.rpartition("=")
        if not nic or (equals and host not in names):
            raise ReachError(f"--interface {text!r}: expected NIC or HOST=NIC with one of {', '.join(sorted(names))}")
        found[host if equals else ANY_HOST] = nic
    return found
