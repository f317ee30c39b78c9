"""Outliers are refused, in virtual time: no honest worker is refused for ever, and what is dropped is reported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from axis import ADAMW, under
from cluster import Cluster
from stimuli import INF, NAN, SIZE
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import Parameters
from danaz.protocol.refusals import FRESH_AFTER, OUTLIER
from danaz.server.core import ServerCore
from danaz.server.health import ENOUGH_PUSHES, HOPELESS_PUSHES, RECENT_PUSHES, PushHealth
from danaz.vectors.codecs import Compressor, push_codec

LR = 0.05


class Refusing(Cluster):
    """Workers that train ½‖θ − 1‖² with noise, and a server that refuses outliers."""

    def __init__(self, algorithm: str, workers: int = 2, noise: float = 1e-3, optimizers: Optimizers = SGD):
        super().__init__(algorithm, workers, torch.full((SIZE,), 100.0), ahead=1, optimizers=optimizers)
        self.settings = replace(self.settings, refuse_outliers=True)
        self.notices: list[str] = []
        self.server = ServerCore(self.settings, on_update=self.updates.append, on_notice=self.notices.append)
        self.noise = noise
        self.random = torch.Generator().manual_seed(1)
        for worker in range(workers):
            self.join(worker)

    def gradient(self, worker: int) -> Tensor:
        return self.views[worker] - 1 + self.noise * torch.randn(SIZE, generator=self.random)

    def step(self, worker: int, factor: float = 1.0) -> Parameters:
        """Compute the batches at hand, and push."""
        grads = [self.gradient(worker) * factor for _ in range(self.sync_period)]
        reply = self.push(worker, grads, LR / self.sync_period)
        assert isinstance(reply, Parameters)
        return reply


@pytest.mark.parametrize("algorithm", ["dana", "dana-zero", "asgd", "eamsgd"])
def test_a_worker_that_paused_gets_back_in(algorithm):
    """A late worker's velocity is a thousand times what the others push by now. It is refused, and starts afresh."""
    cluster = Refusing(algorithm)
    for _ in range(10):
        for worker in (0, 1):
            cluster.step(worker)
    for _ in range(600):
        cluster.step(0)
    refused = [not cluster.step(1).applied for _ in range(200) if cluster.step(0)]
    assert sum(refused) <= 20, "not 200 of 200: while the parameters move again, every gradient is large"
    assert not any(refused[40:])
    assert torch.allclose(cluster.server.master.params, torch.ones(SIZE), atol=0.05), "training is unharmed"


def test_what_a_residual_holds_is_no_trap_either():
    cluster = Refusing("asgd")
    cluster.workers[1].compressor = compressor = Compressor(push_codec("topk:0.3"), [(0, SIZE)])
    for _ in range(600):
        cluster.step(0)
    cluster.step(1)
    compressor.residual.fill_(100.0)
    refused = [not cluster.step(1).applied for _ in range(20) if cluster.step(0)]
    assert sum(refused) <= FRESH_AFTER, "and not 20 of 20"


def states_of(cluster: Cluster) -> list[Tensor]:
    """Return copies of worker 1's vectors, on the worker and on the server."""
    held = (cluster.workers[1].vectors, cluster.server.members[1].vectors)
    return [vector.clone() for vectors in held for vector in vectors.values()]


@under({"dana": "sgd", "dana-zero": "sgd adamw"})
def test_one_bad_batch_costs_no_state(algorithm, optimizers):
    cluster = Refusing(algorithm, optimizers=optimizers)
    for _ in range(ENOUGH_PUSHES):
        for worker in (0, 1):
            cluster.step(worker)
    before, counts = states_of(cluster), cluster.server.members[1].counts
    assert cluster.step(1, factor=1e6).refused == OUTLIER
    assert all(torch.equal(one, other) for one, other in zip(states_of(cluster), before, strict=True))
    assert cluster.server.members[1].counts == counts
    assert cluster.step(1).applied


@pytest.mark.parametrize(
    ("algorithm", "optimizers", "factor"),
    [("dana", SGD, 1e6), ("dana", SGD, NAN), ("dana", ADAMW, NAN), ("dana-zero", ADAMW, 1e6)],
    ids=["dana-sgd", "dana-sgd-nan", "dana-adamw-nan", "dana-zero-adamw"],
)
def test_a_fresh_state_forfeits_its_share_of_the_look_ahead(algorithm, optimizers, factor):
    """This is as after a crash of the worker: what it sent stays, and the sum of the others defines θ."""
    cluster = Refusing(algorithm, optimizers=optimizers)
    for _ in range(ENOUGH_PUSHES):
        for worker in (0, 1):
            cluster.step(worker)
    before = cluster.server.master.params.clone()
    for _ in range(FRESH_AFTER):
        assert cluster.step(1, factor).refused
    assert torch.equal(cluster.server.master.params, before)
    assert not any(vector.any() for vector in states_of(cluster))
    share = cluster.workers[0].given_back()
    if algorithm == "dana-zero":
        assert cluster.server.members[1].counts.counts == (0,)
        share = torch.zeros(SIZE)  # θ is what the server holds
    for worker in (0, 1):
        cluster.leave(worker)
    assert torch.allclose(cluster.server.master.params, before + share)


