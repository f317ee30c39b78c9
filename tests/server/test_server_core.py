"""The server core with time as a number: which workers take part, and which are lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from axis import of
from cluster import DIGEST, TIMEOUT_S, Cluster, layout_of
from stimuli import GRADIENT, JOIN, SIZE, answer, arithmetic_of, make_core, parameters, push_on, started

from danaz.optimizers import SGD, Adam, Optimizers, Scalars, Sgd
from danaz.protocol.messages import MAX_WORKERS, Heartbeat, Leave, Parameters, Plan, Pull, Push, Refusal
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.worker.core import Role, Step, WorkerCore


class TestJoining:
    def test_training_starts_when_all_are_there(self):
        core = make_core(workers=3)
        assert core.handle("c", replace(JOIN, worker=2, params=None), 0.0) == []
        assert core.handle("a", JOIN, 1.0) == []
        assert not core.started
        replies = core.handle("b", replace(JOIN, worker=1, params=None), 2.0)
        assert core.started
        assert {route for route, _ in replies} == {"a", "b", "c"}
        for route, batch in (("a", 1), ("b", 2), ("c", 0)):
            reply = parameters(replies, route)
            assert torch.equal(reply.view, torch.ones(SIZE))
            assert (reply.version, reply.leases, reply.done, reply.applied) == (0, (batch,), False, False)

    def test_nobody_starts_before_worker_0_brought_the_parameters(self):
        core = make_core(workers=1)
        assert core.handle(1, replace(JOIN, worker=1, params=None), 0.0) == []
        assert not core.started
        assert len(core.handle(0, JOIN, 0.0)) == 2

    def test_a_repeated_join_is_answered_again(self):
        core, first = started()
        again = parameters(core.handle(0, JOIN, 1.0))
        assert (again.version, again.leases) == (first.version, first.leases)
        assert len(core.members) == 1

    def test_a_repeated_join_before_the_start_is_one_worker(self):
        core = make_core(workers=2)
        for _ in range(3):
            assert core.handle(0, JOIN, 0.0) == []
        assert not core.started

    def test_whoever_joins_later_gets_the_view_of_now(self):
        core, view = started("asgd")
        core.handle(0, push_on(view), 1.0)
        late = parameters(core.handle(7, replace(JOIN, worker=7, params=None), 2.0), 7)
        assert late.version == 1
        assert torch.equal(late.view, torch.ones(SIZE) - 0.1 * GRADIENT)

    def test_the_views_of_two_workers_are_not_one_buffer(self):
        core = make_core("asgd", workers=2)
        core.handle(0, JOIN, 0.0)
        one, other = (reply.view for _, reply in core.handle(1, replace(JOIN, worker=1, params=None), 0.0))
        core.handle(0, push_on(Parameters(1, 0, False, "", (0,), False, 0.0, 0, None, one)), 1.0)
        assert torch.equal(one, torch.ones(SIZE)), "a view may still be on its way when the next update is applied"
        assert torch.equal(other, torch.ones(SIZE))

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"digest": "another"}, "different configurations"),
            ({"worker": -1}, "worker number"),
            ({"worker": MAX_WORKERS}, "worker number"),
            ({"optimizers": Optimizers([Sgd(), Sgd()])}, "neither one optimizer nor one for each parameter group"),
            ({"optimizers": Optimizers()}, "neither one optimizer nor one for each parameter group"),
            ({"plan": Plan(0, 1)}, "out of range"),
            ({"plan": Plan(1, 0)}, "out of range"),
            ({"plan": Plan(-1, -1)}, "out of range"),
            ({"ahead": 0}, "out of range"),
            ({"ahead": 2**60}, "out of range"),
            ({"layout": layout_of(), "params": torch.zeros(0)}, "out of range"),
            ({"params": torch.ones(SIZE + 1)}, "wrong size"),
            ({"params": torch.tensor([1.0, float("nan"), 1.0])}, "not finite"),
        ],
    )
    def test_who_is_not_let_in(self, change, reason):
        core = make_core()
        refusal = answer(core.handle(0, replace(JOIN, **change), 0.0))
        assert isinstance(refusal, Refusal)
        assert reason in refusal.reason
        assert not refusal.rejoin
        assert sum(core.totals.refusals.values()) == 1
        assert not core.members
        assert parameters(core.handle(0, JOIN, 0.0)), "a valid worker can still join as before"

    def test_an_optimizer_that_the_rule_cannot_carry_out_is_not_let_in(self):
        core = make_core(algorithm="ssgd-lars")
        refusal = answer(core.handle(0, replace(JOIN, optimizers=Optimizers([Adam()])), 0.0))
        assert isinstance(refusal, Refusal)
        assert "ssgd-lars is a rule of SGD and cannot carry out adam" in refusal.reason

    @pytest.mark.parametrize(
        "change", [{"layout": layout_of(SIZE)}, {"plan": Plan(3, 3)}, {"optimizers": Optimizers([Sgd(0.5)])}]
    )
    def test_who_runs_another_job(self, change):
        core, _ = started()
        refusal = answer(core.handle(1, replace(JOIN, worker=1, **change), 0.0), 1)
        assert isinstance(refusal, Refusal)
        assert "differ" in refusal.reason
        assert list(core.members) == [0]

    def test_an_older_incarnation_stays_out(self):
        core, _ = started()
        core.handle(0, replace(JOIN, incarnation=2), 1.0)
        refusal = answer(core.handle(0, replace(JOIN, request=9), 2.0))
        assert isinstance(refusal, Refusal)
        assert "newer incarnation" in refusal.reason

    @pytest.mark.parametrize(
        "message", [Push(5, 1, 2, 0, (0.1,), 1, None, 0, GRADIENT), Pull(5, 1, 2), Leave(5, 1, 2, None, torch.zeros(2))]
    )
    def test_a_stranger_is_told_to_join(self, message):
        core, _ = started()
        refusal = answer(core.handle("x", message, 1.0), "x")
        assert isinstance(refusal, Refusal)
        assert refusal.rejoin
        assert core.totals.refusals["worker has not joined"] == 1

    def test_a_strangers_heartbeat_is_counted_and_not_answered(self):
        core, _ = started()
        assert core.handle("x", Heartbeat(5, 1), 1.0) == []
        assert core.totals.refusals["worker has not joined"] == 1


class TestSilence:
    def test_a_silent_worker_is_lost_and_others_get_its_batches(self):
        cluster = Cluster("asgd", 2, torch.ones(SIZE), plan=Plan(4, 1), ahead=2)
        assert cluster.leases(1) == (2, 3)
        cluster.lose(1)
        assert not cluster.server.members[1].alive
        seen = []
        while not (cluster.server.leases.done):
            seen.append(cluster.leases(0)[0])
            cluster.push(0, GRADIENT, 0.1)
        assert seen == [0, 1, 2, 3]

    def test_who_waits_for_batches_is_given_the_lost_ones(self):
        cluster = Cluster("asgd", 2, torch.ones(SIZE), plan=Plan(2, 1))
        cluster.push(0, GRADIENT, 0.1)
        assert cluster.leases(0) == ()
        assert cluster.pull(0) is None, "a batch may come back: worker 1 still holds one"
        cluster.lose(1)
        assert cluster.leases(0) == (1,)

    def test_just_within_the_timeout(self):
        core, _ = started()
        assert core.tick(TIMEOUT_S) == []
        assert core.members[0].alive
        core.tick(TIMEOUT_S + 0.01)
        assert not core.members[0].alive

    def test_a_heartbeat_keeps_alive(self):
        core, _ = started()
        for now in range(0, 600, 50):
            assert core.handle(0, Heartbeat(0, 1), float(now)) == []
            core.tick(float(now) + 49)
        assert core.members[0].alive

    def test_any_request_keeps_alive(self):
        core, _ = started()
        core.handle(0, Pull(0, 1, 2), 50.0)
        core.tick(100.0)
        assert core.members[0].alive

    def test_the_given_up_are_told_so(self):
        core, view = started()
        core.tick(TIMEOUT_S + 1)
        before = arithmetic_of(core)
        refusal = answer(core.handle(0, push_on(view), TIMEOUT_S + 2))
        assert isinstance(refusal, Refusal)
        assert refusal.rejoin
        assert "silent" in refusal.reason
        assert arithmetic_of(core) == before

    def both_pushed(self, optimizers: Optimizers) -> tuple[Cluster, torch.Tensor, list[torch.Tensor]]:
        """Return a cluster of two workers, of which each has pushed twice, θ, and each worker's look-ahead."""
        cluster = Cluster("dana-zero", 2, torch.zeros(SIZE), optimizers=optimizers)
        for worker in (0, 1, 1, 0):
            cluster.push(worker, torch.full((SIZE,), 1.0 + worker), 0.1)
        [optimizer], ahead = optimizers, [torch.zeros(SIZE), torch.zeros(SIZE)]
        for worker, member in cluster.server.members.items():
            optimizer.add_heading(ahead[worker], member.vectors, Scalars(0.1, 2), -optimizer.momentum)
            assert ahead[worker].all()
        return cluster, cluster.server.master.params.clone(), ahead

    @of("sgd adamw nadam")
    def test_the_same_incarnation_finds_its_state_again(self, optimizers):
        cluster, theta, ahead = self.both_pushed(optimizers)
        cluster.lose(1)
        cluster.pull(0)
        assert torch.allclose(cluster.views[0], theta + ahead[0]), "the look-ahead leaves out lost workers"
        cluster.come_back(1)
        assert torch.allclose(cluster.views[1], theta + ahead[0] + ahead[1])
        cluster.pull(0)
        assert torch.allclose(cluster.views[0], theta + ahead[0] + ahead[1])

    @of("sgd adamw nadam")
    def test_a_newer_incarnation_starts_at_zero(self, optimizers):
        """So does its count of gradients: its first step is that of a worker that has just begun."""
        cluster, theta, ahead = self.both_pushed(optimizers)
        cluster.join(1, incarnation=2)
        assert torch.allclose(cluster.views[1], theta + ahead[0])
        assert not any(vector.any() for vector in cluster.server.members[1].vectors.values())
        view, lone = cluster.views[1].clone(), Cluster("multi-asgd", 1, cluster.views[1], optimizers=optimizers)
        cluster.push(1, GRADIENT, 0.1)
        lone.push(0, GRADIENT, 0.1)
        step, first = cluster.server.master.params - theta, lone.server.master.params - view
        assert torch.allclose(step, first, atol=1e-6)

    def test_a_newer_incarnation_takes_the_place_of_a_live_one(self):
        core, view = started(workers=1)
        fresh = parameters(core.handle("new", replace(JOIN, incarnation=2, params=None), 1.0), "new")
        assert fresh.leases == (0,), "the batch that the old process held"
        refusal = answer(core.handle(0, push_on(view), 2.0))
        assert isinstance(refusal, Refusal)
        assert "another incarnation" in refusal.reason

    def test_lag_counts_from_the_view_sent_last_also_after_coming_back(self):
        cluster = Cluster("asgd", 2, torch.ones(SIZE))
        for _ in range(3):
            cluster.push(0, GRADIENT, 0.1)
        cluster.lose(1)
        cluster.come_back(1)
        cluster.push(0, GRADIENT, 0.1)
        cluster.push(1, GRADIENT, 0.1)
        assert [update.lag for update in cluster.updates] == [0, 0, 0, 0, 1]

    def test_a_worker_lost_before_the_start_is_waited_for(self):
        core = make_core(workers=2)
        core.handle(0, JOIN, 0.0)
        core.tick(TIMEOUT_S + 1)
        assert core.handle(1, replace(JOIN, worker=1, params=None), TIMEOUT_S + 2) == []
        assert len(core.handle(0, replace(JOIN, request=2), TIMEOUT_S + 3)) == 2
        assert core.started


def test_who_comes_back_is_told_what_of_his_was_applied():
    core = ServerCore(ServerSettings("dana", workers=1, digest=DIGEST, worker_timeout_s=10))
    role = Role(0, 1, DIGEST, SGD, layout_of(2), Plan(9, 1))
    worker = WorkerCore(role, core.settings.rule().worker_rule)
    [(_, first)] = core.handle(b"a", worker.join(torch.zeros(2)), 0.0)
    worker.receive(first)
    push = worker.push(Step(0, (0.1,), 1, None), torch.ones(2))
    [(_, lost)] = core.handle(b"a", push, 1.0)
    assert lost.applied
    core.tick(20.0)
    [(_, refusal)] = core.handle(b"a", push, 21.0)
    assert refusal.rejoin
    worker.receive(refusal)
    [(_, view)] = core.handle(b"a", worker.join(), 22.0)
    worker.receive(view)
    assert view.last_applied == push.request
    assert worker.vectors["velocity"].tolist() == [1.0, 1.0]
