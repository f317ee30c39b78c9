"""The `danaz simulate` and `danaz speedup` commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from danaz.cli import options
from danaz.cli.command import fail
from danaz.cli.grouped import given, takes_options


@dataclass(frozen=True)
class SimulateOptions:
    """The command line of `danaz simulate`; None: not given. Most fields have the names of config keys."""

    config: options.Experiment
    algorithm: options.Algorithm = None
    workers: options.Workers = None
    schedule: options.Schedule = None
    device: options.Device = None
    sync_period: options.SyncPeriod = None
    pipeline: options.Pipeline = None
    wire: options.Wire = None
    wire_view: options.WireView = None
    overrides: options.Overrides = None
    out: options.RunFolder = None


@takes_options(SimulateOptions)
def simulate(asked: SimulateOptions) -> None:
    """Train with N simulated workers in one process. The update rules are the same code as in a live run.

    Examples:

        danaz simulate configs/digits.yaml --algorithm dana --workers 8

        danaz simulate configs/quadratic.yaml -a nag-asgd -n 4 --schedule round-robin --set lr=0.02

        danaz simulate configs/digits.yaml -n 4 --schedule trace:runs/a    # in the order of the live run in runs/a

        danaz simulate configs/digits.yaml -n 4 --wire onebit --set wire_warmup_epochs=2
    """
    from danaz.cli.progress import progress_bar
    from danaz.compare.tables import print_summary
    from danaz.launch.prepare import check_workers
    from danaz.run.config import Config, load_config
    from danaz.run.folder import UnwrittenError, write_settings
    from danaz.run.lock import claimed_run_folder
    from danaz.run.settings import Settings
    from danaz.simulate.simulator import Simulation

    try:
        config = load_config(asked.config, asked.overrides or (), given(asked, Config.model_fields))
        check_workers(Settings.of(config, schedule=config.schedule, collective="none"))
        with claimed_run_folder(asked.out, f"{config.name}-{config.algorithm}-{config.workers}") as run:
            simulation = Simulation(config, run)
            write_settings(run, config.model_dump(mode="json"))
            with progress_bar(f"{config.algorithm}, {config.workers} workers") as progress:
                summary = simulation.run(progress)
    except (ValueError, OSError, UnwrittenError) as error:
        fail(error)
    print_summary(summary, run)


def speedup(
    workers: Annotated[str, typer.Option("--workers", "-n", help="Numbers of workers: `1,4,8` or `1-64`")] = "1-64",
    repetitions: Annotated[int, typer.Option(min=1, help="Random repetitions to average over")] = 20,
    iterations: Annotated[int, typer.Option(min=1, help="Batches of each worker in a repetition")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random batch times")] = 0,
    out: Annotated[Path, typer.Option("--out", help="Folder for speedup.csv, .png and .svg")] = Path("runs/speedup"),
) -> None:
    """Compute the theoretical speed-up of asynchronous and synchronous training over one worker.

    Batch times follow a gamma distribution, and communication costs nothing. The result is both panels of the DANA
    paper's Figure 5: machines of one kind, and machines that differ.

    Examples:

        danaz speedup

        danaz speedup --workers 1,2,4,8,16,32 --repetitions 5 --out /tmp/speedup
    """
    from danaz.report.speedup import print_speedup, write_speedup
    from danaz.simulate.speedup import speedup as compute

    try:
        numbers = parse_numbers(workers)
        panels = [
            compute(numbers, heterogeneous=kind, repetitions=repetitions, iterations=iterations, seed=seed)
            for kind in (False, True)
        ]
        print_speedup(panels)
        for file in write_speedup(panels, out):
            typer.echo(f"  {file}")
    except (ValueError, OSError) as error:
        fail(error)


def parse_numbers(text: str) -> list[int]:
    """Read ``1,4,8``, ``1-64`` or a mix of both. Raises ValueError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            numbers += range(int(first), int(last) + 1) if dash else [int(first)]
        except ValueError as error:
            raise ValueError(f"--workers {text}: expected numbers such as 1,4,8 or 1-64") from error
    return numbers
