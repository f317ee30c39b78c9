"""Write a grid over learning rate and momentum: as a CSV file and a heat map."""

from __future__ import annotations

import csv
import io
import math
from itertools import product
from pathlib import Path

from danaz.compare.tune import Tuning
from danaz.files.atomic import write_atomically
from danaz.report.style import RC, as_files


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
