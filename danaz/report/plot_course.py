"""Charts of the course of runs: loss, gap and lag."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from danaz.compare.results import by_setting
from danaz.report.curves import Curves
from danaz.report.plot_data import ChartData
from danaz.report.style import BASELINE, PANELS_A_ROW, legend_below, logarithmic, make_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pick = Callable[[Curves], Sequence[float | None]]
MARKERS_A_LINE = 8
ALIKE: dict[str, Any] = {"color": "#444444", "marker": "o", "linestyle": "solid"}  # one line for several algorithms
MANY = 4  # algorithms that are too many to name in a legend
SHOWN_LAGS = 0.995  # share of the updates that is shown; those with the largest lags are left out


def draw_loss(data: ChartData) -> Figure | None:
    """Draw the training loss over the epochs; None if no run has one."""
    return _over_epochs(data, lambda curves: curves.loss, "training loss")


def draw_gap(data: ChartData) -> Figure | None:
    """Draw the gap over the epochs; None if no run has one."""
    return _over_epochs(data, lambda curves: curves.gap, "gap")


def _over_epochs(data: ChartData, pick: Pick, label: str) -> Figure | None:
    """Draw a panel for each setting and a line for each algorithm, on a logarithmic scale."""
    from matplotlib.ticker import MaxNLocator

    groups = [each for each in data.groups if any(_positive(pick(curves)) for curves in data.curves_of(each))]
    if not groups:
        return None
    settings = by_setting(groups)
    figure, panels = make_panels(len(settings), share=True)
    for axes, (setting, members) in zip(panels, settings.items(), strict=True):
        for each in members:
            epochs, values = _mean_curve(data.curves_of(each), pick)
            every = max(1, len(epochs) // MARKERS_A_LINE)
            axes.plot(epochs, values, label=each.algorithm, markevery=every, **data.looks[each.algorithm].line)
        if not setting.is_live:
            _baseline(axes, data, pick)
        logarithmic(axes, "y")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_tick_params(labelbottom=True)
        axes.set_title(setting.title)
        axes.set_xlabel("epoch")
        if setting in list(settings)[::PANELS_A_ROW]:
            axes.set_ylabel(label)
    legend_below(figure, panels)
    return figure


def _baseline(axes: Axes, data: ChartData, pick: Pick) -> None:
    runs = data.curves_of(data.baseline) if data.baseline is not None else []
    if runs:
        axes.plot(*_mean_curve(runs, pick), label="one worker", **BASELINE)


def _positive(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and value > 0]


def _mean_curve(runs: Sequence[Curves], pick: Pick) -> tuple[list[float], list[float]]:
    """Return the epoch of each part of the run, and the mean there over the seeds that have a figure.

    A diverged run has fewer parts.
    """
    epochs = max((run.epochs for run in runs), key=lambda epochs: epochs[-1])
    columns = [_positive(values) for values in zip_longest(*(pick(run) for run in runs))]
    points = [(epoch, sum(column) / len(column)) for epoch, column in zip(epochs, columns, strict=False) if column]
    return [epoch for epoch, _ in points], [value for _, value in points]


def draw_lags(data: ChartData) -> Figure | None:
    """Draw a panel for each setting and a line for each asynchronous algorithm; None if there are none."""
    from matplotlib.ticker import MaxNLocator

    lags = {(each.algorithm, each.setting): _count_lags(data.curves_of(each)) for each in data.groups}
    settings = by_setting([each for each in data.groups if any(lags[each.algorithm, each.setting])])
    if not settings:
        return None
    figure, panels = make_panels(len(settings))
    for axes, (setting, members) in zip(panels, settings.items(), strict=True):
        for names in _alike({each.algorithm: lags[each.algorithm, setting] for each in members}):
            look = data.looks[names[0]].line if len(names) == 1 else ALIKE
            label = ", ".join(names) if len(names) < MANY else f"all {len(names)} alike"
            axes.plot(*_shares(lags[names[0], setting]), label=label, **look)
        axes.legend()
        axes.set_title(setting.title)
        axes.set_xlabel("lag (updates)")
        axes.set_ylabel("updates (%)")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


def _alike(lags: Mapping[str, Counter[int]]) -> list[list[str]]:
    """Group algorithms that have equal lags, as they do if they were simulated with the same order of workers."""
    groups: dict[frozenset[tuple[int, int]], list[str]] = {}
    for algorithm, counts in lags.items():
        groups.setdefault(frozenset(counts.items()), []).append(algorithm)
    return list(groups.values())


def _shares(counts: Counter[int]) -> tuple[range, list[float]]:
    """Return the lags from 0 up to the largest that is shown (SHOWN_LAGS), and the percentage of updates with each."""
    shares: list[float] = []
    so_far = 0
    for lag in range(max(counts) + 1):
        shares.append(100 * counts[lag] / counts.total())
        so_far += counts[lag]
        if so_far >= SHOWN_LAGS * counts.total():
            break
    return range(len(shares)), shares


def _count_lags(runs: Sequence[Curves]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for run in runs:
        counts.update(dict(run.lags))
    return counts
