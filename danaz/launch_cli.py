"""The `danaz launch` and `danaz doctor` commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from danaz.command import fail

if TYPE_CHECKING:
    from danaz.launching import Launch
    from launcher.run import Outcome

RUN, EXCHANGE, SURVIVE, MACHINES, REMOTE = (
    "Run",
    "Exchange with the server",
    "When things fail",
    "Machines",
    "Other machines, by ssh",
)
FOLDER, CHECKPOINTS = "invitations", "checkpoints"  # within a run folder

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
    sync_period: Annotated[
        int | None,
        typer.Option(
            "--sync-period", min=1, metavar="K", rich_help_panel=EXCHANGE, help="Push the sum of K local steps"
        ),
    ] = None,
    wire: Annotated[
        str | None,
        typer.Option("--wire", rich_help_panel=EXCHANGE, help="Send pushes as fp32, bf16, fp16, onebit or topk:SHARE"),
    ] = None,
    wire_view: Annotated[
        str | None, typer.Option("--wire-view", rich_help_panel=EXCHANGE, help="Send views as fp32, bf16 or fp16")
    ] = None,
    pipeline: Annotated[
        bool | None,
        typer.Option(
            "--pipeline/--no-pipeline",
            rich_help_panel=EXCHANGE,
            help="Compute the next batch while the last one is pushed: a lag one higher",
        ),
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
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="RUN",
            rich_help_panel=SURVIVE,
            help="Go on with the run in this folder, on the same machines unless others are named",
        ),
    ] = None,
    on_worker_failure: Annotated[
        str | None,
        typer.Option(
            "--on-worker-failure",
            rich_help_panel=SURVIVE,
            help="`restart` the worker (default), `continue` without it, or `stop` the run (always so under ssgd)",
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option("--max-restarts", min=0, rich_help_panel=SURVIVE, help="Of each worker and the server, an hour"),
    ] = 3,
    checkpoint_seconds: Annotated[
        float,
        typer.Option("--checkpoint-seconds", min=0, rich_help_panel=SURVIVE, help="Between checkpoints; 0: none"),
    ] = 30.0,
    refuse_outliers: Annotated[
        bool,
        typer.Option(
            "--refuse-outliers",
            rich_help_panel=SURVIVE,
            help="Refuse steps far outside the cluster's size, which are otherwise reported",
        ),
    ] = False,
    invite: Annotated[
        int,
        typer.Option(
            "--invite",
            min=0,
            metavar="K",
            rich_help_panel=SURVIVE,
            help="Write K invitations for workers that join later by `danaz work --join`",
        ),
    ] = 0,
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
        typer.Option(
            "--server-host",
            rich_help_panel=MACHINES,
            help="Where the server runs, or its shards in turn: `a` or `a,b`. Default: this machine",
        ),
    ] = None,
    server_port: Annotated[
        int,
        typer.Option("--server-port", min=0, max=65535, rich_help_panel=MACHINES, help="Of the server. 0: a free one"),
    ] = 0,
    server_shards: Annotated[
        int,
        typer.Option(
            "--server-shards",
            min=1,
            metavar="S",
            rich_help_panel=MACHINES,
            help="Server processes, each with a slice of the parameters",
        ),
    ] = 1,
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

        danaz launch --resume runs/20260101-120000-digits-dana
    """
    from danaz.launch_options import prepare

    command: list[str] = ctx.obj
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    named = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    try:
        ready, why = prepare(ctx.params, named, command)
    except (ValueError, RuntimeError) as error:
        fail(error)
    typer.echo(why)
    for note in ready.notes:
        typer.secho(note, err=True, fg="red" if note.startswith("INSECURE") else "yellow")
    if dry_run:
        typer.echo(ready.plan.describe())
        return
    raise typer.Exit(_play(ready))


def doctor(
    ctx: typer.Context,
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
    from danaz.launch_options import LaunchOptions
    from danaz.worker.group import choose_collective

    try:
        options = LaunchOptions(**ctx.params)
        chosen = options.find_hosts()
        wanted, _why = choose_collective(collective)
        reach = options.reach(chosen)
    except (ValueError, RuntimeError) as error:
        fail(error)
    raise typer.Exit(show(examine(chosen, reach, wanted)))


def _play(ready: Launch) -> int:
    from danaz.launching import execute
    from danaz.report.tables import print_summary

    typer.echo(f"run folder: {ready.run}")
    for invitation in ready.invitations:
        typer.echo(f"invitation: {ready.run / FOLDER / invitation.file_name}")
    outcome, summary = execute(ready, tell=tell)
    show_outcome(outcome)
    if summary is not None:
        print_summary(summary, ready.run)
    elif outcome.exit_code == 0:
        typer.secho("nothing was trained: the command never iterated over danaz.shard(…)", err=True, fg="yellow")
    elif (ready.run / CHECKPOINTS).is_dir():
        typer.echo(f"to go on from its last checkpoint: danaz launch --resume {ready.run}", err=True)
    return outcome.exit_code


def tell(sentence: str) -> None:
    """One event of a run, on the terminal."""
    typer.secho(f"danaz: {sentence}", err=True, fg="yellow")


def show_outcome(outcome: Outcome) -> None:
    """What a run survived, and what it did not."""
    for event in outcome.events:
        tell(event)
    if outcome.failure is not None:
        typer.secho(f"\n{outcome.failure}", err=True, fg="red")
