"""The layer table: its slices, its form on the wire, and where each tensor lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from danaz.vectors import cutting
from danaz.vectors.layout import Layout
from danaz.vectors.model import FlatModel


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5), longest=st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_slices_tile_the_vector_group_by_group(sizes, longest):
    layout = Layout.from_lists([[["w", [sum(sizes)], [1]]], [], sizes])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "SLICE_FLOATS", longest)
        slices = list(layout.slices())
    assert all(start < stop and start // longest == (stop - 1) // longest for _, start, stop in slices)
    covered = [(group, at) for group, start, stop in slices for at in range(start, stop)]
    assert covered == [(group, at) for group, (start, stop) in enumerate(layout.groups) for at in range(start, stop)]
    assert len(covered) == layout.size


def test_lists_and_back():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    flat = FlatModel(net.to(memory_format=torch.channels_last))
    assert Layout.from_lists(flat.layout.to_lists()) == flat.layout


def test_an_entry_finds_itself_in_a_slice_of_a_vector():
    [entry] = Layout.from_lists([[["w", [2], [1]]], [], [2]]).parameters
    assert entry.of(torch.arange(5.0)[2:4]).tolist() == [2, 3]
