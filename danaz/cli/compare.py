"""The `danaz compare` and `danaz tune` commands."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from danaz.cli import options
from danaz.cli.command import fail
from danaz.launch.options import LaunchOptions
from danaz.options.option import Option, given, options_of
from danaz.options.shared import OVERRIDES, Method

if TYPE_CHECKING:
    from danaz.compare.cells import Comparison
    from danaz.compare.run import CompletedCall

DEFAULT_ALGORITHMS = "ssgd,nag-asgd,dana"

LIVE = "With --live"


def _as_live(name: str) -> Option:
    """Return the option of `danaz launch` with this name, as `danaz compare` has it: there, hosts have no default."""
    option = options_of(LaunchOptions)[name][1]
    return replace(option, help=option.help.removesuffix(" Default: localhost"), panel=LIVE)


@dataclass(frozen=True)
class CompareOptions:
    """The options of `danaz compare`. Those that describe a grid have the names of its keys."""

    algorithms: Annotated[
        str | None,
        Option(f"Algorithms, separated by commas. Default: {DEFAULT_ALGORITHMS}", ("--algorithms", "-a")),
    ] = None
    workers: Annotated[
        str | None,
        Option("Numbers of simulated workers, e.g. `1,4,8`. Default: 1 and the config's number", ("--workers", "-n")),
    ] = None
    seeds: Annotated[int | None, Option("Number of seeds, counted from the config's seed. Default: 1", min=1)] = None
    schedule: Annotated[str | None, options.SCHEDULE] = None
    jobs: Annotated[int | None, options.JOBS] = None
    device: Annotated[str | None, options.DEVICE] = None
    overrides: Annotated[list[str] | None, OVERRIDES] = None
    out: Annotated[Path | None, Option("Folder of the results. Default: `runs/compare-NAME`")] = None
    live: Annotated[bool, Option("Run real processes on machines, one algorithm after another")] = False
    hosts: Annotated[str | None, _as_live("hosts")] = None
    hostfile: Annotated[Path | None, _as_live("hostfile")] = None
    workers_per_host: Annotated[int | None, _as_live("workers_per_host")] = None
    collective: Annotated[str | None, _as_live("collective")] = None
    fresh: Annotated[bool, Option("Delete the finished runs in the folder, and start again")] = False


@options.expanded
def compare(
    config: Annotated[
        Path,
        typer.Argument(help="YAML of an experiment, or of a comparison with its own list of cells", metavar="CONFIG"),
    ],
    asked: CompareOptions,
) -> None:
    """Run one experiment with several algorithms, numbers of workers and seeds, and report them side by side.

    Simulations run in parallel, one thread each. Finished runs are kept: after Ctrl-C, the same command continues, and
    with more algorithms, workers or seeds it runs only what is missing. With one worker, all algorithms are the same,
    and run as `baseline`.

    Examples:

        danaz compare configs/digits.yaml --algorithms ssgd,asgd,nag-asgd,dana --workers 1,4,8,16 --seeds 5

        danaz compare configs/digits.yaml --live --hosts localhost:4 --workers-per-host 4 --algorithms ssgd,dana

        danaz compare configs/demo.yaml
    """
    from danaz.compare.cells import ComparisonError
    from danaz.compare.run import run_comparison
    from danaz.files.reading import UnreadableError
    from danaz.run.lock import RunFolderError
    from danaz.workloads.computing import choose_device

    try:
        comparison = _comparison(config, asked)
        choose_device(comparison.config)
    except (ValueError, RuntimeError) as error:  # in the config, the hosts, the algorithms or the collective
        fail(error)
    folder = asked.out or Path("runs", f"compare-{comparison.name}")
    typer.echo(f"comparison folder: {folder}", err=True)
    try:
        code = _report(run_comparison(comparison, folder, asked.jobs, asked.fresh))
    except (ComparisonError, RunFolderError, UnreadableError, OSError) as error:
        fail(error)
    raise typer.Exit(code)


@dataclass(frozen=True)
class TuneOptions:
    """The options of `danaz tune`."""

    algorithm: Annotated[str, options_of(Method)["algorithm"][1]] = "nag-asgd"
    workers: Annotated[int | None, options.WORKERS] = None
    lr: Annotated[str, Option("Learning rates, separated by commas")] = "0.01,0.02,0.05,0.1,0.2"
    momentum: Annotated[str, Option("Momenta, separated by commas; they may be negative")] = "-0.6,-0.3,0,0.3,0.6,0.9"
    overrides: Annotated[list[str] | None, OVERRIDES] = None
    jobs: Annotated[int | None, options.JOBS] = None
    out: Annotated[Path | None, Option("Folder of the results. Default: `runs/tune-NAME-ALGORITHM-N`")] = None


@options.expanded
def tune(config: options.Experiment, asked: TuneOptions) -> None:
    """Search a grid of learning rates and momenta for an algorithm: the search that DANA makes unnecessary.

    Simulations run in parallel. Finished ones are kept: after Ctrl-C, the same command continues. The result is a table
    and a heat map.

    Examples:

        danaz tune configs/digits.yaml --algorithm nag-asgd --workers 8

        danaz tune configs/digits.yaml -a asgd -n 16 --lr 0.05,0.1,0.2 --momentum 0
    """
    from danaz.cli.output import print_tuning
    from danaz.compare.tune import tune as run_grid
    from danaz.report.heat_map import write_tuning
    from danaz.run.config import load_config
    from danaz.run.fit import check_workers
    from danaz.run.settings import Settings

    try:
        chosen = given(asked, {"algorithm", "workers"})
        overrides = asked.overrides or ()
        base = load_config(config, overrides, chosen)
        check_workers(Settings.of(base, schedule=base.schedule, collective="none"))
        lrs, momenta = _floats(asked.lr, "--lr"), _floats(asked.momentum, "--momentum")
        for rate, inertia in product(lrs, momenta):
            load_config(config, overrides, {**chosen, "lr": rate, "momentum": inertia})
        folder = asked.out or Path("runs", f"tune-{base.name}-{base.algorithm}-{base.workers}")
        tuning = run_grid(base, lrs, momenta, folder, asked.jobs)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command continues with the runs that are left", err=True)
        raise typer.Exit(130) from None
    print_tuning(tuning)
    try:
        files = write_tuning(tuning, folder) if tuning.summaries else ()
    except OSError as error:
        fail(error)
    for file in files:
        typer.echo(f"  {file}")
    raise typer.Exit(1 if tuning.failures else 0)


def _floats(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text}: expected numbers separated by commas, e.g. 0.05,0.1") from error


def _comparison(path: Path, asked: CompareOptions) -> Comparison:
    """The comparison that the command line describes. Raises the errors of read_plan and make_comparison."""
    from danaz.compare.cells import ComparisonError, Grid, is_plan, make_comparison, make_grid, read_plan

    grid_options = given(asked, Grid.model_fields)
    overrides = [*(asked.overrides or []), *([] if asked.device is None else [f"device={json.dumps(asked.device)}"])]
    if is_plan(path):
        if asked.live or grid_options.keys() - {"seeds"}:
            raise ComparisonError(
                f"{path} lists its cells itself, so options cannot change them; edit it, or name the experiment in it"
            )
        return read_plan(path, overrides, asked.seeds)
    if asked.live != bool(grid_options.keys() & {"hosts", "hostfile"}):
        raise ComparisonError("--live and --hosts or --hostfile belong together, e.g. --live --hosts localhost:4")
    if not asked.live and grid_options.keys() & {"workers_per_host", "collective"}:
        raise ComparisonError("--workers-per-host and --collective are for --live; add --live and --hosts")
    values = {"algorithms": DEFAULT_ALGORITHMS, **grid_options}
    lists = {name: _words(values[name]) for name in ("algorithms", "workers") if name in values}
    return make_comparison(path, [make_grid(str(path), {**values, **lists})], overrides)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _report(call: CompletedCall) -> int:
    """Print the results and write the report. Returns the exit code."""
    from danaz.cli.output import print_comparison
    from danaz.report.comparison import write_report

    outcome = call.outcome
    cells = len(outcome.results) + len(outcome.pending)
    if call.kept:
        typer.echo(f"finished before: {call.kept} of {cells} runs; --fresh runs them again")
    if outcome.results:
        print_comparison(outcome)
    if outcome.finished:
        written = write_report(outcome)
        typer.echo(f"report:   {outcome.folder / 'report.html'}  (also report.md and results.csv)")
        typer.echo(f"pictures: {', '.join(file.name for file in written if file.suffix == '.png')}  (also SVG)")
        typer.echo(f"runs:     {outcome.folder / 'cells'}")
    if outcome.pending:
        typer.echo(f"still to run: {len(outcome.pending)} of {cells}; the same command continues with them")
    if call.interrupted:
        return 130
    return 1 if outcome.failed else 0
