"""The options of `danaz launch` and `danaz doctor`: each declared once, with all that follows from it."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from danaz.launch.reach import Reach, ReachError, parse_environment, parse_interfaces
from danaz.options.option import Option, given, options_of, overriding
from danaz.options.shared import (
    EXCHANGE,
    FAILURES,
    OVERRIDES,
    RECORD,
    SEED,
    SHARDS,
    WARMUP_EPOCHS,
    Method,
    Serving,
)
from launcher.connections import SharedConnections
from launcher.hosts import Host, HostsError, parse_hostfile, parse_hosts
from launcher.selection import select_hosts
from launcher.slurm import Srun, hosts_of_allocation, is_in_allocation
from launcher.ssh import Ssh

MACHINES, SERVER, REMOTE = "Machines", "The server", "Other machines, by ssh"
PANELS = (None, EXCHANGE, FAILURES, MACHINES, SERVER, REMOTE)  # in the order of --help


def for_scripts(option: Option) -> Option:
    """Return an option of a config's key as one that only a script needs, for a config has the key itself."""
    return replace(option, help=f"{option.help} (for scripts; default: 0)")


@dataclass(frozen=True)
@overriding(Method)
class TrainingOptions:
    """How the cluster trains. None leaves the value of the config, or the default."""

    @property
    def training(self) -> dict[str, Any]:
        """The values that were given, by the keys of a config."""
        return given(self, options_of(Method))


@dataclass(frozen=True)
class RunOptions(Serving):
    """How a run is kept going, and what is kept of it."""

    resume: Annotated[
        Path | None,
        Option(
            "Go on with the run in this folder, on the same machines unless others are named",
            panel=FAILURES,
            metavar="RUN",
            on_resume="given again",
        ),
    ] = None
    on_worker_failure: Annotated[
        str | None,
        Option(
            "`restart` the worker (default), `continue` without it, or `stop` the run (always so under ssgd)",
            panel=FAILURES,
        ),
    ] = None
    max_restarts: Annotated[
        int, Option("Restarts of each worker and of the server within an hour", panel=FAILURES, min=0)
    ] = 3
    invite: Annotated[
        int,
        Option(
            "Write K invitations for workers that join later by `danaz work --join`", panel=FAILURES, metavar="K", min=0
        ),
    ] = 0
    record: Annotated[bool, RECORD] = False
    server_shards: Annotated[int, SHARDS] = 1

    @property
    def serving(self) -> dict[str, Any]:
        """The values that servers must know, by the names of their settings."""
        return given(self, {*options_of(Serving), "server_shards"})

    @property
    def resumes(self) -> bool:
        """Whether the run goes on with what is in its folder."""
        return self.resume is not None


@dataclass(frozen=True)
class MachineOptions:
    """Which machines, and how they are reached."""

    collective: Annotated[str, Option("Inside a worker: `horovod`, `torch` (torch.distributed), or `auto`")] = "auto"
    hosts: Annotated[
        str | None,
        Option("Machines and their slots, e.g. `a:4,b:4`. Default: localhost", ("--hosts", "-H"), MACHINES),
    ] = None
    hostfile: Annotated[Path | None, Option("Lines of `[user@]host [slots=N] [ssh_port=P]`", panel=MACHINES)] = None
    include: Annotated[str | None, Option("Only these hosts and slots: `a:0,2@b`", panel=MACHINES)] = None
    exclude: Annotated[str | None, Option("Not these hosts and slots: `a:0,2@b`", panel=MACHINES)] = None
    interface: Annotated[
        list[str] | None,
        Option(
            "Network interface to use, of every machine or of one. Default: by route. Repeatable.",
            panel=MACHINES,
            metavar="[HOST=]NIC",
        ),
    ] = None
    launcher: Annotated[
        str | None, Option("`ssh` (even to this machine), `slurm` or `local`. Default: as needed", panel=REMOTE)
    ] = None
    ssh_port: Annotated[
        int | None, Option("Unless the hostfile or ~/.ssh/config says", panel=REMOTE, min=1, max=65535)
    ] = None
    ssh_identity: Annotated[Path | None, Option("Private key, as `ssh -i`", panel=REMOTE, exists=True)] = None
    remote_python: Annotated[str | None, Option("Python there. Default: the same path as here", panel=REMOTE)] = None
    chdir: Annotated[str | None, Option("Working directory of the ranks. Default: this one", panel=REMOTE)] = None

    def find_hosts(self) -> tuple[Host, ...]:
        """Those that were named, else those of the Slurm allocation, else this machine. Raises HostsError."""
        if self.hosts is not None and self.hostfile is not None:
            raise HostsError("--hosts and --hostfile cannot be given together; write all machines in one of them")
        if self.hosts is not None:
            every = parse_hosts(self.hosts)
        elif self.hostfile is not None:
            every = parse_hostfile(self.hostfile)
        else:
            every = hosts_of_allocation() if self._uses_slurm else parse_hosts("localhost")
        return select_hosts(every, self.include, self.exclude)

    @property
    def _uses_slurm(self) -> bool:
        """In a Slurm allocation its machines are meant, unless others were named."""
        if self.launcher is None:
            return not (self.hosts or self.hostfile) and is_in_allocation()
        return self.launcher == "slurm"

    def reach(self, hosts: Sequence[Host]) -> Reach:
        """How the machines are reached. Raises ReachError."""
        if self.launcher not in (None, "ssh", "slurm", "local"):
            raise ReachError(f"--launcher {self.launcher!r} is not known; expected ssh, slurm or local")
        python = self.remote_python or sys.executable
        # Agents do not start in this directory.
        identity = None if self.ssh_identity is None else self.ssh_identity.resolve()
        return Reach(
            transport=Srun(python)
            if self._uses_slurm
            else Ssh(self.ssh_port, identity, python, self.launcher == "ssh", SharedConnections()),
            only_here=self.launcher == "local",
            cwd=self.working_directory,
            interfaces=parse_interfaces(self.interface or (), hosts),
        )

    @property
    def working_directory(self) -> str:
        """The working directory of the ranks on every machine. A `~` is the home directory there."""
        chdir = self.chdir or ""
        return chdir if chdir.startswith("~") else str(Path.cwd() / chdir)


