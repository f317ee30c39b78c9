"""The tables as in the papers: one column per algorithm, one row per number of workers, the error in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from danaz.compare.results import TEST_ERROR, ComparisonOutcome, Group, Kind, Measure, Setting, by_kind, group
from danaz.report.paper import Paper, papers_of


class Matrix(NamedTuple):
    """One table, as text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def matrices(outcome: ComparisonOutcome) -> list[Matrix]:
    """Return one table for each kind of run. If the experiment is a paper's, its figures stand below ours."""
    groups = group(outcome.results)
    baseline = next((each for each in groups if each.setting.is_baseline), None)
    kinds = by_kind(each for each in groups if not each.setting.is_baseline)
    papers = papers_of(outcome.config) if outcome.measure is TEST_ERROR else []
    every = [
        _matrix(kind, members, outcome.measure, papers, None if kind.is_live else baseline)
        for kind, members in kinds.items()
    ]
    return [matrix for matrix in every if len(matrix.rows) > 1]


def _matrix(
    kind: Kind, groups: Sequence[Group], measure: Measure, papers: Sequence[Paper], baseline: Group | None
) -> Matrix:
    algorithms = list(dict.fromkeys(each.algorithm for each in groups))
    cells = {(each.algorithm, each.setting.workers): _ours(each, measure) for each in groups}
    rows = []
    if baseline is not None:
        figures = [("1 (baseline)", _ours(baseline, measure))]
        figures += [(paper.source, f"{paper.baseline:.2f}") for paper in papers if paper.schedule == kind.schedule]
        rows += [[name] + [figure] * len(algorithms) for name, figure in figures]  # the same for every algorithm
    for workers in sorted({each.setting.workers for each in groups}):
        rows.append([str(workers), *(cells.get((algorithm, workers), "") for algorithm in algorithms)])
        setting = Setting(workers, kind.ranks_per_worker, kind.schedule)
        for paper in papers:
            theirs = [paper.error(algorithm, setting) for algorithm in algorithms]
            if any(error is not None for error in theirs):
                rows.append([paper.source, *("" if error is None else f"{error:.2f}" for error in theirs)])
    return Matrix(f"{measure.label.capitalize()}, {kind.label}", ["workers", *algorithms], rows)


def _ours(each: Group, measure: Measure) -> str:
    spread = each.spread(measure.key)
    figure = "–" if spread is None else spread.text(measure.decimals)
    if each.diverged:
        figure += " diverged" if len(each.results) == 1 else f" ({each.diverged} of {len(each.results)} diverged)"
    return figure if each.finished else "failed"
