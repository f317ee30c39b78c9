"""The order in which simulated workers push: models of asynchronous execution, or the order of an earlier run.

An order is an endless iterator of worker numbers. Users choose one with the config key ``schedule``, whose names are in
danaz/run/schedules.py; ``make_order`` turns such a name into the iterator.
"""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from danaz.simulate.execution_time import gamma_times, machine_means

BLOCK = 256  # batch times of a worker that are drawn at once


class OrderError(ValueError):
    """The order that the key ``schedule`` names does not fit the run."""


def round_robin(workers: int, seed: int) -> Iterator[int]:
    """Yield 0, 1, …, N − 1, again and again: every update has lag N − 1."""
    while True:
        yield from range(workers)


def block_random(workers: int, seed: int) -> Iterator[int]:
    """Yield each worker once in every block of N updates, in a random order (Hakimi et al., arXiv 1907.11612)."""
    shuffler = random.Random(seed)
    block = list(range(workers))
    while True:
        shuffler.shuffle(block)
        yield from block


def gamma(workers: int, seed: int) -> Iterator[int]:
    """Yield workers on machines of one kind, whose batch times vary."""
    rng = np.random.default_rng(seed)
    return by_finish_time([_gamma_stream(rng, 1.0) for _ in range(workers)])


def gamma_heterogeneous(workers: int, seed: int) -> Iterator[int]:
    """Yield workers on machines that differ: each machine has its own mean batch time."""
    rng = np.random.default_rng(seed)
    return by_finish_time([_gamma_stream(rng, mean) for mean in machine_means(rng, 1.0, (workers,))])


def _gamma_stream(rng: np.random.Generator, mean: float) -> Iterator[float]:
    while True:
        yield from gamma_times(rng, mean, (BLOCK,)).tolist()


def by_finish_time(batch_times: Sequence[Iterator[float]]) -> Iterator[int]:
    """Yield workers in the order in which they finish batches. ``batch_times[i]`` has the batch times of worker i."""
    finish = [(next(times), worker) for worker, times in enumerate(batch_times)]
    heapq.heapify(finish)
    while True:
        now, worker = finish[0]
        yield worker
        heapq.heapreplace(finish, (now + next(batch_times[worker]), worker))


def constant(speeds: Sequence[float], workers: int) -> Iterator[int]:
    """Order workers of which worker i computes ``speeds[i]`` batches per unit of time, without variation."""
    if len(speeds) != workers or any(not 0 < speed < float("inf") for speed in speeds):
        raise OrderError(f"schedule constant needs one speed above 0 for each of {workers} workers, got {speeds}")
    return by_finish_time([_repeat(1 / speed) for speed in speeds])


def _repeat(time: float) -> Iterator[float]:
    while True:
        yield time


def trace(path: Path, workers: int) -> Iterator[int]:
    """Return the workers in the updates.jsonl of another run, in its order; round-robin after its end."""
    file = path / "updates.jsonl" if path.is_dir() else path
    try:
        order = [int(json.loads(line)["worker"]) for line in file.read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise OrderError(
            f"schedule trace cannot read {file}: {error}; give a run folder or its updates.jsonl"
        ) from error
    if not order:
        raise OrderError(f"schedule trace: {file} holds no updates; give a run that has made some")
    if max(order) >= workers:
        raise OrderError(
            f"schedule trace: {file} names worker {max(order)} and does not fit a run of {workers} workers, numbered "
            f"from 0; set workers to {max(order) + 1}"
        )
    return _then_round_robin(order, workers)


def _then_round_robin(order: list[int], workers: int) -> Iterator[int]:
    yield from order
    yield from round_robin(workers, 0)


def _name(order: Callable[[int, int], Iterator[int]]) -> str:
    return order.__name__.replace("_", "-")


ORDERS = {_name(order): order for order in (round_robin, block_random, gamma, gamma_heterogeneous)}


def make_order(schedule: str, workers: int, seed: int) -> Iterator[int]:
    """Return the order that ``schedule``, a checked value of the config key, names.

    Raises OrderError if its argument cannot be read or does not fit a run of ``workers`` workers.
    """
    name, _, argument = schedule.partition(":")
    if name == "constant":
        try:
            speeds = [float(speed) for speed in argument.split(",")]
        except ValueError as error:
            raise OrderError(f"schedule {schedule!r}: expected speeds such as constant:1,1,2.5") from error
        return constant(speeds, workers)
    if name == "trace":
        return trace(Path(argument), workers)
    return ORDERS[schedule](workers, seed)
