"""The charts of a comparison, as PNG and SVG."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from danaz.compare.results import Outcome
from danaz.report.plot_course import draw_gap, draw_lags, draw_loss
from danaz.report.plot_data import Data, collect
from danaz.report.plot_final import draw_by_cell, draw_by_time, draw_by_workers
from danaz.report.style import RC

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Plan(NamedTuple):
    """How a chart comes about."""

    name: str  # of its files
    title: str
    caption: str
    draw: Callable[[Data], Figure | None]  # None: the results hold nothing for it


CHARTS = (
    Plan(
        "error-by-workers",
        "Final error over the number of workers",
        "Mean over seeds; the band is one standard deviation. Dashed: one worker. Hollow markers: the paper.",
        draw_by_workers,
    ),
    Plan(
        "error-by-cell",
        "How good, and how fast",
        "Mean over seeds; the whisker is one standard deviation. Dashed: one worker.",
        draw_by_cell,
    ),
    Plan(
        "error-by-time",
        "How good, and after how long",
        "Live runs of all epochs: the mean over seeds, whiskers of one standard deviation. The lower left is best.",
        draw_by_time,
    ),
    Plan(
        "loss-by-epoch",
        "Training loss over the epochs",
        "Loss of the batches as the workers saw it, a mean over parts of the run and over seeds. Dashed: one worker.",
        draw_loss,
    ),
    Plan(
        "gap-by-epoch",
        "Gap over the epochs",
        "How far the parameters had moved when a gradient arrived: root mean square of each layer, summed "
        "over layers. That of a live dana is measured in its look-ahead, the others in the parameters.",
        draw_gap,
    ),
    Plan(
        "lag",
        "How stale gradients were",
        "Share of updates by lag: how many others were applied between sending parameters and applying their gradient. "
        "The last half per cent, and synchronous algorithms, which have no lag, are left out.",
        draw_lags,
    ),
)
NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


class Chart(NamedTuple):
    """A chart, drawn."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: str


def draw(outcome: Outcome) -> list[Chart]:
    """All charts that the results hold something for."""
    import matplotlib as mpl

    data = collect(outcome)
    charts = []
    for plan in CHARTS:
        with mpl.rc_context({**RC, "svg.hashsalt": plan.name}):  # the salt keeps ids apart when charts share a page
            figure = plan.draw(data)
            if figure is not None:
                png, svg = io.BytesIO(), io.StringIO()
                figure.savefig(png, format="png", metadata={"Software": None})
                figure.savefig(svg, format="svg", metadata=NO_METADATA)
                charts.append(Chart(plan.name, plan.title, plan.caption, png.getvalue(), svg.getvalue()))
    return charts
