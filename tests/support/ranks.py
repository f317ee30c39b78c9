"""Ranks of one worker as threads of one process, with a collective of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from sockets import PATIENCE_S
from torch import Tensor

Result = TypeVar("Result")


class ThreadGroup:
    """One rank of a world of threads. All ranks must sum and broadcast under the same names, in the same order."""

    name = "threads"

    def __init__(self, rank: int, size: int, world: ThreadWorld):
        self.rank, self.size, self._world = rank, size, world

    def sum_async(self, tensor: Tensor, name: str) -> None:
        tensor.copy_(torch.stack(self._world.exchange(self.rank, f"sum {name}", tensor)).sum(0).to(tensor.dtype))

    def wait(self, handle: Any) -> None:
        """Do nothing: a sum is complete when it has begun."""

    def broadcast(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            tensor.copy_(self._world.exchange(self.rank, f"broadcast {name}", tensor)[0])

    def close(self) -> None:
        """Do nothing: the threads end by themselves."""


class ThreadWorld:
    """The place where the ranks meet. A rank that waits for another one in vain breaks the world for all."""

    def __init__(self, size: int):
        self.groups = [ThreadGroup(rank, size, self) for rank in range(size)]
        self._barrier = threading.Barrier(size)
        self._said: list[tuple[str, Tensor]] = [("", torch.empty(0))] * size

    def exchange(self, rank: int, name: str, tensor: Tensor) -> list[Tensor]:
        self._said[rank] = (name, tensor.clone())
        self._barrier.wait(PATIENCE_S)
        said = list(self._said)
        self._barrier.wait(PATIENCE_S)
        names = [each for each, _ in said]
        assert len(set(names)) == 1, f"the ranks make different collectives: {names}"
        return [each for _, each in said]


def on_each_rank(size: int, work: Callable[[ThreadGroup], Result]) -> list[Result | BaseException]:
    """Let ``size`` threads do ``work``. Return what each of them returned, or the error that it raised."""
    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(work, group) for group in ThreadWorld(size).groups]
        return [future.exception() or future.result() for future in futures]
