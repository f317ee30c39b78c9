"""Figures as text, and the table of a comparison that terminal, Markdown and HTML show."""

from __future__ import annotations

from typing import Any, NamedTuple

from danaz.compare.results import TEST_ERROR, TRAIN_LOSS, ComparisonOutcome, Group, Spread, group


def figure(value: Any, digits: int = 4, unit: str = "") -> str:
    """Return a figure as text for people; a dash if there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}g}{unit}"
    return f"{value}{unit}"


def accuracy(error_percent: float | None) -> str:
    """Return the test accuracy in percent that belongs to a test error."""
    return "–" if error_percent is None else f"{100 - error_percent:.2f}"


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


ACCURACY = Column("test accuracy %", TEST_ERROR.key, 2, of_hundred=True)
COLUMNS = (
    Column("train loss", TRAIN_LOSS.key, 4),
    Column("images/s", "images_per_second", 0),
    Column("mean lag", "mean_lag", 2),
    Column("mean gap", "mean_gap", 4),
    Column("wall time s", "wall_seconds", 1),
)


def comparison_rows(outcome: ComparisonOutcome) -> tuple[list[str], list[list[str]]]:
    """Return the titles and rows of a comparison's table, one row per group."""
    measure, groups = outcome.measure, group(outcome.results)
    columns = [] if measure in (TEST_ERROR, TRAIN_LOSS) else [Column(measure.label, measure.key, measure.decimals)]
    if any(each.spread(TEST_ERROR.key) for each in groups):
        columns.append(ACCURACY)
    columns += COLUMNS
    titles = ["algorithm", "run as", *(column.title for column in columns), "remark"]
    rows = [
        [
            each.algorithm,
            each.setting.label,
            *(column.cell(each, with_std=column.key == measure.key) for column in columns),
            remark(each),
        ]
        for each in groups
    ]
    return titles, rows


def remark(each: Group) -> str:
    """Return what the figures of a group do not show: how many seeds it has, and how many cells diverged or failed."""
    seeds = len(each.results)
    of = f" {{}} of {seeds}" if seeds > 1 else ""
    failed = seeds - len(each.finished)
    words = [f"{len(each.finished)} seeds"] if len(each.finished) > 1 else []
    words += ["gap of the look-ahead"] if any(r.summary.get("gap_of") == "lookahead" for r in each.results) else []
    words += [f"diverged{of.format(each.diverged)}"] if each.diverged else []
    words += [f"FAILED{of.format(failed)}"] if failed else []
    return ", ".join(words)
