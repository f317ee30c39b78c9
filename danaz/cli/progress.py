"""Shows progress: as a bar on a terminal, and as a few lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINES = 4  # printed in the course of a run where there is no terminal


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, float | None], None]]:
    """Yield a function that shows progress; it takes the share of the work that is done, and the last loss."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=1.0, loss="-")
        yield lambda share, loss: bar.update(task, completed=share, loss="-" if loss is None else f"{loss:.4g}")


def _lines(title: str) -> Callable[[float, float | None], None]:
    printed = 0

    def show(share: float, loss: float | None) -> None:
        nonlocal printed
        if share * LINES >= printed + 1:
            printed = int(share * LINES)
            print(f"{title}: {share:4.0%}  loss {'-' if loss is None else f'{loss:.4g}'}", file=sys.stderr, flush=True)

    return show
