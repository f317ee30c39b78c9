"""Parts of flat vectors: tiles, chunks, slices of several vectors, and vectors that are only announced."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from danaz.vectors.cutting import SLICE_FLOATS, all_finite, announced, chunks, cut, is_announced, tiles


@given(start=st.integers(0, 50), size=st.integers(0, 100), floats=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_tiles_cover_a_span_and_cross_no_multiple(start, size, floats):
    spans = list(tiles(start, start + size, floats))
    assert [at for first, last in spans for at in range(first, last)] == list(range(start, start + size))
    assert all(first < last and first // floats == (last - 1) // floats for first, last in spans)


def test_a_vector_travels_in_slices_of_1_MB():
    assert 4 * SLICE_FLOATS == 1 << 20
    assert list(chunks(2 * SLICE_FLOATS + 1)) == [
        (0, SLICE_FLOATS),
        (SLICE_FLOATS, 2 * SLICE_FLOATS),
        (2 * SLICE_FLOATS, 2 * SLICE_FLOATS + 1),
    ]
    assert list(chunks(0)) == []


def test_several_vectors_are_cut_alike_and_not_copied():
    vectors = {"a": torch.arange(5.0), "b": torch.zeros(5)}
    part = cut(vectors, 1, 3)
    part["a"].add_(1)
    part["b"].fill_(7)
    assert vectors["a"].tolist() == [0, 2, 3, 3, 4]
    assert vectors["b"].tolist() == [0, 7, 7, 0, 0]


def test_an_announced_vector_has_a_size_and_no_memory():
    vector = announced(1 << 40)
    assert vector.numel() == 1 << 40
    assert is_announced(vector)
    assert vector.untyped_storage().nbytes() == 4
    assert not is_announced(torch.zeros(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_anywhere(value):
    for at in range(5):
        vector = torch.zeros(5)
        assert all_finite(vector)
        vector[at] = value
        assert not all_finite(vector)


def test_nothing_and_what_is_only_announced_count_as_finite():
    assert all_finite(torch.empty(0))
    assert all_finite(announced(1 << 40))
