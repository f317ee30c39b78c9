"""The table of the papers: an algorithm a column, a number of workers a row, the error in the middle."""

from __future__ import annotations

from typing import NamedTuple

from danaz.compare.results import TEST_ERROR, Group, Outcome, Setting, group, measure_of
from danaz.report.paper import papers_of
from danaz.report.plot_data import by_kind


class Matrix(NamedTuple):
    """One such table, in words."""

    title: str
    header: list[str]
    rows: list[list[str]]


def matrices(outcome: Outcome) -> list[Matrix]:
    """One for each kind of run; beside our figures those of the paper whose experiment it is."""
    groups = group(outcome.results)
    baseline = next((each for each in groups if each.setting.is_baseline), None)
    kinds = by_kind([each for each in groups if not each.setting.is_baseline])
    every = [_matrix(outcome, *kind, members, baseline) for kind, members in kinds.items()]
    return [matrix for matrix in every if len(matrix.rows) > 1]


def _matrix(outcome: Outcome, ranks: int, schedule: str, groups: list[Group], baseline: Group | None) -> Matrix:
    baseline = None if schedule == "live" else baseline
    measure = measure_of(outcome.results)
    algorithms = list(dict.fromkeys(each.algorithm for each in groups))
    papers = papers_of(outcome.config) if measure is TEST_ERROR else []
    cells = {(each.algorithm, each.setting.workers): _ours(each, measure.key, measure.decimals) for each in groups}
    rows = []
    if baseline is not None:
        figures = [("1 (baseline)", _ours(baseline, measure.key, measure.decimals))]
        figures += [(paper.source, f"{paper.baseline:.2f}") for paper in papers if paper.schedule == schedule]
        rows += [[name] + [figure] * len(algorithms) for name, figure in figures]  # each of them is the baseline there
    for workers in sorted({each.setting.workers for each in groups}):
        rows.append([str(workers), *(cells.get((algorithm, workers), "") for algorithm in algorithms)])
        setting = Setting(workers, ranks, schedule)
        for paper in papers:
            theirs = [paper.error(algorithm, setting) for algorithm in algorithms]
            if any(error is not None for error in theirs):
                rows.append([paper.source, *("" if error is None else f"{error:.2f}" for error in theirs)])
    how = f"live, {ranks} rank{'s' * (ranks > 1)} per worker" if schedule == "live" else schedule
    return Matrix(f"{measure.label.capitalize()}, {how}", ["workers", *algorithms], rows)


def _ours(each: Group, key: str, decimals: int) -> str:
    spread = each.spread(key)
    figure = "–" if spread is None else spread.text(decimals)
    if each.diverged:
        figure += " diverged" if len(each.results) == 1 else f" ({each.diverged} of {len(each.results)} diverged)"
    return figure if each.finished else "failed"
