"""Whose push arrives next: models of asynchronous execution, and the order of a real run.

A schedule is an endless iterator of worker numbers. ``make_schedule`` reads how users write one.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from danaz.simulate.execution_time import gamma_times, machine_means

BLOCK = 256  # batch times drawn at once


class ScheduleError(ValueError):
    """No such schedule, or one that does not fit the run."""


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


def gamma(workers: int, seed: int) -> Iterator[int]:
    """Machines of one kind, whose batch times vary."""
    rng = np.random.default_rng(seed)
    return by_finish_time([_gamma_stream(rng, 1.0) for _ in range(workers)])


def gamma_heterogeneous(workers: int, seed: int) -> Iterator[int]:
    """Machines that differ: each has a mean batch time of its own."""
    rng = np.random.default_rng(seed)
    return by_finish_time([_gamma_stream(rng, mean) for mean in machine_means(rng, 1.0, (workers,))])


def _gamma_stream(rng: np.random.Generator, mean: float) -> Iterator[float]:
    while True:
        yield from gamma_times(rng, mean, (BLOCK,)).tolist()


def by_finish_time(batch_times: Sequence[Iterator[float]]) -> Iterator[int]:
    """Workers in the order in which they finish, worker i taking ``batch_times[i]`` for its batches, one by one."""
    finish = [(next(times), worker) for worker, times in enumerate(batch_times)]
    heapq.heapify(finish)
    while True:
        now, worker = finish[0]
        yield worker
        heapq.heapreplace(finish, (now + next(batch_times[worker]), worker))


def constant(speeds: Sequence[float], workers: int) -> Iterator[int]:
    """Worker i computes ``speeds[i]`` batches in a unit of time, without variation."""
    if len(speeds) != workers or any(not 0 < speed < float("inf") for speed in speeds):
        raise ScheduleError(f"schedule constant needs one speed above 0 for each of {workers} workers, got {speeds}")
    return by_finish_time([_repeat(1 / speed) for speed in speeds])


def _repeat(time: float) -> Iterator[float]:
    while True:
        yield time


def trace(path: Path, workers: int) -> Iterator[int]:
    """The workers of another run's updates.jsonl, in its order; round-robin once that has ended."""
    file = path / "updates.jsonl" if path.is_dir() else path
    try:
        order = [int(json.loads(line)["worker"]) for line in file.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ScheduleError(
            f"schedule trace cannot read {file}: {error}; give a run folder or its updates.jsonl"
        ) from error
    if not order or max(order) >= workers:
        raise ScheduleError(
            f"the trace {file} is of {max(order, default=-1) + 1} workers and {len(order)} updates; it does not fit a "
            f"run of {workers} workers"
        )
    return _then_round_robin(order, workers)


def _then_round_robin(order: list[int], workers: int) -> Iterator[int]:
    yield from order
    yield from round_robin(workers, 0)


SCHEDULES: dict[str, Callable[[int, int], Iterator[int]]] = {
    "round-robin": round_robin,
    "block-random": block_random,
    "gamma": gamma,
    "gamma-heterogeneous": gamma_heterogeneous,
}


def make_schedule(text: str, workers: int, seed: int) -> Iterator[int]:
    """The schedule that ``text``, which Config has checked, names. Raises ScheduleError if it does not fit the run."""
    name, _, argument = text.partition(":")
    if name == "constant":
        try:
            speeds = [float(speed) for speed in argument.split(",")]
        except ValueError as error:
            raise ScheduleError(f"schedule {text!r}: expected speeds such as constant:1,1,2.5") from error
        return constant(speeds, workers)
    if name == "trace":
        return trace(Path(argument), workers)
    return SCHEDULES[text](workers, seed)
