"""Charts of the final figures of runs: error, speed and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from danaz.compare.results import TEST_ERROR, Group, Kind, Spread, by_kind, by_setting
from danaz.report.plot_data import ChartData
from danaz.report.style import BASELINE, legend_below, make_panels, scale_by_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW_INCHES = 0.27
TEXT_BACKGROUND: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # a line may cross the text


def _kinds_by_workers(data: ChartData) -> dict[Kind, list[Group]]:
    """Return the kinds of run that have more than one number of workers."""
    return {kind: groups for kind, groups in by_kind(data.groups).items() if len(_numbers(groups)) > 1}


def draw_by_workers(data: ChartData) -> Figure | None:
    """Draw a panel for each kind of run and a line for each algorithm; None if no kind has several worker numbers."""
    kinds = _kinds_by_workers(data)
    if not kinds:
        return None
    figure, panels = make_panels(len(kinds), inches=(7.2, 4.4))
    for axes, (kind, groups) in zip(panels, kinds.items(), strict=True):
        for algorithm in dict.fromkeys(each.algorithm for each in groups):
            _line(axes, data, [each for each in groups if each.algorithm == algorithm])
        if data.baseline_mean is not None:
            axes.axhline(data.baseline_mean, label="one worker", zorder=1.5, **BASELINE)
        for source in dict.fromkeys(paper.source for paper in data.papers if paper.schedule == kind.schedule):
            axes.plot([], [], "o", color="#666666", markerfacecolor="white", markersize=9, label=source)
        numbers = _numbers(groups)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set_xlabel("workers")
        axes.set_title(f"{data.name}, {kind.label}")
        axes.set_ylabel(data.measure.label)
        spreads = [each.spread(data.measure.key) for each in groups]
        scale_by_range(axes, "y", [spread.mean for spread in spreads if spread is not None])
    legend_below(figure, panels)
    return figure


def _numbers(groups: Sequence[Group]) -> list[int]:
    return sorted({each.setting.workers for each in groups})


def _line(axes: Axes, data: ChartData, groups: Sequence[Group]) -> None:
    """Draw one algorithm: means, a band of one standard deviation, and the papers' figures as hollow markers."""
    spreads = [(each.setting.workers, spread) for each in groups if (spread := each.spread(data.measure.key))]
    spreads.sort(key=lambda point: point[0])
    workers = [number for number, _ in spreads]
    means, stds = [spread.mean for _, spread in spreads], [spread.std or 0.0 for _, spread in spreads]
    algorithm = groups[0].algorithm
    look = data.looks[algorithm]
    axes.plot(workers, means, label=algorithm, **look.line)
    low, high = ([mean + sign * std for mean, std in zip(means, stds, strict=True)] for sign in (-1, 1))
    axes.fill_between(workers, low, high, color=look.color, alpha=0.18, linewidth=0)
    if data.measure is not TEST_ERROR:
        return
    for paper in data.papers:
        theirs = [(each.setting.workers, paper.error(algorithm, each.setting)) for each in groups]
        known = sorted((number, error) for number, error in theirs if error is not None)
        if known:
            hollow = look._replace(linestyle="none").line | {"markerfacecolor": "white", "markersize": 9}
            axes.plot(*zip(*known, strict=True), zorder=1.8, **hollow)


def draw_by_cell(data: ChartData) -> Figure | None:
    """Draw a row for each algorithm in each setting, with its error, and its speed if it is live.

    Returns None if there are no groups, or if draw_by_workers shows them.
    """
    if not data.groups or _kinds_by_workers(data):
        return None
    from matplotlib.figure import Figure

    rows = _rows(data.groups)
    live = any(each.setting.is_live for each in data.groups)
    figure = Figure(figsize=(9.8 if live else 7.0, 1.4 + ROW_INCHES * len(rows)), layout="constrained")
    panels = list(figure.subplots(1, 1 + live, squeeze=False, sharey=True)[0])
    _dots(panels[0], data, rows)
    if live:
        _speeds(panels[1], data, rows)
    panels[0].set_title(data.name)
    panels[0].set_ylim(len(rows) - 0.4, -0.7)
    panels[0].set_yticks(range(len(rows)), [row.algorithm if isinstance(row, Group) else row for row in rows])
    for label, row in zip(panels[0].get_yticklabels(), rows, strict=True):
        label.set_fontweight("normal" if isinstance(row, Group) else "bold")
    for axes in panels:
        axes.tick_params(axis="y", length=0)
    legend_below(figure, panels)
    return figure