@dataclass(frozen=True)
class LaunchOptions(MachineOptions, RunOptions, TrainingOptions):
    """All options of `danaz launch`."""

    config: Annotated[
        Path | None,
        Option(
            "YAML of an experiment; or put a script of your own after `--`",
            ("CONFIG",),
            argument=True,
            on_resume="fixed",
        ),
    ] = None
    overrides: Annotated[list[str] | None, OVERRIDES] = None
    out: Annotated[Path | None, Option("Run folder. Default: runs/TIME-NAME", on_resume="fixed")] = None
    warmup_epochs: Annotated[float | None, for_scripts(WARMUP_EPOCHS)] = None
    seed: Annotated[int | None, for_scripts(SEED)] = None
    dry_run: Annotated[bool, Option("Print every process and its environment; start none", on_resume="given again")] = (
        False
    )
    workers_per_host: Annotated[
        int, Option("Split each host's slots into this number of workers", panel=MACHINES, min=1)
    ] = 1
    server_host: Annotated[
        str | None,
        Option("Where the server runs, or its shards in turn: `a` or `a,b`. Default: this machine", panel=SERVER),
    ] = None
    server_port: Annotated[int, Option("Port of the server. 0: a free one", panel=SERVER, min=0, max=65535)] = 0
    insecure: Annotated[bool, Option("Let the server believe whoever connects, unencrypted", panel=SERVER)] = False
    variables: Annotated[
        list[str] | None,
        Option(
            "A variable for all ranks. Repeatable.", ("-x",), REMOTE, metavar="NAME[=VALUE]", on_resume="given again"
        ),
    ] = None
    env_file: Annotated[
        Path | None, Option("Variables for all ranks, NAME=VALUE a line", panel=REMOTE, on_resume="given again")
    ] = None

    def reach(self, hosts: Sequence[Host]) -> Reach:
        """How the machines and the server are reached, and what travels to them. Raises ReachError."""
        server, *more_servers = self._servers(hosts)
        return replace(
            super().reach(hosts),
            env=parse_environment(self.variables or (), self.env_file),
            server=server,
            more_servers=more_servers,
            server_port=self.server_port,
            insecure=self.insecure,
        )

    def _servers(self, hosts: Sequence[Host]) -> list[Host]:
        """Each one of the hosts, with its user and ssh port, or any other machine."""
        if self.server_host is None:
            return [Reach().server]
        servers = parse_hosts(self.server_host)
        if any(server.slots is not None for server in servers):
            raise ReachError(f"--server-host {self.server_host}: expected hosts without slots")
        known = {host.name: host for host in hosts}
        return [known.get(server.name, server) for server in servers]

    def kept(self, environment: Collection[str]) -> dict[str, Any]:
        """Return what RUN/launch.yaml holds: the options that a resumed run takes from there.

        Of the environment it holds the names alone.
        """
        values = {key: getattr(self, name) for key, name in keys_of_launch_yaml().items() if key in kept_names()}
        for name in ("hostfile", "ssh_identity"):
            values[name] = None if values[name] is None else str(Path(values[name]).resolve())
        return {**values, "chdir": self.working_directory, "variables": sorted(environment)}

    @staticmethod
    def by_field(values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values of launch.yaml by the names of these fields; an unknown key stays as it is."""
        names = keys_of_launch_yaml()
        return {names.get(key, key): value for key, value in values.items()}


@cache
def keys_of_launch_yaml() -> dict[str, str]:
    """Return key -> field of each option; launch.yaml holds those of ``kept_names``."""
    return {option.key or name: name for name, (_, option) in options_of(LaunchOptions).items()}


@cache
def kept_names() -> frozenset[str]:
    """Return the keys of the options that launch.yaml keeps."""
    options = options_of(LaunchOptions).items()
    return frozenset(option.key or name for name, (_, option) in options if option.on_resume == "may change")


@cache
def fixed_names() -> dict[str, str]:
    """The options that a resumed run cannot change, each with the words for it."""
    options = options_of(LaunchOptions).items()
    return {name: option.words(name) for name, (_, option) in options if option.on_resume == "fixed"}
