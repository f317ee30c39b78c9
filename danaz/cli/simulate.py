"""The `danaz simulate` and `danaz speedup` commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from danaz.cli import options
from danaz.cli.command import fail
from danaz.launch.options import TrainingOptions
from danaz.options.option import Option, given
from danaz.options.shared import HYPERPARAMETER, OVERRIDES


@dataclass(frozen=True)
class SimulateOptions(TrainingOptions):
    """The options of `danaz simulate`."""

    workers: Annotated[int | None, options.WORKERS] = None
    schedule: Annotated[str | None, options.SCHEDULE] = None
    device: Annotated[str | None, options.DEVICE] = None
    overrides: Annotated[list[str] | None, OVERRIDES] = None
    hyperparameter: Annotated[list[str] | None, HYPERPARAMETER] = None
    out: Annotated[Path | None, Option("Run folder. Default: runs/TIME-NAME")] = None


@options.expanded
def simulate(config: options.Experiment, asked: SimulateOptions) -> None:
    """Train with N simulated workers in one process. It runs the same code of server, workers and rules as a live run.

    Examples:

        danaz simulate configs/digits.yaml --algorithm dana --workers 8

        danaz simulate configs/quadratic.yaml -a nag-asgd -n 4 --schedule round-robin --set lr=0.02

        danaz simulate configs/digits.yaml -n 4 --schedule trace:runs/a    # in the order of the live run in runs/a

        danaz simulate configs/digits.yaml -n 4 --wire onebit --set wire_warmup_epochs=2
    """
    from danaz.cli.output import print_summary
    from danaz.cli.progress import progress_bar
    from danaz.run.config import Config, load_config
    from danaz.run.fit import check_workers
    from danaz.run.folder import write_settings
    from danaz.run.lock import claimed_run_folder
    from danaz.run.settings import Settings
    from danaz.serving.journal import UnwrittenError
    from danaz.simulate.simulator import Simulation

    try:
        settings = load_config(
            config, asked.overrides or (), given(asked, Config.model_fields), asked.hyperparameter or ()
        )
        check_workers(Settings.of(settings, schedule=settings.schedule, collective="none"))
        with claimed_run_folder(asked.out, f"{settings.name}-{settings.algorithm}-{settings.workers}") as run:
            simulation = Simulation(settings, run)
            write_settings(run, settings.model_dump(mode="json"))
            with progress_bar(f"{settings.algorithm}, {settings.workers} workers") as progress:
                summary = simulation.run(progress)
    except (ValueError, OSError, UnwrittenError) as error:
        fail(error)
    print_summary(summary, run)


@dataclass(frozen=True)
class SpeedupOptions:
    """The options of `danaz speedup`."""

    workers: Annotated[str, Option("Numbers of workers: `1,4,8` or `1-64`", ("--workers", "-n"))] = "1-64"
    repetitions: Annotated[int, Option("Random repetitions to average over", min=1)] = 20
    iterations: Annotated[int, Option("Batches of each worker in a repetition", min=1)] = 100_000
    seed: Annotated[int, Option("Seed of the random batch times", min=0)] = 0
    out: Annotated[Path, Option("Folder for speedup.csv, .png and .svg")] = Path("runs/speedup")


@options.expanded
def speedup(asked: SpeedupOptions) -> None:
    """Compute the theoretical speed-up of asynchronous and synchronous training over one worker.

    Batch times follow a gamma distribution, and communication takes no time. The result is Figure 5 of the DANA paper,
    with a panel for equal machines and a panel for unequal ones.

    Examples:

        danaz speedup

        danaz speedup --workers 1,2,4,8,16,32 --repetitions 5 --out /tmp/speedup
    """
    from danaz.cli.output import print_speedup
    from danaz.report.speedup import write_speedup
    from danaz.simulate.speedup import speedup as compute

    try:
        numbers = parse_numbers(asked.workers)
        panels = [
            compute(
                numbers,
                heterogeneous=kind,
                repetitions=asked.repetitions,
                iterations=asked.iterations,
                seed=asked.seed,
            )
            for kind in (False, True)
        ]
        print_speedup(panels)
        for file in write_speedup(panels, asked.out):
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
