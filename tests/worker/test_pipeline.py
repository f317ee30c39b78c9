"""The pipeline: what each batch is computed on, how late it is applied, and what is left of it after a fault."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from axis import ADAMW, AXIS
from cluster import Cluster
from line import PLAN, Line, make_worker, train
from oracle import ORACLES
from oracle_optimizers import AdamOracle, SgdOracle
from stimuli import GRADIENT, INF, NAN, SIZE
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import Parameters, Pull, Push, Refusal
from danaz.rules.base import HyperparameterError
from danaz.run.config import load_config
from danaz.run.fit import UnfitError, check_workers
from danaz.run.settings import Settings
from danaz.server.core import ServerCore
from danaz.simulate.simulator import Simulation
from danaz.torch.alone import LocalLink
from danaz.vectors.codecs import Compressor, push_codec
from danaz.vectors.cutting import chunks
from danaz.worker.core import Request, Step
from danaz.worker.link import ServerLostError
from danaz.worker.pipeline import FetchDelay

QUADRATIC = Path(__file__).parents[2] / "configs/quadratic.yaml"
WORKERS = 4


def simulation(folder: Path, *overrides: str) -> Simulation:
    sets = (f"workers={WORKERS}", "epochs=1", "threads=1", "schedule=round-robin", "pipeline=true", *overrides)
    return Simulation(load_config(QUADRATIC, sets), folder)


@pytest.mark.parametrize("algorithm", ["asgd", "dana", "dana-zero", "nag-asgd", "multi-asgd"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (SgdOracle(1000, 0.9), ()),
        (AdamOracle(1000, weight_decay=0.1), ("optimizer=adamw", "weight_decay=0.1")),
    ],
    ids=["sgd", "adamw"],
)
def test_it_equals_its_definition(algorithm, optimizer, options, tmp_path):
    """x is the view from before the worker's own push; that push is added to it where pushes are displacements."""
    curvature, lr = np.logspace(-2, 0, 1000), np.full(1000, 0.01)
    simulated = simulation(tmp_path, f"algorithm={algorithm}", "lr=0.01", *options)
    simulated.start()
    oracle = ORACLES[algorithm](np.zeros(1000), WORKERS, optimizer)
    points = oracle.start()
    for turn in range(60):
        worker = turn % WORKERS
        fetched, before = oracle.view(worker).copy(), oracle.theta
        oracle.sent[worker] = points[worker], oracle.updates
        oracle.push(worker, [(curvature * (points[worker] - 1), lr)], 1)
        points[worker] = fetched + (oracle.theta - before if simulated.rule.push_moves_view else 0)
        simulated.advance(1)
        np.testing.assert_allclose(simulated.server.master.params, oracle.theta, rtol=1e-4, atol=1e-7)
        assert simulated.server.members[worker].lag == min(turn, WORKERS), "the lag is that of the view that was sent"


@pytest.mark.parametrize("algorithm", ["dana", "dana-zero", "dc-asgd", "dana-ga", "asgd"])
def test_it_goes_downhill(tmp_path, algorithm):
    simulated = simulation(tmp_path, f"algorithm={algorithm}", "epochs=5")
    losses, record = [], simulated.folder.record
    simulated.folder.record = lambda update: (losses.append(update.loss), record(update))
    summary = simulated.run()
    assert summary["mean_lag"] == pytest.approx(WORKERS, abs=0.1)
    assert summary["final_train_loss"] < losses[0] / 5


# ---- one batch after the other ---------------------------------------------------------------------------------------


class Pipelined(Cluster):
    """Workers that fetch the next view and then push, so that the answer to the push brings no view."""

    def __init__(
        self,
        algorithm: str = "dana",
        workers: int = 2,
        params: Tensor | None = None,
        optimizers: Optimizers = SGD,
    ):
        first = torch.ones(SIZE) if params is None else params
        super().__init__(algorithm, workers, first, ahead=2, optimizers=optimizers)

    def fetch(self, worker: int) -> Tensor:
        """Fetch a view, and return a copy of it."""
        self.say(worker, self.workers[worker].pull(ahead=True))
        return self.views[worker].clone()

    def make(self, worker: int, grad: Tensor) -> Push:
        step = Step(self.leases(worker)[0], (0.1,), 1, 1.0)
        return self.workers[worker].push(step, grad, self.point(worker), wants_view=False)

    def push_beside(self, worker: int, grad: Tensor = GRADIENT) -> Parameters:
        reply = self.say(worker, self.make(worker, grad))
        assert isinstance(reply, Parameters)
        return reply

    def point(self, worker: int) -> Tensor:
        """Return what the worker computes on, f32[P]."""
        point = torch.empty(self.params.numel())
        self.workers[worker].compute_on(point)
        return point

    def is_refused_and_joins_again(self, worker: int, request: Request) -> None:
        """Check that the request is refused, and let the worker join again."""
        refusal = self.say(worker, request)
        assert isinstance(refusal, Refusal)
        assert refusal.rejoin
        self.say(worker, self.workers[worker].join())


