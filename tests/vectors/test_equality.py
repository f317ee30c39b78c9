"""Vectors are compared byte for byte where that is enough, and otherwise as torch compares them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from danaz.vectors.equality import are_equal

SOME = torch.tensor([1.0, -2.0, 0.0, float("inf")])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SOME, SOME.clone()),
        (SOME, SOME + torch.tensor([0.0, 0.0, 1e-30, 0.0])),
        (SOME, -SOME),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (SOME, SOME[:3]),
        (SOME[::2], SOME[::2].clone()),
        (SOME[1:3], SOME[1:3].clone()),
        (torch.empty(0), torch.empty(0)),
    ],
)
def test_the_answer_is_that_of_torch(one: Tensor, other: Tensor) -> None:
    assert are_equal(one, other) == torch.equal(one, other)


def test_a_single_changed_element_is_seen_wherever_it_is() -> None:
    vector = torch.arange(1000.0)
    for place in (0, 1, 500, 999):
        changed = vector.clone()
        changed[place] += 1e-3
        assert not are_equal(vector, changed)


def test_the_same_nan_is_equal() -> None:
    vector = torch.tensor([1.0, float("nan")])
    assert are_equal(vector, vector.clone())
