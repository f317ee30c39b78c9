"""What the commands print for people: the figures of a run, tables of results, the list of algorithms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, product
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from danaz.compare.results import TEST_ERROR, ComparisonOutcome, measure_of
from danaz.compare.tables import comparison_rows, figure
from danaz.compare.tune import Tuning
from danaz.optimizers import Adagrad, Adam, NAdam, Optimizer, Optimizers, RMSprop, Sgd
from danaz.rules import ALGORITHMS, Algorithm, Rule
from danaz.simulate.speedup import Speedup

PLAIN_WIDTH = 120  # characters of a line of a comparison's table, without a terminal
SHOWN = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256)  # numbers of workers in the table of speed-ups, if there are many

SHOWN_WORKERS = 16  # rows of the table of a run's workers
SLOW = 0.5  # a worker below this share of the median speed is called slow
SPENT = {  # what a worker's time goes into: its key in summary.json, and what people call it
    "computing_seconds": "compute",
    "exchanging_seconds": "exchange",
    "waiting_seconds": "wait",
    "reading_seconds": "read",
}

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
    for title, key, unit in _with_measure(summary):
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
    if summary.get("schedule") == "live" and len(summary.get("per_worker", {})) > 1:
        console.print()
        console.print(workers_table(summary["per_worker"]))
        console.print()
    console.print(f"everything is in {run}", soft_wrap=True)


def _with_measure(summary: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    """Return SUMMARY_ROWS with the figure by which the run is judged, before the test error."""
    measure, keys = measure_of([summary]), [key for _, key, _ in SUMMARY_ROWS]
    if measure.key in keys:
        return SUMMARY_ROWS
    place = keys.index(TEST_ERROR.key)
    return (*SUMMARY_ROWS[:place], (measure.label, measure.key, ""), *SUMMARY_ROWS[place:])


def workers_table(per_worker: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table with a row for each worker, the slowest first: how fast it was, and what its time went into.

    A slow worker is marked with its share of the median speed.
    """
    restarts = any(facts["restarts"] for facts in per_worker.values())
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("worker", no_wrap=True)
    table.add_column("host", overflow="ellipsis")  # the only column that a narrow terminal makes narrower
    for heading in ("ranks", "samples/s", "lag", *SPENT.values(), *["restarts"] * restarts):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    speed = {worker: float(facts["samples_per_second"] or 0.0) for worker, facts in per_worker.items()}
    usual = median(speed.values())
    for worker in sorted(speed, key=lambda name: speed[name])[:SHOWN_WORKERS]:
        facts = per_worker[worker]
        spent = [facts[name] for name in SPENT]
        table.add_row(
            worker,
            escape(facts["host"]) or "–",
            str(facts["ranks"]),
            figure(speed[worker]),
            figure(facts["median_lag"]),
            *(f"{each / sum(spent):.0%}" if any(spent) else "–" for each in spent),
            *[str(facts["restarts"])] * restarts,
            f"[bold red]slow: {speed[worker] / usual:.2g}×[/]" if speed[worker] < SLOW * usual else "",
        )
    if len(speed) > SHOWN_WORKERS:
        table.caption = f"and {len(speed) - SHOWN_WORKERS} faster ones: see per_worker in summary.json"
    return table


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


def print_tuning(tuning: Tuning) -> None:
    """Print the grid, with momenta as rows and learning rates as columns and the best figure in bold."""
    table = Table("momentum \\ lr", title=f"{tuning.config.algorithm}, {tuning.measure.label}")
    for lr in tuning.lrs:
        table.add_column(f"{lr:g}", justify="right")
    for momentum in tuning.momenta:
        table.add_row(f"{momentum:g}", *(_grid_cell(tuning, lr, momentum) for lr in tuning.lrs))
    console = Console()
    console.print(table)
    if tuning.best is not None:
        lr, momentum = tuning.best
        console.print(f"best: lr {lr:g}, momentum {momentum:g}")
    for name, reason in tuning.failures.items():
        console.print(f"[red]failed[/] {name}: {reason}")


def _grid_cell(tuning: Tuning, lr: float, momentum: float) -> str:
    measured = tuning.figure(lr, momentum)
    if measured is None:
        return "–"
    text = f"{measured:.4g}" + (" diverged" if tuning.summaries[lr, momentum]["diverged"] else "")
    return f"[bold]{text}[/]" if tuning.best == (lr, momentum) else text


