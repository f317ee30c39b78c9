"""Test errors of simulated runs over several seeds: what the benchmarks of accuracy have in common.

Errors are means over the seeds and, in brackets, their least and largest.
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
Row = tuple[Sequence[str], Sequence[Summary]]  # what tells its runs from others', and the runs


def make_parser(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """The options that all have; ``seeds`` is a default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    return parser


def over_seeds(
    simulate: Callable[[Config, Path], Summary], config: str, overrides: Sequence[str], seeds: int
) -> list[Summary]:
    """One run of a config for each seed, in a folder of its own that nobody keeps."""
    summaries = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            summaries.append(simulate(load_config(config, [*overrides, f"seed={seed}"]), Path(folder)))
    return summaries


def print_table(columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Each row as soon as its runs are over; ``columns`` names what tells rows apart."""
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