class TestWhatItComputesOn:
    @pytest.mark.parametrize("codec", ["fp32", "bf16", "onebit", "topk:0.3"])
    @pytest.mark.parametrize(
        ("algorithm", "optimizers"),
        [("dana", SGD), ("dana", ADAMW), ("asgd", ADAMW)],
        ids=["dana-sgd", "dana-adamw", "asgd-adamw"],
    )
    def test_it_computes_on_what_the_server_will_hold(self, codec, algorithm, optimizers):
        """Even the bits are the same if the push is lossy, because a lone worker's view lacks only its own push."""
        size = 5000
        cluster = Pipelined(algorithm, workers=1, params=torch.randn(size), optimizers=optimizers)
        cluster.workers[0].compressor = Compressor(push_codec(codec), list(chunks(size)))
        for _ in range(5):
            cluster.fetch(0)
            cluster.push_beside(0, torch.randn(size))
            assert torch.equal(cluster.point(0), cluster.server.master.params)

    def test_the_view_itself_stays_as_it_was_sent(self):
        """A restarted server may go on from it."""
        cluster = Pipelined()
        view = cluster.fetch(0)
        push = cluster.make(0, GRADIENT)
        assert torch.equal(cluster.point(0), view + push.push)
        cluster.workers[0].receive(Refusal(push.request, "the server was restarted", rejoin=True))
        assert torch.equal(cluster.workers[0].join().params, view)

    @pytest.mark.parametrize("algorithm", ["asgd", "dana-zero", "dana-ga"])
    def test_other_algorithms_compute_on_the_view(self, algorithm):
        cluster = Pipelined(algorithm)
        view = cluster.fetch(0)
        cluster.push_beside(0)
        assert torch.equal(cluster.point(0), view)

    def test_a_fresh_view_contains_the_own_push(self):
        cluster = Pipelined()
        cluster.fetch(0)
        cluster.push_beside(0)
        cluster.pull(0)
        assert torch.equal(cluster.point(0), cluster.server.master.params)

    @pytest.mark.parametrize("bad", [NAN, INF])
    def test_a_push_that_will_be_refused_is_not_added(self, bad):
        cluster = Pipelined()
        view = cluster.fetch(0)
        assert cluster.push_beside(0, GRADIENT * bad).refused
        assert torch.equal(cluster.point(0), view)

    def test_a_push_that_may_be_refused_is_not_added(self):
        """A push may be refused if the last one was.

        Otherwise one refused outlier would lead to the next, and no batch would be computed on a sound view.
        """
        cluster = Pipelined()
        cluster.fetch(0)
        cluster.push_beside(0, GRADIENT * NAN)
        view = cluster.fetch(0)
        assert cluster.push_beside(0).applied
        assert torch.equal(cluster.point(0), view)
        view = cluster.fetch(0)
        cluster.push_beside(0)
        assert not torch.equal(cluster.point(0), view), "after an applied push, the next one is added again"


