"""What the benchmarks of accuracy share: they simulate runs with several seeds, and print a table of test errors.

An error is the mean over the seeds, with the smallest and the largest in brackets.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from danaz.run.config import Config, load_config

Summary = dict[str, Any]
Row = tuple[Sequence[str], Sequence[Summary]]  # (the cells that identify the row, the summaries of its runs)


def make_parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """Return a parser with the options that all these benchmarks have; ``seeds`` is the default number of seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML of an experiment")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8], help="numbers of workers")
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds, from 0 upwards")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    return parser


def over_seeds(
    simulate: Callable[[Config, Path], Summary], config: str, overrides: Sequence[str], seeds: int
) -> list[Summary]:
    """Run a config once for each seed, in temporary folders. Returns the summaries."""
    summaries = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            summaries.append(simulate(load_config(config, [*overrides, f"seed={seed}"]), Path(folder)))
    return summaries


def print_table(columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Print each row as soon as its runs are over; ``columns`` has the titles of the cells that identify rows."""
    headings = [*columns, "test error %", "mean gap"]
    _print_line(headings)
    _print_line(["---"] * len(headings))
    for cells, summaries in rows:
        _print_line([*cells, _error(summaries), _gap(summaries)])


def _print_line(cells: Sequence[str]) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


def _error(summaries: Sequence[Summary]) -> str:
    errors = [summary["test_error_percent"] for summary in summaries]
    return f"{statistics.mean(errors):.2f} ({min(errors):.2f} to {max(errors):.2f})"


def _gap(summaries: Sequence[Summary]) -> str:
    gaps = [summary["mean_gap"] for summary in summaries if summary["mean_gap"] is not None]
    return f"{statistics.mean(gaps) if gaps else float('nan'):.3f}"
