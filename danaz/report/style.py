"""The look of charts: markers, and colours that colour-blind readers can distinguish (Okabe and Ito 2008)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito without yellow, which is hard to see on white. Black is for the baseline.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*<>hp"
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1, 1.2)))  # the next one each time that the colours repeat
BASELINE: dict[str, Any] = {"color": "#000000", "linestyle": (0, (6, 3)), "linewidth": 1.4}
FAVOURITES = ("dana", "nag-asgd", "ssgd", "asgd", "multi-asgd", "dana-ga")  # each looks the same in every report

RC: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 3.2,  # long enough to show the dashes on both sides of the marker
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "savefig.dpi": 150,
    "svg.fonttype": "path",
}

PANEL_INCHES = (4.3, 3.0)
PANELS_A_ROW = 3
LEAST_WIDTH_INCHES = 6.4
LEGEND_ENTRY_INCHES = 1.6
MANY_DECADES = 300.0  # largest over smallest figure, from which only powers of ten are labelled
LOGARITHMIC_FROM = 8.0  # largest over smallest figure, from which a scale is logarithmic


class Look(NamedTuple):
    """The look of one algorithm in every chart."""

    color: str
    marker: str
    linestyle: Any

    @property
    def line(self) -> dict[str, Any]:
        """Keyword arguments for Axes.plot."""
        return self._asdict()


def looks(algorithms: Iterable[str]) -> dict[str, Look]:
    """Return a different look for each algorithm.

    FAVOURITES keep their looks. The others share the colours of favourites in ``algorithms`` last.
    """
    names, colours = list(dict.fromkeys(algorithms)), len(COLOURS)
    favourites = {name: number for number, name in enumerate(FAVOURITES) if name in names}
    others = [name for name in names if name not in FAVOURITES]
    rest = range(len(FAVOURITES), len(FAVOURITES) + colours * (1 + len(others) // colours))
    rest_in_order = sorted(rest, key=lambda n: (n // colours, n % colours in favourites.values()))
    numbers = favourites | dict(zip(others, rest_in_order, strict=False))
    return {
        name: Look(
            COLOURS[numbers[name] % colours],
            MARKERS[numbers[name] % len(MARKERS)],
            DASHES[numbers[name] // colours % len(DASHES)],
        )
        for name in names
    }


def make_panels(
    count: int, inches: tuple[float, float] = PANEL_INCHES, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """Make a figure of ``count`` panels of ``inches`` (width, height) each; with ``share``, their scales are equal."""
    from matplotlib.figure import Figure

    columns = min(count, PANELS_A_ROW)
    rows = -(-count // columns)
    size = (max(inches[0] * columns, LEAST_WIDTH_INCHES), inches[1] * rows + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def legend_below(figure: Figure, panels: Sequence[Axes]) -> None:
    """Draw one legend for all panels, below them."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        columns = min(len(entries), int(figure.get_figwidth() / LEGEND_ENTRY_INCHES))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def scale_by_range(axes: Axes, which: Literal["x", "y"], figures: Iterable[float]) -> None:
    """Scale an axis from zero, or logarithmically if the largest figure is LOGARITHMIC_FROM times the smallest."""
    known = list(figures)
    if not known or min(known) <= 0 or max(known) < LOGARITHMIC_FROM * min(known):
        axes.set(**{f"{which}lim": (0, None)})
        return
    logarithmic(axes, which)


def logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """Use a logarithmic scale with plain numbers as labels: 1, 2 and 5 of each decade, or 1 if there are many."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < MANY_DECADES * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def as_files(figure: Any, stem: str) -> dict[str, bytes]:
    """Save a matplotlib figure as PNG and SVG. Returns {name of a file: its content}."""
    contents = {}
    for kind in ("png", "svg"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind)
        contents[f"{stem}.{kind}"] = buffer.getvalue()
    return contents
