"""The options of `danaz launch` and `danaz doctor`, and what follows from their values."""

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
    HYPERPARAMETER,
    OVERRIDES,
    RECORD,
    SEED,
    SERVER,
    WARMUP_EPOCHS,
    Method,
    Servers,
)
from launcher.connections import SharedConnections
from launcher.hosts import Host, HostsError, parse_hostfile, parse_hosts
from launcher.selection import select_hosts
from launcher.slurm import Srun, hosts_of_allocation, is_in_allocation
from launcher.ssh import Ssh
from launcher.supervisor import Policy

MACHINES, REMOTE = "Machines", "Other machines, by ssh"
PANELS = (None, EXCHANGE, FAILURES, MACHINES, SERVER, REMOTE)  # in the order of --help


def for_scripts(option: Option) -> Option:
    """Return the option of a config's key as an option for scripts, which have no config."""
    return replace(option, help=f"{option.help}. Only for scripts: a config has this key. Default: 0")


@dataclass(frozen=True)
@overriding(Method)
class TrainingOptions:
    """How the cluster trains. None leaves the value of the config, or the default."""

    @property
    def training(self) -> dict[str, Any]:
        """The values that the user has given, by the keys of a config."""
        return given(self, options_of(Method))


@dataclass(frozen=True)
class RunOptions(Servers):
    """How a run continues after failures, and what it records."""

    resume: Annotated[
        Path | None,
        Option(
            "Continue the run in this folder, on the same machines unless you name others",
            panel=FAILURES,
            metavar="RUN",
            on_resume="given again",
        ),
    ] = None
    on_worker_failure: Annotated[
        str | None,
        Option(
            "When a worker fails: `restart` it (default), `continue` without it, or `stop` the run (ssgd always stops)",
            panel=FAILURES,
        ),
    ] = None
    max_restarts: Annotated[
        int, Option("Times that each worker and the server may be restarted within an hour", panel=FAILURES, min=0)
    ] = Policy.max_restarts
    invite: Annotated[
        int,
        Option(
            "Write K invitations, with which workers join later by `danaz work --join`",
            panel=FAILURES,
            metavar="K",
            min=0,
        ),
    ] = 0
    record: Annotated[bool, RECORD] = False

    @property
    def serving(self) -> dict[str, Any]:
        """The values that servers must know, by the names of their settings."""
        return given(self, options_of(Servers))

    @property
    def resumes(self) -> bool:
        """Whether the run continues what is in its folder."""
        return self.resume is not None


@dataclass(frozen=True)
class MachineOptions:
    """Which machines take part, and how to reach them."""

    collective: Annotated[
        str, Option("What averages inside a worker: `horovod`, `torch` (torch.distributed), or `auto`")
    ] = "auto"
    hosts: Annotated[
        str | None,
        Option("Machines and the ranks on each, e.g. `a:4,b:4`. Default: localhost", ("--hosts", "-H"), MACHINES),
    ] = None
    hostfile: Annotated[
        Path | None, Option("File with a line `[user@]host [slots=N] [ssh_port=P]` for each machine", panel=MACHINES)
    ] = None
    include: Annotated[str | None, Option("Use only these hosts and slots, e.g. `a:0,2@b`", panel=MACHINES)] = None
    exclude: Annotated[str | None, Option("Leave out these hosts and slots, e.g. `a:0,2@b`", panel=MACHINES)] = None
    interface: Annotated[
        list[str] | None,
        Option(
            "Network interface of every machine, or of HOST. Default: by route. Repeatable",
            panel=MACHINES,
            metavar="[HOST=]NIC",
        ),
    ] = None
    launcher: Annotated[
        str | None,
        Option("How processes are started: `ssh` (even here), `slurm` or `local`. Default: as needed", panel=REMOTE),
    ] = None
    ssh_port: Annotated[
        int | None, Option("Port of sshd. Default: as in the hostfile or ~/.ssh/config", panel=REMOTE, min=1, max=65535)
    ] = None
    ssh_identity: Annotated[
        Path | None, Option("File of the private key, as for `ssh -i`", panel=REMOTE, exists=True)
    ] = None
    remote_python: Annotated[str | None, Option("Path of Python on other machines. Default: as here", panel=REMOTE)] = (
        None
    )
    chdir: Annotated[str | None, Option("Working directory of the ranks. Default: this one", panel=REMOTE)] = None

    def find_hosts(self) -> tuple[Host, ...]:
        """Return the hosts that were named, else those of the Slurm allocation, else this machine.

        Raises HostsError.
        """
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
        """Whether Slurm starts the processes: on request, or inside an allocation unless hosts were named."""
        if self.launcher is None:
            return not (self.hosts or self.hostfile) and is_in_allocation()
        return self.launcher == "slurm"

    def reach(self, hosts: Sequence[Host]) -> Reach:
        """Return how the machines are reached. Raises ReachError."""
        if self.launcher not in (None, "ssh", "slurm", "local"):
            raise ReachError(f"--launcher {self.launcher!r} is not known; expected ssh, slurm or local")
        python = self.remote_python or sys.executable
        # A relative path would fail: agents start in another directory.
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
        """The working directory of the ranks on every machine. A `~` is the home directory of that machine."""
        chdir = self.chdir or ""
        return chdir if chdir.startswith("~") else str(Path.cwd() / chdir)


