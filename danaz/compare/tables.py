"""Tables on the terminal: the summary of a run, the results of a comparison, the list of algorithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from danaz.compare.results import TEST_ERROR, ComparisonOutcome, Group, Spread, group


def figure(value: Any, digits: int = 4, unit: str = "") -> str:
    """A figure as text for people; a dash if there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}g}{unit}"
    return f"{value}{unit}"


def accuracy(error_percent: float | None) -> str:
    """The test accuracy in percent that belongs to a test error."""
    return "–" if error_percent is None else f"{100 - error_percent:.2f}"


SUMMARY_ROWS = (  # title, key of summary.json, unit
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
    """Print the figures of a run, and anything unusual about it."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for title, key, unit in SUMMARY_ROWS:
        table.add_row(title, figure(summary.get(key), unit=unit))
    if not summary.get("complete", True):
        table.add_row("[bold red]incomplete[/]", "the run ended before its last batch")
    if summary.get("diverged"):
        table.add_row("[bold red]diverged[/]", str(summary.get("diverged_because")))
    if summary.get("stopped"):
        table.add_row("[bold yellow]stopped early[/]", escape(str(summary["stopped"])))
    for reason, count in (summary.get("refusals") or {}).items():
        table.add_row("refused", f"{count} × {reason}")
    console = Console()
    console.print(table)
    console.print(f"everything is in {run}", soft_wrap=True)


class Column(NamedTuple):
    """A column in the table of a comparison: a figure of the summaries, as the mean over the seeds."""

    title: str
    key: str
    decimals: int
    of_hundred: bool = False  # show 100 minus the figure: an error in percent as an accuracy

    def cell(self, each: Group, with_std: bool) -> str:
        spread = each.spread(self.key)
        if spread is None:
            return "–"
        mean = 100 - spread.mean if self.of_hundred else spread.mean
        return Spread(mean, spread.std if with_std else None).text(self.decimals)


PLAIN_WIDTH = 120  # characters, without a terminal
COLUMNS = (
    Column("test accuracy %", TEST_ERROR.key, 2, of_hundred=True),
    Column("train loss", "final_train_loss", 4),
    Column("images/s", "images_per_second", 0),
    Column("mean lag", "mean_lag", 2),
    Column("mean gap", "mean_gap", 4),
    Column("wall time s", "wall_seconds", 1),
)


def comparison_rows(outcome: ComparisonOutcome) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a comparison's table, one row per group. Terminal, Markdown and HTML show the same table."""
    measure = outcome.measure
    columns = [column for column in COLUMNS if measure is TEST_ERROR or column.key != TEST_ERROR.key]
    titles = ["algorithm", "run as", *(column.title for column in columns), "remark"]
    rows = [
        [
            each.algorithm,
            each.setting.label,
            *(column.cell(each, with_std=column.key == measure.key) for column in columns),
            remark(each),
        ]
        for each in group(outcome.results)
    ]
    return titles, rows


def remark(each: Group) -> str:
    """What the figures of a group do not show: how many seeds it has, and how many cells diverged or failed."""
    seeds = len(each.results)
    of = f" {{}} of {seeds}" if seeds > 1 else ""
    failed = seeds - len(each.finished)
    words = [f"{len(each.finished)} seeds"] if len(each.finished) > 1 else []
    words += ["gap of the look-ahead"] if any(r.summary.get("gap_of") == "lookahead" for r in each.results) else []
    words += [f"diverged{of.format(each.diverged)}"] if each.diverged else []
    words += [f"FAILED{of.format(failed)}"] if failed else []
    return ", ".join(words)


def print_comparison(outcome: ComparisonOutcome) -> None:
    """Print the table of a comparison, and below it each failed cell with its reason and logs."""
    (_, _, *titles), rows = comparison_rows(outcome)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("algorithm", no_wrap=True)
    for title in titles:
        heading = title.replace(" ", "\n", 1)
        table.add_column(heading, justify="left" if title == "remark" else "right", no_wrap=title != "remark")
    for how, members in groupby(rows, key=lambda row: row[1]):
        table.add_row(f"[bold]{how}[/]")
        for algorithm, _, *figures in members:
            style = "red" if "FAILED" in figures[-1] else "yellow" if "diverged" in figures[-1] else None
            table.add_row(f"  {algorithm}", *figures, style=style)
        table.add_section()
    console = Console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH  # rich would assume 80 columns
    console.print(table)
    for failed in outcome.failed:
        console.print(f"[bold red]failed:[/] {failed.algorithm}, {failed.setting.label}, seed {failed.seed}:", end=" ")
        console.print(str(failed.failure), markup=False, soft_wrap=True)
        console.print(f"  its logs: {failed.folder / 'logs'}", soft_wrap=True)


FROM_THE_OPTIMIZER = ("momentum", "lr_correction", "weight_decay")  # not shown: not specific to an algorithm


def print_algorithms() -> None:
    """Print every algorithm with what its rule declares. What is not mentioned, the rule does not use."""
    from danaz.rules import ALGORITHMS

    table = Table(show_header=False, box=None, padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True, style="bold")
    for name, algorithm in ALGORITHMS.items():
        rule = algorithm.rule()
        options = {k: v for k, v in algorithm.hyperparameters.items() if k not in FROM_THE_OPTIMIZER}
        facts: dict[str, Sequence[str]] = {
            "pushes": [rule.pushes],
            "in rounds": ["all workers wait for each other"] if rule.barrier else [],
            "server keeps": rule.shared_state,
            "server keeps for each worker": (*rule.worker_state, *["view"] * rule.needs_view),
            "each worker keeps": rule.worker_rule.worker_state,
            "adds": [f"{k} {v}" for k, v in options.items() if (k, v) != ("sync_period", 1)],
        }
        told = "; ".join(f"{title}: {', '.join(values)}" for title, values in facts.items() if values)
        table.add_row(name, f"{algorithm.summary}\n[dim]{told}\n{algorithm.paper}[/]")
    Console().print(table)
