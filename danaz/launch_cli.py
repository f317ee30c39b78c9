"""The `danaz launch` and `danaz doctor` commands."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from danaz.command import fail

if TYPE_CHECKING:
    from danaz.config import Config
    from danaz.launching import Cluster, Launch
    from danaz.reach import Reach
    from danaz.settings import Settings
    from launcher.hosts import Host
    from launcher.slurm import Srun
    from launcher.ssh import Ssh

RUN, MACHINES, REMOTE = "Run", "Machines", "Other machines, by ssh"

CollectiveOption = Annotated[
    str,
    typer.Option(
        "--collective", rich_help_panel=RUN, help="Inside a worker: `horovod`, `torch` (torch.distributed), or `auto`"
    ),
]
HostsOption = Annotated[
    str | None,
    typer.Option(
        "--hosts", "-H", rich_help_panel=MACHINES, help="Machines and their slots, e.g. `a:4,b:4`. Default: localhost"
    ),
]
HostfileOption = Annotated[
    Path | None,
    typer.Option("--hostfile", rich_help_panel=MACHINES, help="Lines of `[user@]host [slots=N] [ssh_port=P]`"),
]
IncludeOption = Annotated[
    str | None, typer.Option("--include", rich_help_panel=MACHINES, help="Only these hosts and slots: `a:0,2@b`")
]
ExcludeOption = Annotated[
    str | None, typer.Option("--exclude", rich_help_panel=MACHINES, help="Not these hosts and slots: `a:0,2@b`")
]
InterfaceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--interface",
        rich_help_panel=MACHINES,
        metavar="[HOST=]NIC",
        help="Network interface to use, of every machine or of one. Default: by route. Repeatable.",
    ),
]
LauncherOption = Annotated[
    str | None,
    typer.Option(
        "--launcher",
        rich_help_panel=REMOTE,
        help="`ssh` (even to this machine), `slurm` or `local`. Default: as needed",
    ),
]
PortOption = Annotated[
    int | None,
    typer.Option(
        "--ssh-port", min=1, max=65535, rich_help_panel=REMOTE, help="Unless the hostfile or ~/.ssh/config says"
    ),
]
IdentityOption = Annotated[
    Path | None, typer.Option("--ssh-identity", exists=True, rich_help_panel=REMOTE, help="Private key, as `ssh -i`")
]
PythonOption = Annotated[
    str | None,
    typer.Option("--remote-python", rich_help_panel=REMOTE, help="Python there. Default: the same path as here"),
]
ChdirOption = Annotated[
    str | None,
    typer.Option("--chdir", rich_help_panel=REMOTE, help="Working directory of the ranks. Default: this one"),
]
VariableOption = Annotated[
    list[str] | None,
    typer.Option("-x", rich_help_panel=REMOTE, metavar="NAME[=VALUE]", help="A variable for all ranks. Repeatable."),
]
EnvFileOption = Annotated[
    Path | None, typer.Option("--env-file", rich_help_panel=REMOTE, help="Variables for all ranks, NAME=VALUE a line")
]


def launch(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML of an experiment; or put a script of your own behind `--`", metavar="[CONFIG]"),
    ] = None,
    algorithm: Annotated[
        str | None, typer.Option("--algorithm", "-a", help="Update rule: dana, nag-asgd, ssgd, …", rich_help_panel=RUN)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            rich_help_panel=RUN,
            help="Override a key of the config, e.g. `--set lr=0.05`. Repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder. Default: runs/TIME-NAME", rich_help_panel=RUN)
    ] = None,
    collective: CollectiveOption = "auto",
    warmup_epochs: Annotated[
        float | None,
        typer.Option(min=0, help="Epochs over which lr rises from lr/N (default 5; for scripts)", rich_help_panel=RUN),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Seed of sample order (for scripts; configs have their own)", rich_help_panel=RUN),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep every message for `danaz replay`", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every process and its environment; start none", rich_help_panel=RUN)
    ] = False,
    hosts: HostsOption = None,
    hostfile: HostfileOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    workers_per_host: Annotated[
        int,
        typer.Option(
            "--workers-per-host", min=1, help="Split each host's slots into so many workers", rich_help_panel=MACHINES
        ),
    ] = 1,
    server_host: Annotated[
        str | None,
        typer.Option("--server-host", rich_help_panel=MACHINES, help="Where the server runs. Default: this machine"),
    ] = None,
    server_port: Annotated[
        int,
        typer.Option("--server-port", min=0, max=65535, rich_help_panel=MACHINES, help="Of the server. 0: a free one"),
    ] = 0,
    interface: InterfaceOption = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", rich_help_panel=MACHINES, help="Let the server listen to the network unencrypted"),
    ] = False,
    launcher: LauncherOption = None,
    ssh_port: PortOption = None,
    ssh_identity: IdentityOption = None,
    remote_python: PythonOption = None,
    chdir: ChdirOption = None,
    variables: VariableOption = None,
    env_file: EnvFileOption = None,
) -> None:
    """Train on real processes: Horovod inside each worker, a ZeroMQ server between them.

    Each host is one worker (its slots are the ranks that share every batch); `--workers-per-host` splits it.

    Examples:

        danaz launch configs/digits.yaml --hosts localhost:4 --workers-per-host 2

        danaz launch configs/digits.yaml --hosts a:4,b:4 --insecure

        danaz launch configs/digits.yaml --hostfile hosts --algorithm ssgd

        danaz launch --hosts localhost:2 --algorithm dana -- python examples/train_digits.py
    """
    from danaz.launching import LaunchError, prepare_config, prepare_script
    from danaz.reach import parse_environment

    command: list[str] = ctx.obj
    if (config is None) == (not command):
        fail("give either a CONFIG or, behind --, a command such as: -- python train.py")
    try:
        launcher = _launcher(launcher, hosts or hostfile)
        chosen = _hosts(hosts, hostfile, include, exclude, launcher)
        transport = _transport(launcher, ssh_port, ssh_identity, remote_python)
        reach = _reach(chosen, launcher, transport, chdir, interface, parse_environment(variables or (), env_file))
        reach = _with_server(reach, chosen, server_host, server_port, insecure)
        cluster = _cluster(chosen, workers_per_host, collective, reach)
        if config is not None:
            if warmup_epochs is not None or seed is not None:
                raise LaunchError("a config sets these itself: use --set lr_schedule.warmup_epochs=… and --set seed=…")
            ready = prepare_config(_load(config, overrides, algorithm), cluster, out, record)
        else:
            if overrides:
                raise LaunchError("--set changes a config, and a script has none; pass its own arguments behind --")
            ready = prepare_script(command, _script_settings(algorithm, warmup_epochs, seed), cluster, out, record)
    except (ValueError, RuntimeError) as error:
        fail(error)
    for note in ready.notes:
        typer.secho(note, err=True, fg="red" if note.startswith("INSECURE") else "yellow")
    if dry_run:
        typer.echo(ready.plan.describe())
        return
    raise typer.Exit(_play(ready))


def doctor(
    hosts: HostsOption = None,
    hostfile: HostfileOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    collective: CollectiveOption = "auto",
    interface: InterfaceOption = None,
    launcher: LauncherOption = None,
    ssh_port: PortOption = None,
    ssh_identity: IdentityOption = None,
    remote_python: PythonOption = None,
    chdir: ChdirOption = None,
) -> None:
    """Check that machines are fit to train together: ssh, versions, Horovod, GPUs, the way to this machine, disk.

    Exit code 0: all of them can take part; 1: some cannot, and why is said. `danaz launch` takes the same options, and
    does the essential part of this itself.

    Examples:

        danaz doctor --hosts a:4,b:4

        danaz doctor --hostfile hosts --ssh-identity ~/.ssh/cluster
    """
    from danaz.doctor import examine, show
    from danaz.worker.group import choose_collective

    try:
        launcher = _launcher(launcher, hosts or hostfile)
        chosen = _hosts(hosts, hostfile, include, exclude, launcher)
        transport = _transport(launcher, ssh_port, ssh_identity, remote_python)
        reach = _reach(chosen, launcher, transport, chdir, interface)
        wanted, _why = choose_collective(collective)
    except (ValueError, RuntimeError) as error:
        fail(error)
    raise typer.Exit(show(examine(chosen, reach, wanted)))


def _play(ready: Launch) -> int:
    from danaz.launching import execute
    from danaz.report.tables import print_summary

    typer.echo(f"run folder: {ready.run}")
    outcome, summary = execute(ready)
    if outcome.failure is not None:
        typer.secho(f"\n{outcome.failure}", err=True, fg="red")
    if summary is not None:
        print_summary(summary, ready.run)
    elif outcome.exit_code == 0:
        typer.secho("nothing was trained: the command never iterated over danaz.shard(…)", err=True, fg="yellow")
    return outcome.exit_code


def _load(path: Path, overrides: list[str] | None, algorithm: str | None) -> Config:
    from danaz.config import load_config

    return load_config(path, [*(overrides or ()), *([f"algorithm={algorithm}"] if algorithm else [])])


def _hosts(
    hosts: str | None, hostfile: Path | None, include: str | None, exclude: str | None, launcher: str | None
) -> tuple[Host, ...]:
    """Those that were named, else those of the Slurm allocation, else this machine."""
    from launcher.hosts import HostsError, parse_hostfile, parse_hosts
    from launcher.selection import select_hosts
    from launcher.slurm import hosts_of_allocation

    if hosts is not None and hostfile is not None:
        raise HostsError("--hosts and --hostfile cannot be given together; write all machines in one of them")
    if hosts is not None:
        every = parse_hosts(hosts)
    elif hostfile is not None:
        every = parse_hostfile(hostfile)
    else:
        every = hosts_of_allocation() if launcher == "slurm" else parse_hosts("localhost")
    return select_hosts(every, include, exclude)


def _launcher(wanted: str | None, named: object) -> str | None:
    """In a Slurm allocation its machines are meant, unless others were named."""
    from danaz.reach import ReachError
    from launcher.slurm import is_in_allocation

    if wanted not in (None, "ssh", "slurm", "local"):
        raise ReachError(f"--launcher {wanted!r} is not known; expected ssh, slurm or local")
    return "slurm" if wanted is None and not named and is_in_allocation() else wanted


def _transport(launcher: str | None, port: int | None, identity: Path | None, python: str | None) -> Ssh | Srun:
    from launcher.slurm import Srun
    from launcher.ssh import Ssh

    if launcher == "slurm":
        return Srun(python or sys.executable)
    # Agents do not start in this directory.
    identity = None if identity is None else identity.resolve()
    return Ssh(port, identity, python or sys.executable, always=launcher == "ssh")


def _reach(
    hosts: tuple[Host, ...],
    launcher: str | None,
    transport: Ssh | Srun,
    chdir: str | None,
    interface: list[str] | None,
    env: Mapping[str, str] | None = None,
) -> Reach:
    from danaz.reach import Reach, parse_interfaces

    return Reach(
        transport=transport,
        only_here=launcher == "local",
        cwd=chdir or str(Path.cwd()),
        env=env or {},
        interfaces=parse_interfaces(interface or (), hosts),
    )


def _with_server(reach: Reach, hosts: tuple[Host, ...], name: str | None, port: int, insecure: bool) -> Reach:
    """The server runs on one of the hosts, with its user and ssh port, or on any other machine."""
    from dataclasses import replace

    from danaz.reach import ReachError
    from launcher.hosts import parse_hosts

    server = reach.server
    if name is not None:
        [server, *more] = parse_hosts(name)
        if more or server.slots is not None:
            raise ReachError(f"--server-host {name}: expected one host, without slots")
        server = next((host for host in hosts if host.name == server.name), server)
    return replace(reach, server=server, server_port=port, insecure=insecure)


def _cluster(hosts: tuple[Host, ...], workers_per_host: int, collective: str, reach: Reach) -> Cluster:
    from danaz.launching import Cluster
    from danaz.worker.group import choose_collective

    chosen, why = choose_collective(collective)
    typer.echo(why)
    return Cluster(hosts, workers_per_host, chosen, reach)


def _script_settings(algorithm: str | None, warmup_epochs: float | None, seed: int | None) -> Settings:
    from danaz.settings import Settings

    return Settings(
        algorithm=algorithm or "dana",
        warmup_epochs=5.0 if warmup_epochs is None else warmup_epochs,
        seed=seed or 0,
    )