@dataclass(frozen=True)
class LaunchOptions(MachineOptions, RunOptions, TrainingOptions):
    """All options of `danaz launch`."""

    config: Annotated[
        Path | None,
        Option(
            "YAML of an experiment. For a script of your own, write its command after `--` instead",
            ("CONFIG",),
            argument=True,
            on_resume="fixed",
        ),
    ] = None
    overrides: Annotated[list[str] | None, OVERRIDES] = None
    hyperparameter: Annotated[list[str] | None, HYPERPARAMETER] = None
    out: Annotated[Path | None, Option("Run folder. Default: runs/TIME-NAME", on_resume="fixed")] = None
    warmup_epochs: Annotated[float | None, for_scripts(WARMUP_EPOCHS)] = None
    seed: Annotated[int | None, for_scripts(SEED)] = None
    dry_run: Annotated[
        bool, Option("Print every process and its environment, and start none", on_resume="given again")
    ] = False
    workers_per_host: Annotated[
        int, Option("Number of workers that share the slots of a host", panel=MACHINES, min=1)
    ] = 1
    server_host: Annotated[
        str | None,
        Option("Host of the server, or hosts of its shards in turn: `a` or `a,b`. Default: this machine", panel=SERVER),
    ] = None
    server_port: Annotated[int, Option("Port of the server; 0: any free port", panel=SERVER, min=0, max=65535)] = 0
    insecure: Annotated[
        bool, Option("Use no keys: the server believes whoever connects, and nothing is encrypted", panel=SERVER)
    ] = False
    variables: Annotated[
        list[str] | None,
        Option(
            "Environment variable for all ranks. Repeatable",
            ("-x",),
            REMOTE,
            metavar="NAME[=VALUE]",
            on_resume="given again",
        ),
    ] = None
    env_file: Annotated[
        Path | None,
        Option("File of such variables, with NAME=VALUE on each line", panel=REMOTE, on_resume="given again"),
    ] = None

    def reach(self, hosts: Sequence[Host]) -> Reach:
        """Return how the machines and the server are reached, and which variables they get. Raises ReachError."""
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
        """Return the machines of the shards. One that is among ``hosts`` keeps its user and ssh port."""
        if self.server_host is None:
            return [Reach().server]
        servers = parse_hosts(self.server_host)
        if any(server.slots is not None for server in servers):
            raise ReachError(f"--server-host {self.server_host}: expected hosts without slots")
        known = {host.name: host for host in hosts}
        return [known.get(server.name, server) for server in servers]

    def kept(self, environment: Collection[str]) -> dict[str, Any]:
        """Return what RUN/launch.yaml holds: the options that a resumed run takes from there.

        It keeps only the names of environment variables, and not their values.
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
    """Return field -> words for each option that a resumed run cannot change."""
    options = options_of(LaunchOptions).items()
    return {name: option.words(name) for name, (_, option) in options if option.on_resume == "fixed"}
