"""The `danaz launch` and `danaz doctor` commands."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from danaz.cli.command import fail, outliving_readers
from danaz.cli.options import expanded
from danaz.launch.options import LaunchOptions, MachineOptions

if TYPE_CHECKING:
    from danaz.launch.prepare import Launch
    from launcher.run import Outcome

FOLDER, CHECKPOINTS = "invitations", "checkpoints"  # within a run folder


@expanded
@outliving_readers()
def launch(ctx: typer.Context, asked: LaunchOptions) -> None:
    """Train on one or more machines: Horovod joins the ranks of a worker, and a server joins the workers.

    Each host is one worker, and its slots are the ranks that share every batch, so the batch size is per worker.
    `--workers-per-host` makes several workers of a host.

    Examples:

        danaz launch configs/digits.yaml --hosts localhost:4 --workers-per-host 2

        danaz launch configs/digits.yaml --hosts a:4,b:4 --insecure

        danaz launch configs/digits.yaml --hostfile hosts --algorithm ssgd

        danaz launch --hosts localhost:2 --algorithm dana -- python examples/train_digits.py

        danaz launch --resume runs/20260101-120000-digits-dana
    """
    from danaz.launch.begin import prepare, prepared

    command: list[str] = ctx.obj
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    named = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    with ExitStack() as held:
        try:
            if asked.dry_run:
                ready, why = prepare(asked, named, command)
            else:
                ready, why = held.enter_context(prepared(asked, named, command))
        except (ValueError, RuntimeError) as error:
            fail(error)
        typer.echo(why)
        for note in ready.notes:
            typer.secho(note, err=True, fg="red" if note.startswith("INSECURE") else "yellow")
        if not asked.dry_run:
            raise typer.Exit(_play(ready))
        typer.echo(ready.plan.describe())


@expanded
def doctor(asked: MachineOptions) -> None:
    """Check that machines can train together: ssh, versions, Horovod, GPUs, the network to this machine, disk space.

    The exit code is 0 if all of them can take part, and 1 if some cannot; the output says why. `danaz launch` takes the
    same options, and makes the essential checks itself.

    Examples:

        danaz doctor --hosts a:4,b:4

        danaz doctor --hostfile hosts --ssh-identity ~/.ssh/cluster
    """
    from danaz.launch.doctor import examine, show
    from danaz.worker.group import choose_collective

    try:
        chosen = asked.find_hosts()
        wanted, _why = choose_collective(asked.collective)
        reach = asked.reach(chosen)
    except (ValueError, RuntimeError) as error:
        fail(error)
    raise typer.Exit(show(examine(chosen, reach, wanted)))


def _play(ready: Launch) -> int:
    from danaz.cli.output import print_summary
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
    show_events(outcome)
    summary = read_summary(ready.run) if (ready.run / "summary.json").exists() else None
    if summary is not None:
        print_summary(summary, ready.run)
    if summary is None or not summary["complete"]:
        _say_that_it_is_incomplete(ready, summary)
    show_failure(outcome)
    return outcome.exit_code or int(summary is None or not summary["complete"])


def _say_that_it_is_incomplete(ready: Launch, summary: dict[str, Any] | None) -> None:
    lacks = f"{ready.run} has no summary.json" if summary is None else "its last batch was not trained"
    typer.secho(f"the run is incomplete: {lacks}", err=True, fg="red")
    if (ready.run / CHECKPOINTS).is_dir():
        where = " --server-host localhost" if ready.shards_elsewhere else ""  # their checkpoints have been fetched
        typer.echo(f"to go on from its last checkpoint: danaz launch --resume {quote(str(ready.run))}{where}", err=True)


def tell(sentence: str) -> None:
    """Print one event of a run on the terminal."""
    typer.secho(f"danaz: {sentence}", err=True, fg="yellow")


def show_events(outcome: Outcome) -> None:
    """Print the failures that a run survived."""
    for event in outcome.events:
        tell(event)


def show_failure(outcome: Outcome) -> None:
    """Print the failure that ended a run. It comes last, so that the traceback of a script's error is what one sees."""
    if outcome.failure is not None:
        sys.stdout.flush()  # the table before it
        typer.secho(f"\n{outcome.failure}", err=True, fg="red")
