"""Counts of gradients with their last rates, in runs of equal elements."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from danaz.vectors.counts import Counts

SIZE = 12
EDGES = st.lists(st.integers(0, SIZE), unique=True, max_size=8).map(sorted)
RATES = st.tuples(st.sampled_from([0.1, 0.2]), st.sampled_from([0.1, 0.2]))
Element = tuple[int, float]


def spans_of(edges: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(edges[::2], edges[1::2], strict=False))


def listed(counts: Counts, size: int = SIZE) -> list[Element]:
    return [(count, rate) for start, stop, count, rate in counts.runs(0, size) for _ in range(start, stop)]


def groups_of(edge: int) -> list[tuple[int, int]]:
    return [(0, edge), (edge, SIZE)]


def is_in(place: int, spans: tuple[tuple[int, int], ...]) -> bool:
    return any(start <= place < stop for start, stop in spans)


@given(st.integers(0, SIZE), st.lists(st.tuples(EDGES.map(spans_of), RATES), max_size=6))
def test_each_element_has_its_own_count_and_its_own_last_rate(edge, updates):
    counts, expected = Counts.of(SIZE), [(0, 0.0)] * SIZE
    for absent, rates in updates:
        counts = counts.plus_one(groups_of(edge), rates, absent)
        expected = [
            each if is_in(place, absent) else (each[0] + 1, rates[place >= edge]) for place, each in enumerate(expected)
        ]
        assert listed(counts) == expected
        runs = zip(counts.counts, counts.rates, strict=True)
        assert all(a != b for a, b in pairwise(runs)), "equal neighbours are one run"
    assert Counts.from_lists(counts.to_lists()) == counts


@given(EDGES.map(spans_of), EDGES.map(spans_of), EDGES.map(spans_of))
def test_slices_of_one_and_slices_of_another(first, second, spans):
    one = Counts.of(SIZE).plus_one([(0, SIZE)], [0.1], first)
    other = Counts.of(SIZE, 5).plus_one([(0, SIZE)], [0.2], second)
    expected = [listed(other if is_in(place, spans) else one)[place] for place in range(SIZE)]
    assert listed(one.with_spans_of(other, spans)) == expected


@given(EDGES.map(spans_of), st.integers(0, SIZE), st.integers(0, SIZE))
def test_the_runs_of_a_slice_are_those_within_it(absent, start, stop):
    counts = Counts.of(SIZE).plus_one([(0, SIZE)], [0.1], absent)
    runs = [(count, rate) for a, b, count, rate in counts.runs(start, stop) for _ in range(a, b)]
    assert runs == listed(counts)[start:stop]


def test_spans_beyond_the_vector_are_ignored():
    counts = Counts.of(4).plus_one([(0, 4)], [0.1], ((2, 99),))
    assert listed(counts, 4) == [(1, 0.1), (1, 0.1), (0, 0.0), (0, 0.0)]


def test_counts_of_an_earlier_version_have_no_rates():
    """A checkpoint held one rate for each parameter group beside them."""
    counts = Counts.from_lists([[2, 12], [3, 4]])
    assert counts.rates == (0.0, 0.0)
    assert Counts.from_lists([[2, 12], [3, 4]]).at_rates([(0, 5), (5, 12)], [0.1, 0.2]).to_lists() == [
        [2, 5, 12],
        [3, 4, 4],
        [0.1, 0.1, 0.2],
    ]