def _rows(groups: Sequence[Group]) -> list[Group | str]:
    """Return the groups, with a heading above those of each setting."""
    rows: list[Group | str] = []
    for setting, members in by_setting(groups).items():
        rows += [setting.title, *members]
    return rows


def _dots(axes: Axes, data: ChartData, rows: Sequence[Group | str]) -> None:
    means = [data.baseline_mean] if data.baseline_mean else []
    for place, row in enumerate(rows):
        spread = row.spread(data.measure.key) if isinstance(row, Group) else None
        if isinstance(row, Group) and spread is not None:
            means.append(spread.mean)
            look = data.looks[row.algorithm]
            point: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": 7.0}
            axes.errorbar(spread.mean, place, xerr=spread.std, capsize=3, **point)
            text = f"{spread.mean:.{data.measure.decimals}f}" + (" (diverged)" if row.diverged else "")
            beside: dict[str, Any] = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
            axes.annotate(text, (spread.mean, place), bbox=TEXT_BACKGROUND, **beside)
    if data.baseline_mean is not None:
        axes.axvline(data.baseline_mean, label="one worker", zorder=1.5, **BASELINE)
    axes.margins(x=0.22)
    scale_by_range(axes, "x", means)
    axes.set_xlabel(data.measure.label)


def _speeds(axes: Axes, data: ChartData, rows: Sequence[Group | str]) -> None:
    from matplotlib.ticker import MaxNLocator

    for place, row in enumerate(rows):
        spread = row.spread("images_per_second") if isinstance(row, Group) and row.setting.is_live else None
        if isinstance(row, Group) and spread is not None:
            bar = axes.barh(place, spread.mean, 0.66, xerr=spread.std, capsize=3, color=data.looks[row.algorithm].color)
            axes.bar_label(bar, fmt="{:,.0f}", padding=4, fontsize=9)
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("images/s (live)")


def draw_by_time(data: ChartData) -> Figure | None:
    """Draw error over wall time of each algorithm, in a panel for each live setting; None without live runs."""
    live = {setting: groups for setting, groups in by_setting(data.groups).items() if setting.is_live}
    figures = [
        [
            (each, wall, error)
            for each in groups
            if (wall := each.spread("wall_seconds")) and (error := _error(data, each))
        ]
        for groups in live.values()
    ]
    if not any(figures):
        return None
    figure, panels = make_panels(len(live), inches=(4.8, 3.4), share=True)
    for axes, setting, points in zip(panels, live, figures, strict=True):
        for each, wall, error in points:
            look = data.looks[each.algorithm]
            whiskers: dict[str, Any] = {"xerr": wall.std, "yerr": error.std, "capsize": 3, "linestyle": "none"}
            point: dict[str, Any] = {"color": look.color, "marker": look.marker, "markersize": 8.0}
            axes.errorbar(wall.mean, error.mean, label=each.algorithm, **point, **whiskers)
        axes.set_title(setting.title)
        axes.set_xlabel("wall time of training (s)")
        axes.margins(x=0.15, y=0.15)
    panels[0].set_ylabel(data.measure.label)
    scale_by_range(panels[0], "x", [wall.mean for points in figures for _, wall, _ in points])
    scale_by_range(panels[0], "y", [error.mean for points in figures for _, _, error in points])
    legend_below(figure, panels)
    return figure


def _error(data: ChartData, each: Group) -> Spread | None:
    return each.spread(data.measure.key)
