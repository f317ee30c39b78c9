"""The ``danaz`` command: arguments in, work done elsewhere, words and exit codes out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from danaz.compare.cli import compare
from danaz.horovod_install.cli import app as horovod_app
from danaz.simulate.cli import simulate, speedup

if TYPE_CHECKING:
    from danaz.config import Config
    from danaz.launching import Cluster
    from danaz.settings import Settings

# Each command imports what it needs when it runs: torch takes seconds, and --help should not.

app = typer.Typer(
    name="danaz",
    help="Cluster training for PyTorch: synchronous Horovod inside a machine, asynchronous DANA between machines.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(horovod_app, name="horovod")
app.command()(simulate)
app.command()(speedup)
app.command()(compare)

ConfigFile = Annotated[
    Path, typer.Argument(help="YAML of an experiment, such as configs/digits.yaml", metavar="CONFIG")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the config, e.g. `--set lr=0.05`. Repeatable."),
]
AlgorithmName = Annotated[str | None, typer.Option("--algorithm", "-a", help="Update rule: dana, nag-asgd, ssgd, …")]
OutFolder = Annotated[Path | None, typer.Option("--out", help="Run folder. Default: runs/<time>-<name>")]
HostsOption = Annotated[str, typer.Option("--hosts", "-H", help="Machines and their slots, e.g. `a:4,b:4`")]
WorkersPerHost = Annotated[
    int, typer.Option("--workers-per-host", min=1, help="Split each host's slots into so many workers")
]
CollectiveOption = Annotated[
    str, typer.Option("--collective", help="Inside a worker: `horovod`, `torch` (torch.distributed), or `auto`")
]


def main() -> None:
    """Entry point. What stands behind ``--`` is the user's own command, and no business of the option parser."""
    words, command = sys.argv[1:], []
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    try:
        app(args=words, obj=command)
    except KeyboardInterrupt:
        sys.exit(130)


def fail(error: object, code: int = 2) -> NoReturn:
    typer.secho(f"danaz: {error}", err=True, fg="red")
    raise typer.Exit(code)


@app.command()
def launch(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(help="YAML of an experiment; or put a script of your own behind `--`", metavar="[CONFIG]"),
    ] = None,
    hosts: HostsOption = "localhost",
    workers_per_host: WorkersPerHost = 1,
    algorithm: AlgorithmName = None,
    overrides: Overrides = None,
    out: OutFolder = None,
    collective: CollectiveOption = "auto",
    warmup_epochs: Annotated[
        float | None, typer.Option(min=0, help="Epochs over which lr rises from lr/N (default 5; for scripts)")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of sample order (for scripts; configs have their own)")
    ] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep every message for `danaz replay`")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every process and its environment; start none")
    ] = False,
) -> None:
    """Train on real processes: Horovod inside each worker, a ZeroMQ server between them.

    Each host is one worker (its slots are the ranks that share every batch); `--workers-per-host` splits it.

    Examples:

        danaz launch configs/digits.yaml --hosts localhost:4 --workers-per-host 2

        danaz launch configs/digits.yaml --hosts localhost:4 --algorithm ssgd

        danaz launch --hosts localhost:2 --algorithm dana -- python examples/train.py
    """
    from danaz.launching import execute, prepare_config, prepare_script

    command: list[str] = ctx.obj
    if (config is None) == (not command):
        fail("give either a CONFIG or, behind --, a command such as: -- python train.py")
    try:
        cluster = _cluster(hosts, workers_per_host, collective)
        if config is not None:
            if warmup_epochs is not None or seed is not None:
                fail("a config sets these itself: use --set lr_schedule.warmup_epochs=… and --set seed=…")
            ready = prepare_config(_load(config, overrides, algorithm=algorithm), cluster, out, record)
        else:
            if overrides:
                fail("--set changes a config, and a script has none; pass its own arguments behind --")
            ready = prepare_script(command, _script_settings(algorithm, warmup_epochs, seed), cluster, out, record)
    except (ValueError, RuntimeError) as error:
        fail(error)
    if dry_run:
        typer.echo(ready.plan.describe())
        return
    typer.echo(f"run folder: {ready.run}")
    outcome, summary = execute(ready)
    if outcome.failure is not None:
        typer.secho(f"\n{outcome.failure}", err=True, fg="red")
    if summary is not None:
        _show_summary(summary, ready.run)
    raise typer.Exit(outcome.exit_code)


@app.command()
def work(config: ConfigFile) -> None:
    """Train a config as one rank of a worker. `danaz launch` starts this; the environment tells it its place."""
    from danaz.config import load_config
    from danaz.training import train

    train(load_config(config))


@app.command()
def serve(
    run: Annotated[Path, typer.Option(help="Run folder to write")],
    bind: Annotated[str, typer.Option(help="Address to listen on")] = "tcp://127.0.0.1:0",
    record: Annotated[bool, typer.Option("--record", help="Keep every message in <run>/recording.bin")] = False,
) -> None:
    """Serve one run. `danaz launch` starts this; its settings come in DANAZ_SETTINGS."""
    from danaz.server.socket import bind_router

    socket, address = bind_router(bind)
    typer.echo(f"DANAZ_SERVER={address}")
    sys.stdout.flush()  # workers start now, while the imports below take their seconds
    from danaz.serve import serve as serve_run
    from danaz.settings import from_environment

    settings, _ = from_environment()
    serve_run(socket, settings, run, record)


@app.command()
def replay(run: Annotated[Path, typer.Argument(help="Folder of a run that was launched with --record")]) -> None:
    """Feed a recorded run to a fresh server core, and check that the parameters come out the same, bit for bit.

    Example:

        danaz launch configs/digits.yaml --hosts localhost:2 --workers-per-host 2 --record --out runs/a

        danaz replay runs/a
    """
    from danaz.serve import replay_run

    try:
        updates, same = replay_run(run)
    except (ValueError, FileNotFoundError) as error:
        fail(error)
    typer.echo(f"{updates} updates replayed; the parameters are {'the same, bit for bit' if same else 'DIFFERENT'}")
    raise typer.Exit(0 if same else 1)


@app.command()
def algorithms() -> None:
    """List the update rules, what they keep, and where they come from."""
    from danaz.report.tables import print_algorithms

    print_algorithms()


def _load(path: Path, overrides: list[str] | None, **options: object) -> Config:
    from danaz.config import load_config

    chosen = [f"{key}={value}" for key, value in options.items() if value is not None]
    return load_config(path, [*(overrides or ()), *chosen])


def _cluster(hosts: str, workers_per_host: int, collective: str) -> Cluster:
    from danaz.launching import Cluster
    from danaz.worker.group import choose_collective
    from launcher.hosts import parse_hosts

    chosen, why = choose_collective(collective)
    typer.echo(why)
    return Cluster(parse_hosts(hosts), workers_per_host, chosen)


def _script_settings(algorithm: str | None, warmup_epochs: float | None, seed: int | None) -> Settings:
    from danaz.settings import Settings

    return Settings(
        algorithm=algorithm or "dana",
        warmup_epochs=5.0 if warmup_epochs is None else warmup_epochs,
        seed=seed or 0,
    )


def _show_summary(summary: dict[str, object], run: Path) -> None:
    from danaz.report.tables import print_summary

    print_summary(summary, run)
