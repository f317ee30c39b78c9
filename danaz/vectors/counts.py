"""How many gradients a state has taken in, and at which rate the last of them.

Parameters without a gradient make no step, so each may have its own count, and its own last rate: what the momentum in
its state will still cause is what it would have caused before the others moved on. Nearly always all elements of a
parameter group are equal. So they are kept as runs of equal elements, and nobody pays for the rare case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counts:
    """Two numbers for each element of a vector, in runs: ``counts[0]`` and ``rates[0]`` up to ``stops[0]``, and so on.

    A rate is η of the last gradient, and 0 before the first.
    """

    stops: tuple[int, ...]
    counts: tuple[int, ...]
    rates: tuple[float, ...]

    @classmethod
    def of(cls, size: int, count: int = 0) -> Counts:
        """The same ``count`` for all elements of a vector f32[size]."""
        return cls((size,), (count,), (0.0,))

    def plus_one(
        self, groups: Sequence[tuple[int, int]], lr: Sequence[float], absent: Sequence[tuple[int, int]] = ()
    ) -> Counts:
        """Return these counts after a gradient outside of the ``absent`` spans, each (start, stop).

        ``groups`` are the spans of the parameter groups, which tile the vector, and ``lr`` their rates.
        """
        counts = Counts(self.stops, tuple(count + 1 for count in self.counts), self.rates)
        more = counts.at_rates(groups, lr)
        return more.with_spans_of(self, absent) if absent else more

    def at_rates(self, groups: Sequence[tuple[int, int]], lr: Sequence[float]) -> Counts:
        """Return these counts with other rates: those of the parameter groups, as in ``plus_one``."""
        rates = [(stop, rate) for (_, stop), rate in zip(groups, lr, strict=True)]
        return Counts._of_runs((stop, count, rate) for stop, (count, _), rate in _pieces(self._columns, rates))

    def with_spans_of(self, other: Counts, spans: Sequence[tuple[int, int]]) -> Counts:
        """Return these counts, but those of ``other`` in ``spans``, each (start, stop)."""
        edges = [(min(edge, self.stops[-1]), is_end) for span in sorted(spans) for is_end, edge in enumerate(span)]
        is_within = [*edges, (self.stops[-1], 0)]
        return Counts._of_runs(
            (stop, *(theirs if within else mine))
            for stop, mine, theirs, within in _pieces(self._columns, other._columns, is_within)
        )

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int, float]]:
        """Yield (start, stop, count, rate) of each run of equal elements in a slice."""
        for edge, count, rate in zip(self.stops, self.counts, self.rates, strict=True):
            if edge > start:
                yield start, min(edge, stop), count, rate
                start = edge
            if start >= stop:
                return

    def to_lists(self) -> list[list[Any]]:
        """The form in which a checkpoint holds the counts."""
        return [list(self.stops), list(self.counts), list(self.rates)]

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[Any]]) -> Counts:
        """The counts that ``to_lists`` wrote. Those of an earlier version have no rates, which are 0 then."""
        stops, counts, *rates = map(tuple, lists)
        return cls(stops, counts, rates[0] if rates else (0.0,) * len(stops))

    @property
    def _columns(self) -> list[tuple[int, tuple[int, float]]]:
        return list(zip(self.stops, zip(self.counts, self.rates, strict=True), strict=True))

    @classmethod
    def _of_runs(cls, runs: Iterable[tuple[int, int, float]]) -> Counts:
        """Join neighbours that are equal."""
        joined: list[tuple[int, int, float]] = []
        for run in runs:
            if joined and joined[-1][1:] == run[1:]:
                joined.pop()
            joined.append(run)
        stops, counts, rates = zip(*joined, strict=True)
        return cls(stops, counts, rates)


def _pieces(*lists: Sequence[tuple[int, Any]]) -> Iterator[tuple[Any, ...]]:
    """Yield (stop, value of each list) of every piece in which none of several lists of (stop, value) changes.

    All lists end at the same stop. A run of a list may be empty.
    """
    places = [0] * len(lists)
    for stop in sorted({stop for each in lists for stop, _ in each if stop > 0}):
        for number, each in enumerate(lists):
            while each[places[number]][0] < stop:
                places[number] += 1
        yield stop, *(each[place][1] for each, place in zip(lists, places, strict=True))
