"""The `danaz launch` and `danaz doctor` commands."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from danaz.cli import options
from danaz.cli.command import fail, outliving_readers
from danaz.cli.options import machines_option, remote_option

if TYPE_CHECKING:
    from danaz.launch.prepare import Launch
    from launcher.run import Outcome

LARGEST_SEED = 2**63 - 1  # as of a config
FOLDER, CHECKPOINTS = "invitations", "checkpoints"  # within a run folder

survival_option = partial(typer.Option, rich_help_panel="When things fail")


@outliving_readers()
def launch(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML of an experiment; or put a script of your own behind `--`", metavar="[CONFIG]"),
    ] = None,
    algorithm: options.Algorithm = None,
    sync_period: options.SyncPeriod = None,
    wire: options.Wire = None,
    wire_view: options.WireView = None,
    pipeline: options.Pipeline = None,
    overrides: options.Overrides = None,
    out: options.RunFolder = None,
    resume: Annotated[
        Path | None,
        survival_option(
            "--resume",
            metavar="RUN",
            help="Go on with the run in this folder, on the same machines unless others are named",
        ),
    ] = None,
    on_worker_failure: Annotated[
        str | None,
        survival_option(
            "--on-worker-failure",
            help="`restart` the worker (default), `continue` without it, or `stop` the run (always so under ssgd)",
        ),
    ] = None,
    max_restarts: Annotated[
        int, survival_option("--max-restarts", min=0, help="Of each worker and the server, an hour")
    ] = 3,
    checkpoint_seconds: Annotated[
        float, survival_option("--checkpoint-seconds", min=0, help="Between checkpoints; 0: none")
    ] = 30.0,
    refuse_outliers: Annotated[
        bool,
        survival_option(
            "--refuse-outliers", help="Refuse steps far outside the cluster's size, which are otherwise reported"
        ),
    ] = False,
    invite: Annotated[
        int,
        survival_option(
            "--invite",
            min=0,
            metavar="K",
            help="Write K invitations for workers that join later by `danaz work --join`",
        ),
    ] = 0,
    collective: options.Collective = "auto",
    warmup_epochs: Annotated[
        float | None, typer.Option(min=0, help="Epochs over which lr rises from lr/N to lr (scripts; default: none)")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=LARGEST_SEED, help="Seed of sample order (for scripts; configs have their own)"),
    ] = None,
    record: options.Record = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every process and its environment; start none")
    ] = False,
    hosts: options.Hosts = None,
    hostfile: options.Hostfile = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    workers_per_host: Annotated[
        int, machines_option("--workers-per-host", min=1, help="Split each host's slots into so many workers")
    ] = 1,
    server_host: Annotated[
        str | None,
        machines_option(
            "--server-host", help="Where the server runs, or its shards in turn: `a` or `a,b`. Default: this machine"
        ),
    ] = None,
    server_port: Annotated[
        int, machines_option("--server-port", min=0, max=65535, help="Of the server. 0: a free one")
    ] = 0,
    server_shards: Annotated[
        int,
        machines_option(
            "--server-shards",
            min=1,
            metavar="S",
            help="Server processes, each with a slice of the parameters",
        ),
    ] = 1,
    interface: options.Interface = None,
    insecure: Annotated[
        bool, machines_option("--insecure", help="Let the server believe whoever connects, unencrypted")
    ] = False,
    launcher: options.Launcher = None,
    ssh_port: options.SshPort = None,
    ssh_identity: options.SshIdentity = None,
    remote_python: options.RemotePython = None,
    chdir: options.Chdir = None,
    variables: Annotated[
        list[str] | None, remote_option("-x", metavar="NAME[=VALUE]", help="A variable for all ranks. Repeatable.")
    ] = None,
    env_file: Annotated[
        Path | None, remote_option("--env-file", help="Variables for all ranks, NAME=VALUE a line")
    ] = None,
) -> None:
    """Train on real processes: Horovod inside each worker, a ZeroMQ server between them.

    Each host is one worker (its slots are the ranks that share every batch); `--workers-per-host` splits it. So the
    batch size is per worker.

    Examples:

        danaz launch configs/digits.yaml --hosts localhost:4 --workers-per-host 2

        danaz launch configs/digits.yaml --hosts a:4,b:4 --insecure

        danaz launch configs/digits.yaml --hostfile hosts --algorithm ssgd

        danaz launch --hosts localhost:2 --algorithm dana -- python examples/train_digits.py

        danaz launch --resume runs/20260101-120000-digits-dana
    """
    from danaz.launch.options import prepare, prepared

    command: list[str] = ctx.obj
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    named = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    with ExitStack() as held:
        try:
            if dry_run:
                ready, why = prepare(ctx.params, named, command)
            else:
                ready, why = held.enter_context(prepared(ctx.params, named, command))
        except (ValueError, RuntimeError) as error:
            fail(error)
        typer.echo(why)
        for note in ready.notes:
            typer.secho(note, err=True, fg="red" if note.startswith("INSECURE") else "yellow")
        if not dry_run:
            raise typer.Exit(_play(ready))
        typer.echo(ready.plan.describe())


def doctor(
    ctx: typer.Context,
    hosts: options.Hosts = None,
    hostfile: options.Hostfile = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    collective: options.Collective = "auto",
    interface: options.Interface = None,
    launcher: options.Launcher = None,
    ssh_port: options.SshPort = None,
    ssh_identity: options.SshIdentity = None,
    remote_python: options.RemotePython = None,
    chdir: options.Chdir = None,
) -> None:
    """Check that machines are fit to train together: ssh, versions, Horovod, GPUs, the way to this machine, disk.

    Exit code 0: all of them can take part; 1: some cannot, and why is said. `danaz launch` takes the same options, and
    does the essential part of this itself.

    Examples:

        danaz doctor --hosts a:4,b:4

        danaz doctor --hostfile hosts --ssh-identity ~/.ssh/cluster
    """
    from danaz.launch.doctor import examine, show
    from danaz.launch.options import LaunchOptions
    from danaz.worker.group import choose_collective

    try:
        asked = LaunchOptions(**ctx.params)
        chosen = asked.find_hosts()
        wanted, _why = choose_collective(collective)
        reach = asked.reach(chosen)
    except (ValueError, RuntimeError) as error:
        fail(error)
    raise typer.Exit(show(examine(chosen, reach, wanted)))


def _play(ready: Launch) -> int:
    from danaz.compare.tables import print_summary
    from danaz.launch.prepare import execute
    from danaz.run.folder import read_summary
    from danaz.run.lock import RunFolderError

    typer.echo(f"run folder: {ready.run}")
    for invitation in ready.invitations:
        typer.echo(f"invitation: {ready.run / FOLDER / invitation.file_name}")
    try:
        outcome, _ = execute(ready, tell=tell)
    except (RunFolderError, OSError) as error:
        fail(error)
    show_outcome(outcome)
    summary = read_summary(ready.run) if (ready.run / "summary.json").exists() else None
    if summary is not None:
        print_summary(summary, ready.run)
    if summary is not None and summary["complete"]:
        return outcome.exit_code
    lacks = f"{ready.run} has no summary.json" if summary is None else "its last batch was not trained"
    typer.secho(f"the run is incomplete: {lacks}", err=True, fg="red")
    if (ready.run / CHECKPOINTS).is_dir():
        where = " --server-host localhost" if ready.shards_elsewhere else ""  # what they had kept has come here
        typer.echo(f"to go on from its last checkpoint: danaz launch --resume {quote(str(ready.run))}{where}", err=True)
    return outcome.exit_code or 1


def tell(sentence: str) -> None:
    """One event of a run, on the terminal."""
    typer.secho(f"danaz: {sentence}", err=True, fg="yellow")


def show_outcome(outcome: Outcome) -> None:
    """What a run survived, and what it did not."""
    for event in outcome.events:
        tell(event)
    if outcome.failure is not None:
        typer.secho(f"\n{outcome.failure}", err=True, fg="red")
