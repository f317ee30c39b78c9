"""Draw the charts of a comparison, as PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from danaz.compare.results import ComparisonOutcome
from danaz.report.plot_course import draw_gap, draw_lags, draw_loss
from danaz.report.plot_data import ChartData, collect
from danaz.report.plot_final import draw_by_cell, draw_by_time, draw_by_workers
from danaz.report.style import RC

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ChartSpec(NamedTuple):
    """A chart that a report may have."""

    name: str  # what its files are called, without the ending
    title: str
    caption: str
    draw: Callable[[ChartData], Figure | None]  # returns None if the results have no figures for it


CHARTS = (
    ChartSpec(
        "error-by-workers",
        "Final error over the number of workers",
        "Means over seeds; the bands are one standard deviation. The dashed line is one worker; hollow markers are the "
        "paper's figures.",
        draw_by_workers,
    ),
    ChartSpec(
        "error-by-cell",
        "Final error, and speed of live runs",
        "Means over seeds; the whiskers are one standard deviation. The dashed line is one worker.",
        draw_by_cell,
    ),
    ChartSpec(
        "error-by-time",
        "Final error over wall time",
        "Live runs: means over seeds; the whiskers are one standard deviation. The lower left is best.",
        draw_by_time,
    ),
    ChartSpec(
        "loss-by-epoch",
        "Training loss over the epochs",
        "Loss of the batches on the workers' views: means over parts of the run and over seeds. The dashed line is one "
        "worker.",
        draw_loss,
    ),
    ChartSpec(
        "gap-by-epoch",
        "Gap over the epochs",
        "How far the parameters had moved when a gradient arrived: the root mean square of each layer, summed over "
        "layers. For live runs of dana it is measured at the look-ahead, for all others at the parameters.",
        draw_gap,
    ),
    ChartSpec(
        "lag",
        "How stale gradients were",
        "Share of updates by lag: the number of other updates between sending parameters and applying their gradient. "
        "The half per cent of updates with the largest lags is left out, and so are synchronous algorithms, which have "
        "no lag.",
        draw_lags,
    ),
)
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


class Chart(NamedTuple):
    """A chart that has been drawn."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


def draw(outcome: ComparisonOutcome) -> list[Chart]:
    """Draw all charts for which the results have figures. Raises UnreadableError, OSError."""
    import matplotlib as mpl

    data = collect(outcome)
    charts = []
    for spec in CHARTS:
        with mpl.rc_context({**RC, "svg.hashsalt": spec.name}):  # so that the ids of charts on one page differ
            figure = spec.draw(data)
            if figure is not None:
                png, svg = io.BytesIO(), io.StringIO()
                figure.savefig(png, format="png", metadata={"Software": None})
                figure.savefig(svg, format="svg", metadata=NO_METADATA)
                charts.append(Chart(spec.name, spec.title, spec.caption, png.getvalue(), svg.getvalue()))
    return charts