class TestHowLateItIsApplied:
    """N workers take turns. If a view comes as the batch before ends, it is N versions old when its push is applied.

    If it comes as that batch begins, it is 2N − 1 versions old. The more even the times of batches are, the later the
    view is fetched.
    """

    @pytest.mark.parametrize(("fetched", "lag"), [("as the batch ends", WORKERS), ("as it begins", 2 * WORKERS - 1)])
    def test_the_lag_is_that_of_the_view(self, fetched, lag):
        cluster = Pipelined("asgd", workers=WORKERS)
        if fetched == "as it begins":
            for worker in range(WORKERS):
                cluster.fetch(worker)
        for turn in range(5 * WORKERS):
            worker = turn % WORKERS
            if fetched == "as the batch ends":
                cluster.fetch(worker)
            cluster.push_beside(worker)
            if fetched == "as it begins":
                cluster.fetch(worker)
        assert {update.lag for update in cluster.updates[2 * WORKERS :]} == {lag}

    @pytest.mark.parametrize(
        ("computing_s", "late"),
        [([0.1], True), ([0.1, 0.11], True), ([0.02, 0.18], False), ([0.003, 0.003, 0.03], False)],
    )
    def test_a_view_is_fetched_late_if_batches_take_equal_times(self, computing_s, late):
        delay = FetchDelay()
        for turn in range(100):
            delay.saw_batch(computing_s[turn % len(computing_s)])
            delay.saw_fetch(0.01)
        assert (delay.seconds > 0.05) == late
        assert (delay.seconds <= 0) == (not late), "the view is fetched as the batch begins"


class TestFaultsBetweenPushAndFetch:
    def check_that_it_goes_on(self, cluster: Pipelined, updates: int) -> None:
        """Check that worker 0's batch, computed on its old view, is refused, computed again, and applied once."""
        view = cluster.views[0].clone()
        refused = cluster.push_beside(0)
        assert not refused.applied
        assert torch.equal(cluster.point(0), view), "the push on top would be refused too"
        cluster.fetch(0)
        assert cluster.push_beside(0).applied
        assert [update.version for update in cluster.updates] == list(range(1, updates + 1))
        assert len({update.batch for update in cluster.updates}) == updates == cluster.server.leases.completed

    def test_given_up_before_the_fetch(self):
        cluster = Pipelined()
        cluster.fetch(0)
        assert cluster.push_beside(0).applied
        cluster.lose(0)
        cluster.is_refused_and_joins_again(0, cluster.workers[0].pull(ahead=True))
        self.check_that_it_goes_on(cluster, updates=2)
        assert torch.allclose(cluster.workers[0].vectors["velocity"], 1.9 * GRADIENT)

    def test_given_up_before_the_push(self):
        cluster = Pipelined()
        cluster.fetch(0)
        push = cluster.make(0, GRADIENT)
        cluster.lose(0)
        cluster.push(1, GRADIENT, 0.1)
        cluster.is_refused_and_joins_again(0, push)
        self.check_that_it_goes_on(cluster, updates=2)
        assert torch.allclose(cluster.workers[0].vectors["velocity"], GRADIENT)

    def test_given_up_when_the_answer_to_the_push_was_lost(self):
        cluster = Pipelined()
        cluster.fetch(0)
        push = cluster.make(0, GRADIENT)
        cluster.server.handle(0, push, cluster.now)
        cluster.lose(0)
        cluster.is_refused_and_joins_again(0, push)
        self.check_that_it_goes_on(cluster, updates=2)
        assert torch.allclose(cluster.workers[0].vectors["velocity"], 1.9 * GRADIENT)

    @pytest.mark.parametrize("answered", [True, False])
    def test_the_server_restarted(self, answered):
        """The server goes on from the view that this worker computed its push on, without that push."""
        cluster = Pipelined()
        state = cluster.server.snapshot()
        cluster.push(1, GRADIENT, 0.1)
        view = cluster.fetch(0)
        request: Request = cluster.make(0, GRADIENT)
        if answered:
            cluster.say(0, request)
            request = cluster.workers[0].pull(ahead=True)
        else:
            cluster.server.handle(0, request, cluster.now)
        journal = list(cluster.updates)
        cluster.server = ServerCore(cluster.settings, on_update=cluster.updates.append)
        cluster.server.restore(state, journal, life=1, now=cluster.now)
        cluster.is_refused_and_joins_again(0, request)
        cluster.come_back(1)
        assert torch.equal(cluster.server.master.params, view)
        assert (cluster.server.master.version, cluster.server.totals.lost_updates) == (1, 1)
        del cluster.updates[1:]  # the keeper does the same
        self.check_that_it_goes_on(cluster, updates=2)

    def test_the_fetch_answered_twice(self):
        """The worker took the first answer, while the server assumes that it took the second."""
        cluster = Pipelined("asgd")
        fetch = cluster.workers[0].pull(ahead=True)
        [(_, first)] = cluster.server.handle(0, fetch, 0.0)
        cluster.push(1, GRADIENT, 0.1)
        cluster.server.handle(0, fetch, 0.0)
        cluster.deliver([(0, first)])
        assert cluster.push_beside(0).applied, "it was computed on the view at hand"
        cluster.fetch(0)
        assert "another view" in cluster.push_beside(0).refused
        cluster.fetch(0)
        assert cluster.push_beside(0).applied
        assert [update.version for update in cluster.updates] == [1, 2, 3]


