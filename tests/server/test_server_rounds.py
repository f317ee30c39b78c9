"""Rounds of synchronous rules, runs that diverge, and the figures of a run."""

from __future__ import annotations

import json

import pytest
import torch
from cluster import DIGEST, Cluster
from stimuli import GRADIENT, NAN, SIZE, parameters, push_on, started

from danaz.protocol.messages import Parameters, Plan, Spent
from danaz.server.core import ServerCore
from danaz.server.snapshot import Snapshot


class TestRounds:
    def test_the_mean_is_weighted_by_samples(self):
        core, view = started("ssgd", workers=2, digest=DIGEST)
        core.handle(0, push_on(view, grad=torch.full((SIZE,), 1.0), samples=3), 1.0)
        core.handle(1, push_on(view, worker=1, batch=1, grad=torch.full((SIZE,), 5.0), samples=1), 1.0)
        assert torch.allclose(core.master.params, torch.full((SIZE,), 1 - 0.1 * 2))

    def test_a_round_is_one_line_of_the_records(self):
        cluster = Cluster("ssgd", 3, torch.ones(SIZE), gap_every=1)
        for worker in (2, 0, 1):
            cluster.push(worker, GRADIENT, 0.1, loss=float(worker))
        [update] = cluster.updates
        assert sorted(update.round or ()) == [(0, 0), (1, 1), (2, 2)]
        assert (update.version, update.lag, update.gap, update.loss) == (1, 0, 0.0, 1.0)

    def test_the_round_shrinks_when_a_worker_dies(self):
        cluster = Cluster("ssgd", 3, torch.ones(SIZE))
        cluster.push(0, torch.full((SIZE,), 1.0), 0.1)
        cluster.push(2, torch.full((SIZE,), 3.0), 0.1)
        assert cluster.server.master.version == 0
        cluster.lose(1)
        assert cluster.server.master.version == 1
        assert torch.allclose(cluster.server.master.params, torch.full((SIZE,), 1 - 0.1 * 2))
        assert cluster.views.keys() == {0, 2}

    def test_a_dead_workers_push_is_not_in_the_round(self):
        cluster = Cluster("ssgd", 3, torch.ones(SIZE))
        cluster.push(0, torch.full((SIZE,), 1.0), 0.1)
        cluster.push(1, torch.full((SIZE,), 1000.0), 0.1)
        cluster.lose(1)
        cluster.push(2, torch.full((SIZE,), 3.0), 0.1)
        assert torch.allclose(cluster.server.master.params, torch.full((SIZE,), 1 - 0.1 * 2))
        assert cluster.server.leases.completed == 2, "its batch is still to be done"

    def test_a_joiner_enters_at_the_next_round(self):
        cluster = Cluster("ssgd", 2, torch.ones(SIZE))
        cluster.push(0, GRADIENT, 0.1)
        cluster.join(2)
        assert 2 not in cluster.views, "the round is under way"
        cluster.push(1, GRADIENT, 0.1)
        assert cluster.server.master.version == 1
        assert cluster.views.keys() == {0, 1, 2}
        cluster.push(0, GRADIENT, 0.1)
        cluster.push(1, GRADIENT, 0.1)
        assert cluster.server.master.version == 1, "now the round waits for it"
        cluster.push(2, GRADIENT, 0.1)
        assert cluster.server.master.version == 2

    def test_a_refused_push_does_not_close_the_round(self):
        cluster = Cluster("ssgd", 2, torch.ones(SIZE))
        cluster.push(0, GRADIENT, 0.1)
        reply = cluster.push(1, torch.full((SIZE,), NAN), 0.1)
        assert isinstance(reply, Parameters)
        assert reply.refused
        assert cluster.server.master.version == 0
        cluster.push(1, GRADIENT, 0.1)
        assert cluster.server.master.version == 1

    def test_a_worker_out_of_batches_is_not_waited_for(self):
        cluster = Cluster("ssgd", 2, torch.ones(SIZE), plan=Plan(3, 1))
        for worker in (0, 1):
            cluster.push(worker, GRADIENT, 0.1)
        assert cluster.leases(0) == (2,)
        assert cluster.leases(1) == ()
        assert cluster.pull(1) is None
        cluster.push(0, GRADIENT, 0.1)
        assert cluster.server.master.version == 2
        assert all(isinstance(r, Parameters) and r.done for r in cluster.replies.values())

    def test_a_second_push_before_the_round_is_full(self):
        """A worker breaks the protocol. Nothing is done twice, and the round still closes."""
        core, view = started("ssgd", workers=2)
        core.handle(0, push_on(view), 1.0)
        reply = parameters(core.handle(0, push_on(view, request=3), 1.0))
        assert not reply.applied
        core.handle(1, push_on(view, worker=1, batch=1), 1.0)
        assert core.master.version == 0
        core.handle(0, push_on(reply, request=4), 1.0)
        assert core.master.version == 1
        assert core.leases.completed == 2


