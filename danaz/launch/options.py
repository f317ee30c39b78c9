"""The options of `danaz launch` as one value, and the run that they ask for."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from danaz.launch.prepare import Cluster, Launch, LaunchError, Manner, name_of, prepare_config, prepare_script
from danaz.launch.reach import Reach, ReachError, parse_environment, parse_interfaces
from danaz.launch.resume import (
    FIXED,
    OPTIONS,
    check_all_there,
    check_begun,
    check_checkpoints,
    check_variables,
    checked,
    merge_options,
    read_options,
    read_settings,
)
from danaz.run.config import Config, load_config
from danaz.run.lock import claimed_run_folder, free_run_folder, locked_run_folder
from danaz.run.settings import Settings
from danaz.worker.group import choose_collective
from launcher.connections import SharedConnections
from launcher.hosts import Host, HostsError, parse_hostfile, parse_hosts
from launcher.selection import select_hosts
from launcher.slurm import Srun, hosts_of_allocation, is_in_allocation
from launcher.ssh import Ssh
from launcher.supervisor import OnFailure

NOT_KEPT = {*FIXED, "resume", "dry_run", "variables", "env_file"}
TRAINING = ("algorithm", "sync_period", "wire", "wire_view", "pipeline")
ON_FAILURE = ("continue", "stop", "restart")


@dataclass(frozen=True)
class LaunchOptions:
    """By the names of `danaz launch`'s parameters; None where nothing was said."""

    config: Path | None = None
    algorithm: str | None = None
    sync_period: int | None = None
    wire: str | None = None
    wire_view: str | None = None
    pipeline: bool | None = None
    overrides: Sequence[str] | None = None
    out: Path | None = None
    resume: Path | None = None
    collective: str = "auto"
    warmup_epochs: float | None = None
    seed: int | None = None
    record: bool = False
    dry_run: bool = False
    on_worker_failure: str | None = None
    max_restarts: int = 3
    checkpoint_seconds: float = 30.0
    refuse_outliers: bool = False
    invite: int = 0
    hosts: str | None = None
    hostfile: Path | None = None
    include: str | None = None
    exclude: str | None = None
    workers_per_host: int = 1
    server_host: str | None = None
    server_port: int = 0
    server_shards: int = 1
    interface: Sequence[str] | None = None
    insecure: bool = False
    launcher: str | None = None
    ssh_port: int | None = None
    ssh_identity: Path | None = None
    remote_python: str | None = None
    chdir: str | None = None
    variables: Sequence[str] | None = None
    env_file: Path | None = None

    @property
    def training(self) -> dict[str, Any]:
        """What was said of how the cluster trains, by the keys of a config, whose script or config that ever is."""
        values = {name: getattr(self, name) for name in TRAINING}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def manner(self) -> Manner:
        if self.on_worker_failure not in (None, *ON_FAILURE):
            raise LaunchError(f"--on-worker-failure {self.on_worker_failure}: expected {', '.join(ON_FAILURE)}")
        return Manner(
            self.record,
            self.checkpoint_seconds,
            self.refuse_outliers,
            cast("OnFailure | None", self.on_worker_failure),
            self.max_restarts,
            self.invite,
            resumes=self.resume is not None,
            server_shards=self.server_shards,
        )

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
        server, *more_servers = self._servers(hosts)
        # Agents do not start in this directory.
        identity = None if self.ssh_identity is None else self.ssh_identity.resolve()
        return Reach(
            transport=Srun(python)
            if self._uses_slurm
            else Ssh(self.ssh_port, identity, python, self.launcher == "ssh", SharedConnections()),
            only_here=self.launcher == "local",
            cwd=self.working_directory,
            env=parse_environment(self.variables or (), self.env_file),
            interfaces=parse_interfaces(self.interface or (), hosts),
            server=server,
            more_servers=more_servers,
            server_port=self.server_port,
            insecure=self.insecure,
        )

    @property
    def working_directory(self) -> str:
        """Of the ranks, on every machine. A `~` is the home directory there."""
        chdir = self.chdir or ""
        return chdir if chdir.startswith("~") else str(Path.cwd() / chdir)

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
        """What RUN/launch.yaml holds: all that can be asked for again, and of the environment the names alone."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in NOT_KEPT}
        for name in ("hostfile", "ssh_identity"):
            values[name] = None if values[name] is None else str(Path(values[name]).resolve())
        return {**values, "chdir": self.working_directory, "variables": sorted(environment)}


def prepare(params: Mapping[str, Any], named: Collection[str], command: Sequence[str]) -> tuple[Launch, str]:
    """The run that the options ask for, and which collective was chosen, and why. Nothing is written or claimed.

    ``named`` are the options that stand on the command line. Raises ValueError or RuntimeError with what is wrong.
    """
    options = LaunchOptions(**params)
    if options.resume is not None:
        return _prepare_resumed(options, named, command)
    task = _task(options, command)
    return _ready(options, task, command, free_run_folder(options.out, name_of(task, command)))


@contextmanager
def prepared(params: Mapping[str, Any], named: Collection[str], command: Sequence[str]) -> Iterator[tuple[Launch, str]]:
    """As ``prepare``; as long as the block lasts, the folder of the run belongs to this process alone."""
    options = LaunchOptions(**params)
    if options.resume is not None:
        check_begun(options.resume)
        with locked_run_folder(options.resume):
            yield _prepare_resumed(options, named, command)
        return
    task = _task(options, command)
    with claimed_run_folder(options.out, name_of(task, command)) as run:
        yield _ready(options, task, command, run)


def _task(options: LaunchOptions, command: Sequence[str]) -> Config | Settings:
    """What a new run trains: a config, or the settings of a script."""
    if (options.config is None) == (not command):
        raise LaunchError("give either a CONFIG or, after --, a command such as: -- python train.py")
    if options.config is not None:
        if options.warmup_epochs is not None or options.seed is not None:
            raise LaunchError("a config sets these itself: use --set lr_schedule.warmup_epochs=… and --set seed=…")
        return load_config(options.config, options.overrides or (), options.training)
    if options.overrides:
        raise LaunchError("--set changes a config, and a script has none; pass its own arguments after --")
    training = {"algorithm": "dana", **options.training}
    return Settings(**training, warmup_epochs=options.warmup_epochs or 0.0, seed=options.seed or 0)


def _prepare_resumed(options: LaunchOptions, named: Collection[str], command: Sequence[str]) -> tuple[Launch, str]:
    run = options.resume
    assert run is not None
    if command:
        raise LaunchError("--resume goes on with what the run began; leave out the command after --")
    given = {field.name: getattr(options, field.name) for field in fields(options)}
    values = read_options(run)
    kept = checked(run / OPTIONS, LaunchOptions, values)
    check_all_there(run / OPTIONS, values, [field.name for field in fields(options) if field.name not in NOT_KEPT])
    merged = merge_options(run, given, [name for name in named if name != "resume"])
    merged |= {name: given[name] for name in ("variables", "env_file")}
    check_variables(kept.variables or (), parse_environment(options.variables or (), options.env_file))
    paths = {name: merged[name] and Path(merged[name]) for name in ("hostfile", "ssh_identity")}
    task, kept_command = read_settings(run)
    ready, why = _ready(LaunchOptions(**{**merged, **paths, "resume": run}), task, kept_command or [], run)
    check_checkpoints(run, kept.server_host, merged["server_host"], ready.shards_elsewhere)
    return ready, why


def _ready(options: LaunchOptions, task: Config | Settings, command: Sequence[str], run: Path) -> tuple[Launch, str]:
    hosts = options.find_hosts()
    reach = options.reach(hosts)
    collective, why = choose_collective(options.collective)
    cluster = Cluster(hosts, options.workers_per_host, collective, reach)
    if isinstance(task, Config):
        ready = prepare_config(task, cluster, run, options.manner)
    else:
        ready = prepare_script(command, task, cluster, run, options.manner)
    return replace(ready, options=options.kept(reach.env)), why
