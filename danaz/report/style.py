"""How charts look: colours that the colour-blind tell apart (Okabe and Ito 2008), and a marker for each as well."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

# Okabe and Ito's, without the yellow, which white swallows; black is the baseline's.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX*<>hp"
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.5)), (0, (1, 1.2)))  # when the colours begin again
BASELINE: dict[str, Any] = {"color": "#000000", "linestyle": (0, (6, 3)), "linewidth": 1.4}
FAVOURITES = ("dana", "nag-asgd", "ssgd", "asgd", "multi-asgd", "dana-ga")  # these have the same looks in every report

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
    "lines.linewidth": 1.7,
    "lines.markersize": 5.5,
    "savefig.dpi": 150,
    "svg.fonttype": "path",
}


class Look(NamedTuple):
    """Of one algorithm, in every chart."""

    color: str
    marker: str
    linestyle: Any


def looks(algorithms: Iterable[str]) -> dict[str, Look]:
    """A look for each, no two alike."""
    names = list(dict.fromkeys(algorithms))
    ordered = [*FAVOURITES, *(name for name in names if name not in FAVOURITES)]
    return {
        name: Look(
            COLOURS[number % len(COLOURS)],
            MARKERS[number % len(MARKERS)],
            DASHES[number // len(COLOURS) % len(DASHES)],
        )
        for number, name in enumerate(ordered)
        if name in names
    }