# ---- a training loop, and the exchange next to it --------------------------------------------------------------------

FAULTS: dict[str, tuple[type[Request], Callable[[Line, Request], object]]] = {
    "none": (Push, lambda line, push: None),
    "given up before the push": (Push, lambda line, push: line.gives_up()),
    "given up before the fetch": (Pull, lambda line, pull: line.gives_up()),
    "an answer lost, and given up": (Push, lambda line, push: (LocalLink.exchange(line, push), line.gives_up())),
    "an answer lost": (Push, lambda line, push: LocalLink.exchange(line, push)),
    "a view lost": (Pull, lambda line, pull: LocalLink.exchange(line, pull)),
    "restarted before the push": (Push, lambda line, push: line.restarts()),
    "restarted before the fetch": (Pull, lambda line, pull: line.restarts()),
    "restarted after the push": (Push, lambda line, push: (LocalLink.exchange(line, push), line.restarts())),
}


@pytest.mark.parametrize(
    ("algorithm", "optimizer"), [("dana", "sgd"), ("dana", "adamw"), ("dana-zero", "sgd"), ("dana-zero", "nadam")]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_goes_on_to_its_end(algorithm, optimizer, fault):
    line = Line(algorithm)
    kind, happens = FAULTS[fault]
    seen = []

    def before_exchange(request: Request) -> None:
        seen.extend([request] * isinstance(request, kind))
        if isinstance(request, kind) and len(seen) in (5, 17, 18):
            happens(line, request)

    line.before_exchange = before_exchange
    worker = make_worker(line, optimizers=AXIS[optimizer])
    train(worker)
    assert len(seen) > 18
    assert [update.version for update in line.updates] == list(range(1, PLAN.batches + 1))
    assert sorted(update.batch for update in line.updates) == list(range(PLAN.batches))
    assert line.life == (3 if "restarted" in fault else 0)
    assert line.core.finished
    assert torch.allclose(worker.flat.params, torch.ones(SIZE), atol=0.35), "it has trained: it began within ±1 / √3"


def test_an_error_in_the_exchange_is_raised_in_the_training_loop():
    line = Line("dana")

    def before_exchange(request: Request) -> None:
        if isinstance(request, Pull):
            raise ServerLostError("the server did not answer")

    line.before_exchange = before_exchange
    worker = make_worker(line)
    with pytest.raises(ServerLostError, match="did not answer"):
        train(worker)
    worker.close(in_good_order=False)


# ---- which settings are allowed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ssgd", "easgd", "bmuf"])
def test_an_algorithm_that_cannot_be_pipelined_says_why(algorithm):
    with pytest.raises(UnfitError, match=rf"{algorithm} cannot train with pipeline: its workers"):
        check_workers(Settings(algorithm=algorithm, pipeline=True))


def test_local_steps_cannot_be_pipelined():
    with pytest.raises(UnfitError, match="steps alone between pushes"):
        check_workers(Settings(algorithm="dana", sync_period=2, pipeline=True))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"strenght": 0.5}, "no hyper-parameter 'strenght'; it has"),
        ({"strength": "much"}, "expected a finite float"),
        ({"momentum": 0.5}, "is a setting of the run itself"),
    ],
)
def test_hyperparameters_are_checked(values, why):
    with pytest.raises(HyperparameterError, match=why):
        check_workers(Settings(algorithm="dc-asgd", hyperparameters=values))


def test_a_hyperparameter_reaches_the_rule(tmp_path):
    sets = ("algorithm=dc-asgd", "lr=0.005")
    ends = [
        simulation(tmp_path / str(strength), *sets, f"hyperparameters={{strength: {strength}}}").run()["params_l2"]
        for strength in (0.04, 2.0)
    ]
    assert ends[0] == simulation(tmp_path / "default", *sets).run()["params_l2"], "0.04 is the default"
    assert ends[0] != ends[1]
