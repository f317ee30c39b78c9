"""The data that the charts of a comparison show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from danaz.compare.results import ComparisonOutcome, Group, Measure, Setting, group
from danaz.report.curves import Curves, read_curves
from danaz.report.paper import Paper, papers_of
from danaz.report.style import Look, looks


@dataclass(frozen=True)
class ChartData:
    """The finished cells of a comparison. Simulated runs with one worker are the baseline."""

    name: str  # what the experiment is called
    groups: Sequence[Group]  # all but the baseline
    baseline: Group | None
    measure: Measure
    papers: Sequence[Paper]
    looks: Mapping[str, Look]  # by algorithm
    curves: Mapping[tuple[str, Setting], Sequence[Curves]]  # one per seed

    @property
    def baseline_mean(self) -> float | None:
        """The measure of the baseline; None if there is none."""
        spread = self.baseline.spread(self.measure.key) if self.baseline else None
        return spread.mean if spread else None

    def curves_of(self, each: Group) -> Sequence[Curves]:
        """Return the curves of a group, one per seed."""
        return self.curves[each.algorithm, each.setting]


def collect(outcome: ComparisonOutcome) -> ChartData:
    """Read all that the charts need from the cells' folders. Raises UnreadableError, OSError."""
    every = group(outcome.finished)
    others = [each for each in every if not each.setting.is_baseline]
    return ChartData(
        name=outcome.config["name"],
        groups=others,
        baseline=next((each for each in every if each.setting.is_baseline), None),
        measure=outcome.measure,
        papers=papers_of(outcome.config),
        looks=looks(each.algorithm for each in others),
        curves={
            (each.algorithm, each.setting): [found for result in each.results if (found := read_curves(result))]
            for each in every
        },
    )
