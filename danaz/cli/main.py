"""The ``danaz`` command. It reads arguments, lets other packages do the work, and prints results and exit codes."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from danaz.cli import options
from danaz.cli.command import fail
from danaz.cli.compare import compare, tune
from danaz.cli.launch import doctor, launch
from danaz.cli.mistyped import advice
from danaz.cli.simulate import simulate, speedup
from danaz.horovod_install.cli import app as horovod_app
from danaz.options.option import Option
from danaz.options.shared import RECORD

if TYPE_CHECKING:
    from danaz.protocol.keys import ServerKeys
    from danaz.serving.socket import BoundRouter

# Each command imports what it needs when it runs: torch takes seconds, and --help should not.

app = typer.Typer(
    name="danaz",
    help="Cluster training for PyTorch: synchronous Horovod inside a machine, asynchronous DANA between machines.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(horovod_app, name="horovod")
app.command()(launch)
app.command()(doctor)
app.command()(simulate)
app.command()(speedup)
app.command()(compare)
app.command()(tune)


def main() -> None:
    """Run the command that was typed. The option parser does not read the user's own command, which follows ``--``."""
    _settle_surroundings()
    words, command = sys.argv[1:], []
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    hint = advice(words[0], words[1:], command, known_options(words[0])) if words else None
    if hint is not None:
        typer.secho(f"danaz: {hint}", err=True, fg="red")
        sys.exit(2)
    try:
        app(args=words, obj=command)
    except KeyboardInterrupt:
        sys.exit(130)


def known_options(name: str) -> dict[str, bool]:
    """Return option -> whether a value follows, for each option of a command as it is typed.

    Return nothing if there is no such command.
    """
    command = getattr(typer.main.get_command(app), "commands", {}).get(name)
    params = [] if command is None else command.params
    options = {word: not param.is_flag for param in params if hasattr(param, "is_flag") for word in param.opts}
    return options | {word: False for param in params for word in param.secondary_opts} | {"--help": False}


