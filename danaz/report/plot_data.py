"""What the charts of a comparison draw from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from danaz.compare.results import Group, Measure, Outcome, Setting, group, measure_of
from danaz.report.curves import Curves, read_curves
from danaz.report.paper import Paper, papers_of
from danaz.report.style import Look, looks


@dataclass(frozen=True)
class Data:
    """The finished cells, the baseline apart from the others."""

    name: str  # of the experiment
    groups: Sequence[Group]
    baseline: Group | None
    measure: Measure
    papers: Sequence[Paper]
    looks: Mapping[str, Look]  # by algorithm
    curves: Mapping[tuple[str, Setting], Sequence[Curves]]  # one a seed

    @property
    def baseline_mean(self) -> float | None:
        spread = self.baseline.spread(self.measure.key) if self.baseline else None
        return spread.mean if spread else None

    def curves_of(self, each: Group) -> Sequence[Curves]:
        return self.curves[each.algorithm, each.setting]


def collect(outcome: Outcome) -> Data:
    """Read whatever the charts need from the cells' folders."""
    every = group(outcome.finished)
    others = [each for each in every if not each.setting.is_baseline]
    return Data(
        name=outcome.config["name"],
        groups=others,
        baseline=next((each for each in every if each.setting.is_baseline), None),
        measure=measure_of(outcome.results),
        papers=papers_of(outcome.config),
        looks=looks(each.algorithm for each in others),
        curves={
            (each.algorithm, each.setting): [found for result in each.results if (found := read_curves(result))]
            for each in every
        },
    )


def by_setting(groups: Sequence[Group]) -> dict[Setting, list[Group]]:
    """Algorithms that were run alike, together."""
    settings: dict[Setting, list[Group]] = {}
    for each in groups:
        settings.setdefault(each.setting, []).append(each)
    return settings


def by_kind(groups: Sequence[Group]) -> dict[tuple[int, str], list[Group]]:
    """Those that differ in algorithm and number of workers alone, by (ranks per worker, schedule)."""
    kinds: dict[tuple[int, str], list[Group]] = {}
    for each in groups:
        kinds.setdefault((each.setting.ranks_per_worker, each.setting.schedule), []).append(each)
    return kinds
