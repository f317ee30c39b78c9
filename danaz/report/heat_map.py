"""Show a grid over learning rate and momentum: as a table, a CSV file and a heat map."""

from __future__ import annotations

import csv
import io
import math
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.table import Table

from danaz.compare.tune import Tuning
from danaz.files.atomic import write_atomically
from danaz.report.style import RC, as_files


def print_tuning(tuning: Tuning) -> None:
    """Print the grid, with momenta as rows and learning rates as columns and the best figure in bold."""
    table = Table("momentum \\ lr", title=f"{tuning.config.algorithm}, {tuning.measure.label}")
    for lr in tuning.lrs:
        table.add_column(f"{lr:g}", justify="right")
    for momentum in tuning.momenta:
        table.add_row(f"{momentum:g}", *(_cell(tuning, lr, momentum) for lr in tuning.lrs))
    console = Console()
    console.print(table)
    if tuning.best is not None:
        lr, momentum = tuning.best
        console.print(f"best: lr {lr:g}, momentum {momentum:g}")
    for name, reason in tuning.failures.items():
        console.print(f"[red]failed[/] {name}: {reason}")


def _cell(tuning: Tuning, lr: float, momentum: float) -> str:
    figure = tuning.figure(lr, momentum)
    if figure is None:
        return "–"
    text = f"{figure:.4g}" + (" diverged" if tuning.summaries[lr, momentum]["diverged"] else "")
    return f"[bold]{text}[/]" if tuning.best == (lr, momentum) else text


def write_tuning(tuning: Tuning, folder: Path) -> list[Path]:
    """Write tune.csv, tune.png and tune.svg into ``folder``. Returns their paths."""
    files = {"tune.csv": _as_csv(tuning), **_as_figures(tuning)}
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def _as_csv(tuning: Tuning) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["lr", "momentum", tuning.measure.key, "diverged"])
    for (lr, momentum), summary in tuning.summaries.items():
        writer.writerow([lr, momentum, tuning.figure(lr, momentum), summary["diverged"]])
    return text.getvalue().encode()


def _as_figures(tuning: Tuning) -> dict[str, bytes]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = [[tuning.figure(lr, momentum) for lr in tuning.lrs] for momentum in tuning.momenta]
    values = [[math.nan if figure is None else figure for figure in row] for row in figures]
    with pyplot.rc_context({**RC, "axes.grid": False}):
        size = (2.2 + 0.85 * len(tuning.lrs), 1.6 + 0.5 * len(tuning.momenta))
        figure, ax = pyplot.subplots(figsize=size, layout="constrained")
        image = ax.imshow(values, cmap="cividis_r", aspect="auto")
        known = [value for row in values for value in row if not math.isnan(value)] or [0.0]
        middle = (min(known) + max(known)) / 2  # above this figure, the background is dark
        for row, column in product(range(len(values)), range(len(values[0]))):
            value = values[row][column]
            text, colour = (
                ("–", "black") if math.isnan(value) else (f"{value:.3g}", "white" if value > middle else "black")
            )
            ax.text(column, row, text, ha="center", va="center", color=colour)
        ax.set_xticks(range(len(tuning.lrs)), [f"{lr:g}" for lr in tuning.lrs])
        ax.set_yticks(range(len(tuning.momenta)), [f"{momentum:g}" for momentum in tuning.momenta])
        workers = f"{tuning.config.workers} workers"
        ax.set(xlabel="learning rate", ylabel="momentum", title=f"{tuning.config.algorithm}, {workers}")
        figure.colorbar(image, label=tuning.measure.label)
        contents = as_files(figure, "tune")
        pyplot.close(figure)
    return contents