def test_a_step_of_adam_is_no_outlier_however_large_its_gradient_is():
    """Under dana, the server sees steps. So it cannot name the worker, and when-things-fail.md says so."""
    cluster = Refusing("dana", optimizers=ADAMW)
    for _ in range(ENOUGH_PUSHES):
        for worker in (0, 1):
            cluster.step(worker)
    assert cluster.step(1, factor=1e6).applied
    assert cluster.server.summary()["sick_workers"] == {}


@pytest.mark.parametrize(("optimizers", "bad"), [*((SGD, bad) for bad in (NAN, INF, 3e38)), (ADAMW, NAN), (ADAMW, INF)])
def test_pushes_that_are_not_finite_start_afresh_too(optimizers, bad):
    """A velocity near the end of float32 makes every push infinite."""
    cluster = Refusing("dana", optimizers=optimizers)
    cluster.step(0)
    next(iter(cluster.workers[0].vectors.values())).fill_(bad)
    applied = [cluster.step(0).applied for _ in range(FRESH_AFTER + 1)]
    assert applied == [False] * FRESH_AFTER + [True]
    assert not cluster.server.diverged


def test_what_is_dropped_is_said():
    cluster = Refusing("asgd")
    for _ in range(ENOUGH_PUSHES):
        for worker in (0, 1):
            cluster.step(worker)
    for _ in range(3):
        cluster.push(1, torch.full((SIZE,), 1e9), LR, samples=16)
    [(worker, figures)] = cluster.server.summary()["sick_workers"].items()
    assert (worker, figures["outliers"], figures["refused_pushes"]) == ("1", 3, 3)
    assert (figures["dropped_batches"], figures["dropped_samples"]) == (3, 48)
    cluster.server.state.health.restore(cluster.server.summary()["sick_workers"])
    assert cluster.server.summary()["sick_workers"] == {"1": figures}


def test_a_worker_that_is_always_refused_is_named():
    cluster = Refusing("asgd")
    for _ in range(ENOUGH_PUSHES):
        for worker in (0, 1):
            cluster.step(worker)
    for _ in range(2 * HOPELESS_PUSHES):
        cluster.step(0)
        assert not cluster.step(1, factor=1e9).applied, "nothing so large is ever applied, however long this goes on"
    assert len([notice for notice in cluster.notices if "were all refused" in notice]) == 1


class TestTheJudgeForgets:
    def judge(self) -> PushHealth:
        health = PushHealth(lambda text: None)
        for _ in range(ENOUGH_PUSHES):
            assert not health.judge(0, 1e-3, refused=True)
        return health

    def test_what_is_long_ago(self):
        """The only other worker hangs, and only its old pushes are known."""
        health = self.judge()
        refused = [health.judge(1, 1.0, refused=True) for _ in range(2 * RECENT_PUSHES)]
        assert refused[0]
        assert not any(refused[RECENT_PUSHES:])

    def test_who_is_gone(self):
        health = self.judge()
        assert health.judge(1, 1.0, refused=True)
        health.forget(0)
        assert not health.judge(1, 1.0, refused=True)

    @pytest.mark.parametrize("how", ["lose", "leave"])
    def test_who_is_gone_from_the_cluster(self, how):
        cluster = Refusing("asgd")
        for _ in range(600):
            cluster.step(0)
        assert cluster.step(1, factor=1e6).refused == OUTLIER
        cluster.lose(0) if how == "lose" else cluster.leave(0)
        assert cluster.step(1, factor=1e6).applied, "nobody is left to compare it with"

    def test_and_follows_those_who_change_together(self):
        """All gradients grow at once, as when the rate rises. Refused pushes move the window, too."""
        health = self.judge()
        for _ in range(ENOUGH_PUSHES):
            health.judge(1, 1e-3, refused=True)
        refused = [health.judge(worker, 1.0, refused=True) for _ in range(100) for worker in (0, 1)]
        assert refused[0]
        assert not any(refused[80:])
