"""Counts of gradients, in runs of equal counts."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from danaz.vectors.counts import Counts

SIZE = 12
EDGES = st.lists(st.integers(0, SIZE), unique=True, max_size=8).map(sorted)


def spans_of(edges: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(edges[::2], edges[1::2], strict=False))


def listed(counts: Counts) -> list[int]:
    return [count for start, stop, count in counts.runs(0, SIZE) for _ in range(start, stop)]


@given(st.lists(EDGES.map(spans_of), max_size=6))
def test_each_element_has_its_own_count(updates):
    counts, expected = Counts.of(SIZE), [0] * SIZE
    for absent in updates:
        counts = counts.plus_one(absent)
        expected = [
            count + (not any(start <= place < stop for start, stop in absent)) for place, count in enumerate(expected)
        ]
        assert listed(counts) == expected
        assert all(a != b for a, b in pairwise(counts.counts)), "equal neighbours are one run"
    assert Counts.from_lists(counts.to_lists()) == counts


@given(EDGES.map(spans_of), EDGES.map(spans_of), EDGES.map(spans_of))
def test_slices_of_one_and_slices_of_another(first, second, spans):
    one, other = Counts.of(SIZE).plus_one(first), Counts.of(SIZE, 5).plus_one(second)
    expected = [
        listed(other if any(start <= place < stop for start, stop in spans) else one)[place] for place in range(SIZE)
    ]
    assert listed(one.with_spans_of(other, spans)) == expected


@given(EDGES.map(spans_of), st.integers(0, SIZE), st.integers(0, SIZE))
def test_the_runs_of_a_slice_are_those_within_it(absent, start, stop):
    counts = Counts.of(SIZE).plus_one(absent)
    runs = list(counts.runs(start, stop))
    assert [count for a, b, count in runs for _ in range(a, b)] == listed(counts)[start:stop]


def test_spans_beyond_the_vector_are_ignored():
    assert listed(Counts.of(4).plus_one(((2, 99),)))[:4] == [1, 1, 0, 0]
