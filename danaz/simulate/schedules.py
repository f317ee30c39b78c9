"""Whose push arrives next: models of asynchronous execution."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Schedule = Callable[[int, int], Iterator[int]]


def round_robin(workers: int, seed: int) -> Iterator[int]:
    """0, 1, …, N − 1, again and again: every update has lag N − 1."""
    while True:
        yield from range(workers)


def block_random(workers: int, seed: int) -> Iterator[int]:
    """Every block of N updates holds each worker once, in a random order (Hakimi et al., arXiv 1907.11612)."""
    shuffler = random.Random(seed)
    block = list(range(workers))
    while True:
        shuffler.shuffle(block)
        yield from block


SCHEDULES: dict[str, Schedule] = {"round-robin": round_robin, "block-random": block_random}
