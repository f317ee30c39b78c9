"""What the ranks of a worker tell each other: numbers, tensors and small objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import ThreadGroup, on_each_rank
from torch import Tensor
from waiting import until

from danaz.worker import between
from danaz.worker.between import DifferentCallsError
from danaz.worker.group import SoloGroup

RANKS = 3
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def everywhere(work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """Return what all ranks got, after a check that none has failed."""
    results = on_each_rank(RANKS, work)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize(("op", "expected"), [("mean", 2.5), ("sum", 7.5), ("max", 4.0), ("min", 1.0)])
def test_numbers_are_reduced(op: str, expected: float) -> None:
    assert everywhere(lambda group: between.allreduce(group, 1.0 + 1.5 * group.rank, op)) == [expected] * RANKS


def test_whole_numbers_stay_whole_unless_one_is_not() -> None:
    large = 1 << 60
    sums = everywhere(lambda group: between.allreduce(group, large + group.rank, "sum"))
    assert sums == [3 * large + 3] * RANKS
    assert everywhere(lambda group: between.allreduce(group, 0 if group.rank else 0.5, "sum")) == [0.5] * RANKS
    flags = everywhere(lambda group: between.allreduce(group, group.rank == 1, "max"))
    assert flags == [True] * RANKS
    assert everywhere(lambda group: between.allreduce(group, np.float32(group.rank), "max")) == [2.0] * RANKS


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS, torch.bool])
@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_tensors_are_reduced_as_torch_would_do_it(dtype: torch.dtype, op: str) -> None:
    def values(rank: int) -> Tensor:
        return torch.tensor([[rank, 2 - rank, 100], [0, rank == 1, 1]]).to(dtype)

    every = torch.stack([values(rank) for rank in range(RANKS)])
    expected = {"sum": lambda: every.sum(0), "max": lambda: every.amax(0), "min": lambda: every.amin(0)}[op]()
    for result in everywhere(lambda group: between.allreduce(group, values(group.rank), op)):
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_mean_of_tensors_keeps_their_type_and_leaves_them_as_they_are(dtype: torch.dtype) -> None:
    def work(group: ThreadGroup) -> Tensor:
        value = torch.full((2, 2), float(group.rank), dtype=dtype, requires_grad=True)
        mean = between.allreduce(group, value)
        assert torch.equal(value, torch.full_like(value, group.rank))
        assert torch.equal(mean, between.mean(group, value))
        return mean

    for result in everywhere(work):
        assert torch.equal(result, torch.ones(2, 2, dtype=dtype))


def test_a_scalar_tensor_and_an_empty_one() -> None:
    assert [each.item() for each in everywhere(lambda g: between.allreduce(g, torch.tensor(g.rank), "sum"))] == [3] * 3
    assert [each.shape for each in everywhere(lambda g: between.allreduce(g, torch.empty(0, 2)))] == [(0, 2)] * 3


def test_tensors_of_different_shapes_are_gathered() -> None:
    def work(group: ThreadGroup) -> list[Tensor]:
        return between.allgather(group, torch.arange(group.rank * 3, dtype=torch.int16).reshape(group.rank, 3))

    for gathered in everywhere(work):
        assert [each.tolist() for each in gathered] == [[], [[0, 1, 2]], [[0, 1, 2], [3, 4, 5]]]


@pytest.mark.parametrize("length", [1, 5000])
def test_objects_are_gathered_and_broadcast(length: int) -> None:
    def value(rank: int) -> dict[str, Any]:
        return {"rank": rank, "text": "ä" * length * (rank + 1), "list": [None, True, 1.5, b"0", -(1 << 63)]}

    assert everywhere(lambda group: between.allgather(group, value(group.rank))) == [[value(r) for r in range(3)]] * 3
    for broadcast in (between.broadcast, between.broadcast_object):
        assert everywhere(lambda group, tell=broadcast: tell(group, value(group.rank))) == [value(0)] * RANKS


def test_rank_0s_tensor_reaches_ranks_that_have_none() -> None:
    """Values that nobody could sum arrive to the bit."""
    first = torch.tensor([[-0.0, float("nan")], [float("inf"), 1e-40]], dtype=torch.float64)

    def work(group: ThreadGroup) -> Tensor:
        told = between.broadcast(group, first if group.rank == 0 else None if group.rank == 1 else torch.zeros(5))
        assert isinstance(told, Tensor)
        return told

    for told in everywhere(work):
        assert torch.equal(told.view(torch.int64), first.view(torch.int64))


def test_what_is_gathered_stays_to_the_bit() -> None:
    for gathered in everywhere(lambda group: between.allgather(group, torch.tensor([-0.0, float("nan")]))):
        assert [each.view(torch.int32).tolist() for each in gathered] == [[-(1 << 31), 0x7FC00000]] * RANKS


@pytest.mark.parametrize(
    ("work", "error", "words"),
    [
        (lambda g: between.allreduce(g, torch.zeros(2 + g.rank)), ValueError, r"float32\[2\] by rank 0, float32\[3\]"),
        (lambda g: between.allreduce(g, "text"), TypeError, "takes a number or a tensor, not str"),
        (lambda g: between.allreduce(g, torch.zeros(2, dtype=torch.int64)), TypeError, r"give it value.float\(\)"),
        (lambda g: between.allreduce(g, 1.0, "median"), ValueError, "takes the op mean, sum, max or min, not 'median'"),
        (lambda g: between.allgather(g, {1, 2} if g.rank == 1 else 0), TypeError, "carries None, bool, int"),
        (lambda g: between.broadcast(g, (1, 2)), TypeError, "Give tuples as lists"),
        (lambda g: between.broadcast(g, torch.eye(2).to_sparse()), TypeError, "give it value.to_dense"),
        (
            lambda g: between.barrier(g) if g.rank else between.allreduce(g, 1.0),
            DifferentCallsError,
            "rank 0 called danaz.allreduce of a number while rank 1 of its worker called danaz.barrier",
        ),
    ],
)
def test_all_ranks_get_the_error_of_one(work: Callable[[ThreadGroup], Any], error: type[Exception], words: str) -> None:
    for result in on_each_rank(RANKS, work):
        with pytest.raises(error, match=words):
            raise result  # type: ignore[misc]


def test_a_rank_that_waits_says_so(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(between, "PATIENCE_S", 0.01)
    printed: list[str] = []

    def says_so() -> bool:
        printed.append(capfd.readouterr().err)
        return "in danaz.barrier for the other ranks of its worker. Every rank must make this call" in "".join(printed)

    def work(group: ThreadGroup) -> None:
        if group.rank:
            until(says_so, "a sentence") if group.rank == 1 else None
        between.barrier(group)

    everywhere(work)


def test_what_a_rank_gets_is_not_its_own_tensor() -> None:
    """The script may change that one later, such as by a step."""

    def work(group: ThreadGroup | SoloGroup) -> None:
        own = torch.zeros(2, requires_grad=True)
        told = [between.broadcast(group, own), *between.allgather(group, own)]
        told += [between.allreduce(group, own, op) for op in ("mean", "sum", "max", "min")]
        with torch.no_grad():
            own += 1
        assert not any(each.any() for each in told)
        assert not any(each.requires_grad for each in told)

    everywhere(work)
    work(SoloGroup())


def test_alone_values_are_returned_but_checked() -> None:
    solo = SoloGroup()
    assert between.allreduce(solo, 2.0, "sum") == 2.0
    assert between.allgather(solo, {"a": 1}) == [{"a": 1}]
    assert torch.equal(between.allreduce(solo, torch.ones(2)), torch.ones(2))
    assert between.broadcast(solo, "x") == "x"
    between.barrier(solo)
    with pytest.raises(TypeError, match="carries None"):
        between.broadcast_object(solo, {1})
