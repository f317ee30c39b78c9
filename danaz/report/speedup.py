"""Write the theoretical speed-up: as a CSV file and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from danaz.files.atomic import write_atomically
from danaz.report.style import COLOURS, MARKERS, RC, as_files
from danaz.simulate.speedup import Speedup


def write_speedup(panels: Sequence[Speedup], folder: Path) -> list[Path]:
    """Write speedup.csv, speedup.png and speedup.svg into ``folder``. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"speedup.csv": _as_csv(panels), **_as_figures(panels)}
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def _as_csv(panels: Sequence[Speedup]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["machines", "workers", "asynchronous", "synchronous", "asynchronous_std", "synchronous_std"])
    for panel in panels:
        columns = (panel.asynchronous, panel.synchronous, panel.asynchronous_std, panel.synchronous_std)
        for row, n in enumerate(panel.workers):
            kind = "heterogeneous" if panel.heterogeneous else "homogeneous"
            writer.writerow([kind, n, *(f"{column[row]:.6g}" for column in columns)])
    return text.getvalue().encode()


def _as_figures(panels: Sequence[Speedup]) -> dict[str, bytes]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(RC):
        figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 3.8), sharey=True, layout="constrained")
        for panel, ax in zip(panels, axes, strict=True):
            every = max(1, len(panel.workers) // 8)
            for name, mean, std, look in (
                ("asynchronous (DANA, ASGD, …)", panel.asynchronous, panel.asynchronous_std, 0),
                ("synchronous (SSGD)", panel.synchronous, panel.synchronous_std, 1),
            ):
                style = {"color": COLOURS[look], "marker": MARKERS[look], "markevery": every}
                ax.plot(panel.workers, mean, label=name, **style)
                ax.fill_between(panel.workers, mean - std, mean + std, color=COLOURS[look], alpha=0.18, linewidth=0)
            ax.set(title=panel.machines.capitalize(), xlabel="workers")
        axes[0].set_ylabel("speed-up over one worker")
        axes[0].legend(loc="upper left")
        contents = as_files(figure, "speedup")
        pyplot.close(figure)
    return contents
