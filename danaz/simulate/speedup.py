"""The theoretical speed-up of asynchronous and synchronous training, from execution times alone.

It is Figure 5 of the DANA paper (arXiv 1907.11612) and Figure 12 of the Gap-Aware paper (arXiv 1909.10802).
Communication costs nothing. A speed-up of S means that N workers do as many batches in T time units as one worker in
S·T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from danaz.simulate.execution_time import Times, gamma_times, machine_means

MEAN = 128.0  # a batch of 128 takes 128 time units
CHUNK = 10_000  # batches of each worker that are held in memory at once


@dataclass(frozen=True)
class Speedup:
    """Mean and standard deviation over the repetitions, for each number of workers: f64[len(workers)] each."""

    workers: tuple[int, ...]
    heterogeneous: bool
    asynchronous: Times
    asynchronous_std: Times
    synchronous: Times
    synchronous_std: Times

    @property
    def machines(self) -> str:
        """Return what the machines are like, in words."""
        return "machines that differ" if self.heterogeneous else "machines of one kind"


def speedup(
    workers: Sequence[int], *, heterogeneous: bool, repetitions: int = 20, iterations: int = 100_000, seed: int = 0
) -> Speedup:
    """Draw the times of ``iterations`` batches for each worker, ``repetitions`` times.

    Asynchronous workers never wait, so each does as many batches as it would alone. Synchronous workers wait for the
    slowest one at every batch. Both are compared with one worker of mean throughput; the asynchronous speed-up is
    therefore N by definition.

    Raises ValueError if ``workers`` is empty, or if a number of workers, ``repetitions`` or ``iterations`` is below 1.
    """
    if not workers or min(workers) < 1 or repetitions < 1 or iterations < 1:
        raise ValueError("workers, repetitions and iterations must be at least 1")
    most = max(workers)
    asynchronous, synchronous = np.empty((repetitions, len(workers))), np.empty((repetitions, len(workers)))
    for repetition, rng in enumerate(np.random.default_rng(seed).spawn(repetitions)):
        means = machine_means(rng, MEAN, (most,)) if heterogeneous else np.full(most, MEAN)
        worker_total, slowest_total = _totals(rng, means, iterations, workers)
        rates = iterations / worker_total  # batches per time unit of each worker alone
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
    """Return the time of each worker for all its batches, f64[largest number of workers], and the time of rounds.

    The latter is f64[len(workers)]: for each n, of ``iterations`` rounds in which the first n workers wait for the
    slowest of them.
    """
    worker_total, slowest_total = np.zeros(len(means)), np.zeros(len(workers))
    for done in range(0, iterations, CHUNK):
        times = gamma_times(rng, means[:, None], (len(means), min(CHUNK, iterations - done)))
        worker_total += times.sum(1)
        slowest = np.maximum.accumulate(times, axis=0)
        slowest_total += [slowest[n - 1].sum() for n in workers]
    return worker_total, slowest_total