class TestDivergence:
    def test_three_strikes_of_every_worker(self):
        cluster = Cluster("dana", 2, torch.ones(SIZE))
        for worker in (0, 0, 0, 0, 1, 1):
            cluster.push(worker, torch.full((SIZE,), NAN), 0.1)
        assert not cluster.server.diverged, "worker 1 may still be well"
        reply = cluster.push(1, torch.full((SIZE,), NAN), 0.1)
        assert "not finite" in cluster.server.diverged
        assert isinstance(reply, Parameters)
        assert reply.done
        assert reply.leases == ()
        assert cluster.server.summary()["diverged"]

    def test_a_sound_push_clears_the_strikes(self):
        cluster = Cluster("dana", 1, torch.ones(SIZE))
        for value in (NAN, NAN, 1.0, NAN, NAN, 1.0):
            cluster.push(0, torch.full((SIZE,), value), 0.1)
        assert not cluster.server.diverged

    def test_the_strikes_of_the_dead_do_not_count(self):
        cluster = Cluster("dana", 2, torch.ones(SIZE))
        cluster.lose(1)
        for _ in range(3):
            cluster.push(0, torch.full((SIZE,), NAN), 0.1)
        assert cluster.server.diverged

    def test_a_loss_a_thousand_times_the_first(self):
        cluster = Cluster("asgd", 2, torch.ones(SIZE))
        cluster.push(0, GRADIENT, 0.1, loss=2.0)
        cluster.push(0, GRADIENT, 0.1, loss=2000.0)
        assert not cluster.server.diverged
        reply = cluster.push(0, GRADIENT, 0.1, loss=2000.1)
        assert "1000 times" in cluster.server.diverged
        assert isinstance(reply, Parameters)
        assert reply.done
        assert cluster.server.summary()["diverged_because"] == cluster.server.diverged

    def test_a_first_loss_of_zero_is_no_measure(self):
        cluster = Cluster("asgd", 2, torch.ones(SIZE))
        for loss in (0.0, 1e-6, 5.0):
            cluster.push(0, GRADIENT, 0.1, loss=loss)
        assert not cluster.server.diverged

    @pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
    def test_a_diverged_run_ends_for_all(self, algorithm):
        """Divergence is a result, not a crash: the run ends at once, and every worker gets the parameters."""
        cluster = Cluster(algorithm, 2, torch.ones(SIZE), ahead=3, buffers=2)
        loss = 1.0
        while not cluster.server.diverged:
            for worker in (0, 1):
                if worker in cluster.views:
                    cluster.push(worker, GRADIENT, 0.1, loss=loss)
            loss = 5000.0
        for worker in (0, 1):
            if worker in cluster.views and cluster.leases(worker):
                late = cluster.push(worker, GRADIENT, 0.1)
                assert isinstance(late, Parameters)
                assert (late.done, late.applied) == (True, False)
        for worker in (0, 1):
            cluster.leave(worker)
        assert all(final.diverged for final in cluster.final.values())
        for worker in (0, 1):
            cluster.bye(worker)
        assert cluster.server.finished

    def test_statistics_that_are_not_finite_do_not_keep_a_worker(self):
        """A worker that brings batch-norm statistics of a diverged model may leave, but they are not in the mean."""
        cluster = Cluster("dana", 2, torch.ones(SIZE), plan=Plan(1, 1), buffers=2)
        cluster.push(0, GRADIENT, 0.1)
        cluster.leave(0, torch.tensor([NAN, 1.0]))
        cluster.leave(1, torch.tensor([3.0, 4.0]))
        assert cluster.final.keys() == {0, 1}
        assert cluster.final[0].buffers.tolist() == [3.0, 4.0]
        assert cluster.server.totals.refusals["leaving worker's vectors are not finite"] == 1

    def test_a_gap_beyond_float32_is_none(self):
        cluster = Cluster("asgd", 2, torch.ones(SIZE), gap_every=1)
        cluster.push(0, GRADIENT, 1e30)
        cluster.push(1, GRADIENT, 1e30)
        assert [update.gap for update in cluster.updates] == [0.0, None]
        assert cluster.server.summary()["mean_gap"] == 0.0