def _settle_surroundings() -> None:
    """Prepare for an odd locale and a deleted working directory: end with a message where nothing else helps."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that this locale cannot write must not end a run
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit("danaz: the working directory no longer exists; change into another one")


@dataclass(frozen=True)
class WorkOptions:
    """The options of `danaz work`."""

    join: Annotated[str | None, Option("Join the run of the server at this address", metavar="HOST:PORT")] = None
    key: Annotated[
        Path | None, Option("Invitation to that run, written by `danaz launch --invite`", metavar="FILE")
    ] = None
    slots: Annotated[int | None, Option("Number of ranks here. Default: one a GPU, or 1 without GPUs", min=1)] = None
    out: Annotated[Path | None, Option("Folder for logs. Default: runs/TIME-join")] = None


@app.command()
@options.expanded
def work(asked: WorkOptions) -> None:
    """Add this machine to a running job as one more worker. It leaves when the run ends, or on Ctrl-C.

    (`danaz launch` runs this command without --join: then it trains as one rank, whose place the environment tells.)

    Example, on the launching machine and on another one:

        danaz launch configs/digits.yaml --hosts a,b --invite 1 --server-port 5555 --out runs/a

        danaz work --join launching-machine:5555 --key worker-2.json --slots 4
    """
    if asked.join is not None or asked.key is not None:
        if asked.join is None or asked.key is None:
            fail("--join HOST:PORT and --key FILE belong together")
        from danaz.cli.join import join_run

        raise typer.Exit(join_run(asked.join, asked.key, asked.slots, asked.out))
    from danaz.run.config import Config, ConfigError
    from danaz.workloads.train import train

    if "DANAZ_CONFIG" not in os.environ:
        fail("DANAZ_CONFIG is not set: `danaz launch CONFIG` sets it. To join a run, say --join HOST:PORT --key FILE")
    try:
        config = Config.model_validate_json(os.environ["DANAZ_CONFIG"])
    except ValueError as error:
        fail(f"DANAZ_CONFIG, which `danaz launch` sets, is no config: {error}")
    try:
        train(config)
    except ConfigError as error:  # in its data or model, which only a rank builds
        fail(error)


@dataclass(frozen=True)
class ServeOptions:
    """The options of `danaz serve`."""

    run: Annotated[Path, Option("Run folder that the server writes", variable="DANAZ_RUN")]
    bind: Annotated[str, Option("Address to listen on")] = "tcp://127.0.0.1:*"
    insecure: Annotated[bool, Option("Listen to other machines without keys, and believe whoever connects")] = False
    record: Annotated[bool, RECORD] = False
    resume: Annotated[bool, Option("Go on from the newest sound checkpoint in the run folder")] = False
    shard: Annotated[
        int, Option("Number of the shard that this server is; DANAZ_SETTINGS says how many there are", min=0)
    ] = 0


@app.command()
@options.expanded
def serve(asked: ServeOptions) -> None:
    """Serve one run. `danaz launch` starts this, and hands over the settings in DANAZ_SETTINGS and the keys.

    With --resume, continue a run whose server was killed or stopped. Its workers join again by themselves; with several
    shards, they choose a checkpoint that all shards have.

    Example, to see the whole command and environment:

        danaz launch configs/digits.yaml --hosts localhost:2 --workers-per-host 2 --dry-run
    """
    from danaz.run.lock import MODE, RunFolderError, check_server_begins, lock_server

    run, shard = asked.run, asked.shard
    if asked.resume and not run.is_dir():
        fail(f"{run} is no run folder; --resume continues a run that has begun")
    keys = _take_keys(asked.bind, asked.insecure)
    try:
        run.mkdir(mode=MODE, parents=True, exist_ok=True)
        lock_server(run, shard=shard)
        if not asked.resume:
            check_server_begins(run, shard)
    except (RunFolderError, OSError) as error:
        fail(error)
    # Only now: the server that had this port before has ended.
    bound = _listen(asked.bind, keys)
    typer.echo(f"{'DANAZ_SERVER' if shard == 0 else f'DANAZ_SERVER_{shard}'}={bound.address}")
    sys.stdout.flush()  # workers start now, while the imports below take their seconds
    from danaz.files.reading import UnreadableError
    from danaz.run.settings import from_environment
    from danaz.server.snapshot import ResumeError
    from danaz.serving.journal import UnwrittenError
    from danaz.serving.serve import serve as serve_run
    from danaz.serving.serve import serve_shard

    try:
        settings, _ = from_environment()
    except ValueError as error:
        fail(error)
    try:
        if shard:
            serve_shard(bound, settings, shard, run, asked.resume)
        else:
            serve_run(bound, settings, run, asked.record, asked.resume)
    except (ResumeError, UnreadableError, UnwrittenError) as error:
        fail(error)


def _take_keys(bind: str, insecure: bool) -> ServerKeys | None:
    """Return the keys of the run. Without keys, end unless only this machine can connect or ``insecure`` allows it."""
    from danaz.protocol.keys import take_server_keys
    from launcher.machine import is_loopback

    scheme, _, where = bind.partition("://")
    try:
        keys = take_server_keys()
    except ValueError as error:
        fail(error)
    is_open = scheme == "tcp" and not is_loopback(where.rpartition(":")[0].strip("[]"))
    if is_open and keys is None and not insecure:
        fail(
            f"{bind} is open to the network, and there are no keys; `danaz launch` makes them. If you trust every "
            "machine there, say --insecure"
        )
    return keys


def _listen(bind: str, keys: ServerKeys | None) -> BoundRouter:
    from zmq import ZMQError

    from danaz.serving.socket import BoundRouter

    try:
        return BoundRouter(bind, keys)
    except ZMQError as error:
        fail(f"cannot listen on {bind}: {error}", code=1)  # the port may be free again soon


@app.command()
def replay(run: Annotated[Path, typer.Argument(help="Folder of a run that was launched with --record")]) -> None:
    """Feed a recorded run to a fresh server core, and check that the parameters come out the same, bit for bit.

    Example:

        danaz launch configs/digits.yaml --hosts localhost:2 --workers-per-host 2 --record --out runs/a

        danaz replay runs/a
    """
    from danaz.serving.serve import replay_run

    try:
        updates, same = replay_run(run)
    except ValueError as error:
        fail(error)
    typer.echo(f"{updates} updates replayed; the parameters are {'the same, bit for bit' if same else 'DIFFERENT'}")
    raise typer.Exit(0 if same else 1)


@app.command()
def algorithms() -> None:
    """List the update rules, the vectors that each keeps, and the papers they come from.

    Example:

        danaz algorithms
    """
    from danaz.cli.output import print_algorithms

    print_algorithms()
