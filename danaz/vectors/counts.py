"""How many gradients a state has taken in. Parameters without a gradient make no step, so each may have its own count.

Nearly always all counts are equal. So they are kept as runs of equal counts, and nobody pays for the rare case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """A number for each element of a vector: ``counts[0]`` up to the element ``stops[0]``, and so on."""

    stops: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, size: int, count: int = 0) -> Counts:
        """The same ``count`` for all elements of a vector f32[size]."""
        return cls((size,), (count,))

    def plus_one(self, absent: Sequence[tuple[int, int]] = ()) -> Counts:
        """Return these counts with 1 added outside of the ``absent`` spans, each (start, stop)."""
        more = Counts(self.stops, tuple(count + 1 for count in self.counts))
        return more.with_spans_of(self, absent) if absent else more

    def with_spans_of(self, other: Counts, spans: Sequence[tuple[int, int]]) -> Counts:
        """Return these counts, but those of ``other`` in ``spans``, each (start, stop)."""
        runs: list[tuple[int, int]] = []  # (stop, count)
        start, rest = 0, sorted(spans, reverse=True)
        mine, others = (deque(zip(each.stops, each.counts, strict=True)) for each in (self, other))
        while mine:
            while rest and rest[-1][1] <= start:
                rest.pop()
            begin, end = rest[-1] if rest else (self.stops[-1], self.stops[-1])
            is_within = begin <= start < end
            stop = min(mine[0][0], others[0][0], end if is_within else max(begin, start + 1))
            count = others[0][1] if is_within else mine[0][1]
            if runs and runs[-1][1] == count:
                runs.pop()
            runs.append((stop, count))
            start = stop
            for each in (mine, others):
                if each[0][0] == stop:
                    each.popleft()
        return Counts(tuple(stop for stop, _ in runs), tuple(count for _, count in runs))

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (start, stop, count) of each run of equal counts in a slice."""
        for edge, count in zip(self.stops, self.counts, strict=True):
            if edge > start:
                yield start, min(edge, stop), count
                start = edge
            if start >= stop:
                return

    def to_lists(self) -> list[list[int]]:
        """The form in which a checkpoint holds the counts."""
        return [list(self.stops), list(self.counts)]

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int]]) -> Counts:
        """The counts that ``to_lists`` wrote."""
        stops, counts = lists
        return cls(tuple(stops), tuple(counts))
