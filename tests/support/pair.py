"""An algorithm over an optimizer, and its oracle, in the same run, in memory: the oracle sends the same views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from cluster import Cluster
from hypothesis import strategies as st
from oracle import Array, Oracle, Views
from oracle_local import ORACLES
from oracle_optimizers import AdagradOracle, AdamOracle, NAdamOracle, RMSpropOracle, SgdOracle
from torch import Tensor

from danaz.optimizers import Adagrad, Adam, NAdam, Optimizer, Optimizers, RMSprop, Sgd
from danaz.rules import find_algorithm

STATES = {
    "sgd": SgdOracle,
    "adam": AdamOracle,
    "nadam": NAdamOracle,
    "rmsprop": RMSpropOracle,
    "adagrad": AdagradOracle,
}
OPTIMIZERS = (
    Sgd(0.9),
    Adam(0.9, 0.99, weight_decay=0.1),
    Sgd(0.5),
    NAdam(0.9, 0.99, momentum_decay=0.1),
    Sgd(0.0),
    RMSprop(0.9, momentum=0.8),
    Adam(0.8, 0.9, amsgrad=True),
    Adagrad(),
    Adam(0.9, 0.99),
)
GROUPS = (4, 3)  # each group is one layer
WEIGHT_DECAY = (0.1, 0.0)
SIZE = sum(GROUPS)


@dataclass(frozen=True)
class Run:
    """What happens in a run.

    ``rates`` holds the rates of update 0, 1, … (repeated), one for each group; ``events`` are (what, worker).
    """

    workers: int
    draw: int  # which of the optimizers that the algorithm carries out
    lr_correction: bool
    rates: tuple[tuple[float, float], ...]
    events: tuple[tuple[str, int], ...]
    seed: int
    sync_period: int = 1  # used if the algorithm has one

    def optimizer(self, algorithm: str) -> Optimizer:
        """The optimizer that ``algorithm`` carries out in this run."""
        carried = carried_out(algorithm)
        return carried[self.draw % len(carried)]


@cache
def carried_out(algorithm: str) -> list[Optimizer]:
    """The optimizers of this module that ``algorithm`` carries out."""
    return [each for each in OPTIMIZERS if not find_algorithm(algorithm).refusal(Optimizers([each]))]


RATE = st.sampled_from([0.1, 0.03, 0.01, 0.001])


def runs(*what: str, most_workers: int = 5) -> st.SearchStrategy[Run]:
    """Return random runs whose events are mostly pushes, and otherwise pulls and ``what``."""

    def with_workers(workers: int) -> st.SearchStrategy[Run]:
        kinds = st.sampled_from(["push"] * 8 + ["pull"] + list(what))
        events = st.lists(st.tuples(kinds, st.integers(0, workers - 1)), min_size=1, max_size=30)
        return st.builds(
            Run,
            workers=st.just(workers),
            draw=st.integers(0, len(OPTIMIZERS) - 1),
            lr_correction=st.booleans(),
            rates=st.lists(st.tuples(RATE, RATE), min_size=1, max_size=4).map(tuple),
            events=events.map(tuple),
            seed=st.integers(0, 2**32 - 1),
            sync_period=st.integers(1, 3),
        )

    return st.integers(1, most_workers).flatmap(with_workers)


class Pair:
    """An algorithm and its oracle, which go through the same run."""

    def __init__(self, name: str, run: Run, **hyperparameters: Any):
        """``hyperparameters`` are names; the oracle has the name of the algorithm, followed by them."""
        algorithm = find_algorithm(name)
        self.limit = algorithm.rule().max_workers or run.workers
        workers = min(run.workers, self.limit)
        self.run = run
        self.random = np.random.default_rng(run.seed)
        first, optimizer = self.random.normal(size=SIZE).astype(np.float32), run.optimizer(name)
        self.cluster = Cluster(
            name,
            workers,
            torch.from_numpy(first),
            groups=GROUPS,
            optimizers=Optimizers([optimizer]),
            lr_correction=run.lr_correction,
            sync_period=run.sync_period if "sync_period" in algorithm.hyperparameters else None,
            weight_decay=WEIGHT_DECAY,
            hyperparameters=hyperparameters,
        )
        state, oracle = STATES[optimizer.name](SIZE, **asdict(optimizer)), " ".join([name, *hyperparameters.values()])
        self.oracle: Oracle = ORACLES[oracle](first, workers, state, run.lr_correction)
        self.oracle.weight_decay, self.oracle.layers = per_parameter(WEIGHT_DECAY), (slice(0, 4), slice(4, 7))
        self.having: set[int] = set()  # workers that have a view to compute on
        self.agree(self.oracle.start())

    def agree(self, expected: Views) -> None:
        """Check that the views just sent are those that the oracle sends, to the same workers."""
        self.having |= expected.keys()
        assert self.cluster.views.keys() == self.having
        for worker, view in expected.items():
            close(self.cluster.views[worker], view)

    def live_through_it(self) -> None:
        for what, worker in self.run.events:
            if worker < self.limit:
                getattr(self, what)(worker)
        close(self.theta(), self.oracle.final())

    def push(self, worker: int) -> None:
        if worker not in self.cluster.views:
            return  # the worker waits for its round, or is gone
        rates = self.run.rates[self.cluster.server.master.version % len(self.run.rates)]
        # Gradients stay away from zero, where the ratio of gap and average step is beyond float32.
        size = (self.cluster.sync_period, SIZE)
        grads = (self.random.uniform(0.3, 2, size) * self.random.choice([-1, 1], size)).astype(np.float32)
        samples, lr = 1 + worker % 3, per_parameter(rates)
        given = torch.from_numpy(grads.copy())
        self.cluster.push(worker, list(given), rates, samples=samples)
        assert np.array_equal(given.numpy(), grads), "the worker's gradient is its own"
        self.having.discard(worker)
        self.agree(self.oracle.push(worker, [(g.astype(np.float64), lr) for g in grads], samples))

    def pull(self, worker: int) -> None:
        if worker in self.cluster.views:
            self.cluster.pull(worker)
            self.agree(self.oracle.pulled(worker))

    def lose(self, worker: int) -> None:
        if worker in self.oracle.present and len(self.oracle.present) > 1:
            self.cluster.lose(worker)
            self.having.discard(worker)
            self.agree(self.oracle.lost(worker))

    def come_back(self, worker: int) -> None:
        if worker not in self.oracle.present and worker not in self.cluster.final:
            self.cluster.come_back(worker)
            self.agree(self.oracle.back(worker))

    def start_anew(self, worker: int) -> None:
        self.cluster.final.pop(worker, None)
        self.having.discard(worker)
        self.cluster.join(worker, self.cluster.workers[worker].role.incarnation + 1)
        self.agree(self.oracle.fresh(worker))

    def leave(self, worker: int) -> None:
        if worker in self.cluster.views and len(self.oracle.present) > 1:
            self.cluster.leave(worker)
            self.having.discard(worker)
            self.agree(self.oracle.left(worker))

    def theta(self) -> Tensor:
        """Return θ, which the server would hold if all workers that are there gave back."""
        given = [self.cluster.workers[i].given_back() for i in self.oracle.present]
        return self.cluster.server.master.params + sum(g for g in given if g is not None)


def per_parameter(rates: Sequence[float]) -> Array:
    return np.repeat(np.array(rates, dtype=np.float64), GROUPS)


def close(ours: Tensor, theirs: Array | Tensor, tolerance: float = 1e-5) -> None:
    theirs = np.asarray(theirs)
    scale = max(1.0, float(np.abs(theirs).max()))
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=tolerance * scale)