class TestFigures:
    def test_summary(self):
        cluster = Cluster("asgd", 2, torch.zeros(SIZE), plan=Plan(4, 1), gap_every=1)
        cluster.push(0, GRADIENT, 0.1, loss=4.0, samples=8)
        cluster.now = 2.0
        cluster.push(1, GRADIENT, 0.1, loss=2.0, samples=6)
        summary = cluster.server.summary()
        gap = float(torch.linalg.vector_norm(0.1 * GRADIENT)) / SIZE**0.5
        assert summary["updates"] == 2
        assert summary["epochs"] == 0.5
        assert summary["final_train_loss"] == 3.0
        assert summary["mean_lag"] == 0.5
        assert summary["mean_gap"] == pytest.approx(gap / 2)
        assert summary["params_l2"] == pytest.approx(2 * float(torch.linalg.vector_norm(0.1 * GRADIENT)))
        assert (summary["wall_seconds"], summary["updates_per_second"], summary["images_per_second"]) == (2.0, 1.0, 7.0)

    def test_who_did_what(self):
        cluster = Cluster("asgd", 2, torch.zeros(SIZE), plan=Plan(8, 1), gap_every=1)
        for at, worker in [(1.0, 0), (2.0, 0), (3.0, 0), (4.0, 1)]:
            cluster.now = at
            cluster.workers[worker].spent = Spent(computing=at, exchanging=0.25)
            cluster.push(worker, GRADIENT, 0.1, samples=10)
        cluster.push(1, torch.full((SIZE,), float("nan")), 0.1)
        fast, slow = cluster.server.summary()["per_worker"].values()
        made = ("updates", "share_of_updates", "samples", "samples_per_second")
        assert [fast[name] for name in made] == [3, 0.75, 30, 7.5]
        assert [slow[name] for name in made] == [1, 0.25, 10, 2.5]
        assert (fast["median_lag"], fast["max_lag"], slow["median_lag"], slow["max_lag"]) == (0, 0, 3, 3)
        assert fast["mean_gap"] == 0.0 < slow["mean_gap"]
        assert (fast["computing_seconds"], slow["computing_seconds"], slow["exchanging_seconds"]) == (3.0, 4.0, 0.25)
        assert (fast["push_bytes"], slow["push_bytes"]) == (3 * 4 * SIZE, 4 * SIZE)
        assert (fast["view_bytes"], slow["view_bytes"]) == (4 * 4 * SIZE, 3 * 4 * SIZE)
        assert (fast["refused_pushes"], slow["refused_pushes"]) == (0, 1)

    def test_a_worker_that_starts_anew_keeps_what_it_did_before(self):
        cluster = Cluster("asgd", 2, torch.zeros(SIZE), plan=Plan(8, 1))
        for incarnation, computing in [(1, 5.0), (2, 2.0)]:
            if incarnation > 1:
                cluster.join(1, incarnation)
            cluster.workers[1].spent = Spent(computing=computing)
            cluster.push(1, GRADIENT, 0.1, samples=10)
        facts = cluster.server.summary()["per_worker"]["1"]
        assert (facts["updates"], facts["samples"], facts["restarts"]) == (2, 20, 1)
        assert facts["computing_seconds"] == 7.0

    def test_each_worker_of_a_round_has_made_the_update(self):
        cluster = Cluster("model-averaging", 2, torch.zeros(SIZE), plan=Plan(40, 1), sync_period=1)
        for worker, samples in [(0, 10), (1, 30)]:
            cluster.push(worker, GRADIENT, 0.1, samples=samples)
        first, second = cluster.server.summary()["per_worker"].values()
        assert (first["updates"], first["samples"], second["updates"], second["samples"]) == (1, 10, 1, 30)

    def test_a_restored_server_knows_it_and_goes_on_with_the_time(self):
        cluster = Cluster("asgd", 2, torch.zeros(SIZE), plan=Plan(8, 1), gap_every=1)
        for at, worker in [(1.0, 0), (2.0, 1)]:
            cluster.now = at
            cluster.push(worker, GRADIENT, 0.1, samples=10)
        assert [update.seconds for update in cluster.updates] == [1.0, 2.0]
        saved = cluster.server.snapshot()
        saved = Snapshot(json.loads(json.dumps(saved.facts)), saved.tensors)
        again = ServerCore(cluster.settings)
        again.restore(saved, [], life=1, now=1000.0)
        assert again.totals.of_workers == cluster.server.totals.of_workers
        assert again.totals.seconds_at(1000.5) == 2.5

    @pytest.mark.parametrize(("every", "measured"), [(0, []), (1, [1, 2, 3, 4, 5]), (2, [1, 3, 5])])
    def test_the_gap_is_measured_as_often_as_asked(self, every, measured):
        cluster = Cluster("asgd", 1, torch.zeros(SIZE), gap_every=every)
        for _ in range(5):
            cluster.push(0, GRADIENT, 0.1)
        assert [update.version for update in cluster.updates if update.gap is not None] == measured

    def test_the_gap_is_a_sum_over_layers(self):
        """Σ ‖Δψ‖ / √(size of ψ), for layers of 2 and 1."""
        cluster = Cluster("asgd", 2, torch.zeros(SIZE), groups=(2, 1), gap_every=1)
        cluster.push(0, torch.tensor([3.0, 4.0, 2.0]), (1.0, 1.0))
        cluster.push(1, torch.zeros(SIZE), (1.0, 1.0))
        assert cluster.updates[1].gap == pytest.approx(5 / 2**0.5 + 2)
        assert cluster.updates[1].gap_of == "parameters"

    def test_dana_measures_the_gap_between_look_aheads_and_says_so(self):
        cluster = Cluster("dana", 1, torch.zeros(SIZE), gap_every=1)
        cluster.push(0, GRADIENT, 0.1)
        assert cluster.updates[0].gap_of == "lookahead"
        assert cluster.server.summary()["gap_of"] == "lookahead"