def print_speedup(panels: Sequence[Speedup]) -> None:
    """Print a row for each number of workers in SHOWN, or for every number if there are few."""
    table = Table("workers")
    for panel in panels:
        table.add_column(f"asynchronous\n{panel.machines}", justify="right")
        table.add_column(f"synchronous\n{panel.machines}", justify="right")
    workers = panels[0].workers
    for row, n in enumerate(workers):
        if n in SHOWN or len(workers) <= len(SHOWN):
            cells = [f"{mean:.2f}" for p in panels for mean in (p.asynchronous[row], p.synchronous[row])]
            table.add_row(str(n), *cells)
    Console().print(table)


FROM_THE_OPTIMIZER = ("momentum", "lr_correction", "weight_decay")  # not shown: not specific to an algorithm


def print_algorithms() -> None:
    """Print every algorithm with what its rule declares. What is not mentioned, the rule does not use."""
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
            "takes": ["your own class of optimizer"] if algorithm.takes_own else [],
            "adds": [_option(algorithm, k, v) for k, v in options.items() if (k, v) != ("sync_period", 1)],
        }
        told = "; ".join(f"{title}: {', '.join(values)}" for title, values in facts.items() if values)
        table.add_row(name, f"{algorithm.summary}\n[dim]{told}\n{algorithm.paper}[/]")
    Console().print(table)
    _print_vectors()


def _option(algorithm: Algorithm, name: str, default: object) -> str:
    others = [value for value in algorithm.choices.get(name, ()) if value != default]
    return f"{name} {default} (or {', '.join(others)})" if others else f"{name} {default}"


# An optimizer of each kind that a user may wrap, as torch makes it by default; RMSprop with a momentum to look along.
WRAPPED: dict[str, Optimizer] = {
    "SGD": Sgd(),
    "Adam": Adam(),
    "AdamW": Adam(weight_decay=0.01),
    "NAdam": NAdam(),
    "RMSprop": RMSprop(momentum=0.9),
    "Adagrad": Adagrad(),
}


MEMORY = (
    "Memory, in vectors of the model's size: what the server of N workers keeps beside the parameters and, in "
    "brackets, what each worker keeps."
)


def _print_vectors() -> None:
    """Print how many vectors each algorithm keeps for each optimizer, and why it does not carry out some."""
    table = Table(box=None, padding=(0, 1, 0, 0))  # with one column of padding, it fits into 80
    for heading in ("", *WRAPPED):
        table.add_column(heading, no_wrap=True)
    reasons: dict[str, str] = {}
    for name, algorithm in ALGORITHMS.items():
        if algorithm.choices:
            table.add_row(f"[bold]{name}[/]")
        for choice in _choices(algorithm):
            cells = []
            for optimizer in map(Optimizers, ([each] for each in WRAPPED.values())):
                reason = algorithm.refusal(optimizer)
                cells.append("–" if reason else vectors_of(algorithm.rule(optimizer=optimizer, **choice)))
                if reason:
                    reasons.setdefault(name, reason)
            table.add_row(f"  {', '.join(choice.values())}" if choice else f"[bold]{name}[/]", *cells)
    console = Console()
    console.print(f"{MEMORY}\n")
    console.print(table)
    console.print("\n–: it is refused.", *[f"\n  {reason}" for reason in reasons.values()], highlight=False)


def _choices(algorithm: Algorithm) -> Iterator[dict[str, Any]]:
    """Yield each way to choose among the algorithm's rules; one that chooses nothing if it has only one rule."""
    for values in product(*algorithm.choices.values()):
        yield dict(zip(algorithm.choices, values, strict=True))


def vectors_of(rule: Rule) -> str:
    """Return how many vectors a rule keeps beside the parameters: on the server and, in brackets, on each worker."""
    for_each, shared = len(rule.worker_state) + rule.needs_view, len(rule.shared_state)
    for_workers = [f"{for_each}N" if for_each > 1 else "N"] if for_each else []
    on_server = " + ".join([*for_workers, *[str(shared)] * (shared > 0)]) or "0"
    on_worker = len(rule.worker_rule.worker_state)
    return f"{on_server} ({on_worker})" if on_worker else on_server
