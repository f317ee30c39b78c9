"""The theoretical speed-up of asynchronous and synchronous training, from execution times alone.

The DANA paper's Figure 5 (arXiv 1907.11612) and the Gap-Aware paper's Figure 12 (arXiv 1909.10802): with no cost of
communication, N workers do in T time units as many batches as one worker in S·T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from danaz.simulate.execution_time import Times, gamma_times, machine_means

MEAN = 128.0  # a batch of 128 takes 128 time units
CHUNK = 10_000  # batches of each worker held in memory at once


@dataclass(frozen=True)
class Speedup:
    """For each number of workers, mean and standard deviation over the repetitions, f64[len(workers)] each."""

    workers: tuple[int, ...]
    heterogeneous: bool
    asynchronous: Times
    asynchronous_std: Times
    synchronous: Times
    synchronous_std: Times


def speedup(
    workers: Sequence[int], *, heterogeneous: bool, repetitions: int = 20, iterations: int = 100_000, seed: int = 0
) -> Speedup:
    """Draw ``iterations`` batches for each worker, ``repetitions`` times.

    Asynchronous workers never wait: they do as much as each does alone. Synchronous ones wait for the slowest at each
    batch. Both are counted against one worker of the mean throughput, so the asynchronous figure is N by definition.
    Raises ValueError for a number of workers below 1.
    """
    if not workers or min(workers) < 1 or repetitions < 1 or iterations < 1:
        raise ValueError("workers, repetitions and iterations must be at least 1")
    most = max(workers)
    asynchronous, synchronous = np.empty((repetitions, len(workers))), np.empty((repetitions, len(workers)))
    for repetition, rng in enumerate(np.random.default_rng(seed).spawn(repetitions)):
        means = machine_means(rng, MEAN, (most,)) if heterogeneous else np.full(most, MEAN)
        worker_total, slowest_total = _totals(rng, means, iterations, workers)
        rates = iterations / worker_total  # batches a time unit of each worker alone
        asynchronous[repetition] = [rates[:n].sum() / rates[:n].mean() for n in workers]
        synchronous[repetition] = [
            n * iterations / total / rates[:n].mean() for n, total in zip(workers, slowest_total, strict=True)
        ]
    return Speedup(
        tuple(workers),
        heterogeneous,
        asynchronous.mean(0),
        asynchronous.std(0),
        synchronous.mean(0),
        synchronous.std(0),
    )


def _totals(rng: np.random.Generator, means: Times, iterations: int, workers: Sequence[int]) -> tuple[Times, Times]:
    """Time of each worker for all its batches, and of all rounds that wait for the slowest of the first n."""
    worker_total, slowest_total = np.zeros(len(means)), np.zeros(len(workers))
    for done in range(0, iterations, CHUNK):
        times = gamma_times(rng, means[:, None], (len(means), min(CHUNK, iterations - done)))
        worker_total += times.sum(1)
        slowest = np.maximum.accumulate(times, axis=0)
        slowest_total += [slowest[n - 1].sum() for n in workers]
    return worker_total, slowest_total
