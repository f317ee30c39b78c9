"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def figure(value: Any, digits: int = 4, unit: str = "") -> str:
    """A figure as people read it; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}g}{unit}"
    return f"{value}{unit}"


SUMMARY_ROWS = (
    ("algorithm", "algorithm", ""),
    ("workers", "workers", ""),
    ("ranks per worker", "ranks_per_worker", ""),
    ("collective", "collective", ""),
    ("schedule", "schedule", ""),
    ("updates", "updates", ""),
    ("epochs", "epochs", ""),
    ("final train loss", "final_train_loss", ""),
    ("test error", "test_error_percent", " %"),
    ("mean lag", "mean_lag", ""),
    ("mean gap", "mean_gap", ""),
    ("images/s", "images_per_second", ""),
    ("wall time", "wall_seconds", " s"),
)


def print_summary(summary: Mapping[str, Any], run: Path) -> None:
    """What a run came to."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for title, key, unit in SUMMARY_ROWS:
        table.add_row(title, figure(summary.get(key), unit=unit))
    if summary.get("diverged"):
        table.add_row("[bold red]diverged[/]", str(summary.get("diverged_because")))
    for reason, count in (summary.get("refusals") or {}).items():
        table.add_row("refused", f"{count} × {reason}")
    console = Console()
    console.print(table)
    console.print(f"everything is in {run}", soft_wrap=True)


def print_algorithms() -> None:
    """Every rule with what it declares."""
    from danaz.rules import ALGORITHMS

    table = Table("algorithm", "what it does", "pushes", "per worker", "shared", "paper")
    for name, algorithm in ALGORITHMS.items():
        rule = algorithm.rule()
        on_worker = [f"{vector} (on the worker)" for vector in rule.worker_rule.worker_state]
        kept = ", ".join([*rule.worker_state, *on_worker]) or "–"
        table.add_row(name, algorithm.summary, rule.pushes, kept, ", ".join(rule.shared_state) or "–", algorithm.paper)
    Console().print(table)
