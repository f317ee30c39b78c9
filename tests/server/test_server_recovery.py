"""A restarted server, with time as a number: where it goes on, what is lost, and which workers are sick."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from axis import of, under
from cluster import Cluster
from stimuli import GRADIENT, JOIN, NAN, SIZE, answer, parameters, push_on, started

from danaz.optimizers import SGD, Adam, Optimizers
from danaz.protocol.messages import Final, Heartbeat, Noted, Parameters, Plan, Refusal, Report, Streamed
from danaz.protocol.refusals import OUTLIER
from danaz.server.core import ServerCore
from danaz.server.health import ENOUGH_PUSHES, PushHealth
from danaz.server.snapshot import Snapshot
from danaz.vectors.counts import Counts
from danaz.worker.core import Step
from danaz.worker.states import WorkerState

REPORTED = {"not_finite": 0, "outliers": 1, "refused_pushes": 0, "dropped_batches": 0, "dropped_samples": 0}


class Restartable(Cluster):
    """A cluster whose server can be killed and started again from a checkpoint."""

    def __init__(self, *args, **kwargs):
        self.notices: list[str] = []
        super().__init__(*args, **kwargs)

    def restart(self, state: Snapshot, life: int = 1) -> None:
        self.server = ServerCore(self.settings, on_update=self.updates.append, on_notice=self.notices.append)
        self.server.restore(state, self.updates[state.version :], life, self.now)

    def train(self, pushes: int) -> None:
        for number in range(pushes):
            self.push(number % len(self.workers), GRADIENT * (1 + number % 3), 0.1)


class TestGoingOn:
    @under({"dana": "sgd adamw", "asgd": "adamw"})
    def test_it_goes_on_from_the_newest_view(self, algorithm, optimizers):
        cluster = Restartable(algorithm, 2, torch.ones(SIZE), optimizers=optimizers)
        cluster.train(4)
        state = cluster.server.snapshot()
        cluster.train(5)
        before = cluster.server
        cluster.restart(state)
        cluster.come_back(1)
        assert 1 not in cluster.views, "worker 0 may have a newer one"
        cluster.come_back(0)
        assert torch.equal(cluster.server.master.params, before.master.params)
        assert (cluster.server.master.version, cluster.server.totals.lost_updates) == (9, 0)
        assert [m.updates for m in cluster.server.members.values()] == [5, 4]
        assert cluster.server.leases.completed == before.leases.completed
        assert cluster.notices == ["server restarted: it goes on at version 9, 0 updates are lost"]

    def test_dana_loses_what_nobody_holds_a_view_of(self):
        cluster = Restartable("dana", 2, torch.ones(SIZE))
        state = cluster.server.snapshot()
        cluster.train(4)
        theta = cluster.server.master.params.clone()
        core = cluster.workers[0]
        push = core.push(Step(cluster.leases(0)[0], (0.1,), 1, 1.0), GRADIENT)
        cluster.server.handle(0, push, 0.0)  # its answer is lost
        cluster.restart(state)
        for worker in (0, 1):
            cluster.come_back(worker)
        assert torch.equal(cluster.server.master.params, theta)
        assert (cluster.server.master.version, cluster.server.totals.lost_updates) == (4, 1)

    @of()
    def test_an_unanswered_push_that_is_in_the_newest_view_is_not_done_again(self, optimizers):
        cluster = Restartable("dana", 2, torch.ones(SIZE), optimizers=optimizers)
        state = cluster.server.snapshot()
        core = cluster.workers[0]
        push = core.push(Step(cluster.leases(0)[0], (0.1,), 1, 1.0), GRADIENT, cluster.views[0].clone())
        cluster.server.handle(0, push, 0.0)  # no answer
        cluster.push(1, GRADIENT, 0.1)
        cluster.restart(state)
        for worker in (0, 1):
            cluster.come_back(worker)
        assert cluster.server.master.version == 2
        mean = GRADIENT if optimizers == SGD else (1 - 0.9) * GRADIENT
        assert torch.allclose(next(iter(core.vectors.values())), mean), "its worker knows"

    def test_what_was_reported_is_kept_before_it_is_acknowledged(self):
        core, _ = started("dana", workers=1)

        def fail(reported: object) -> None:
            raise OSError("disk full")

        core.on_report = fail
        with pytest.raises(OSError, match="disk full"):
            core.handle(0, Report(0, 1, 2, {"test_error_percent": 2.5}), 0.0)
        kept: list[dict[str, object]] = []
        core.on_report = kept.append
        assert isinstance(answer(core.handle(0, Report(0, 1, 2, {"test_error_percent": 2.5}), 0.0)), Noted)
        assert kept == [{"test_error_percent": 2.5}]

    @under({"dana-zero": "sgd adamw"})
    def test_it_goes_back_to_the_checkpoint(self, algorithm, optimizers):
        cluster = Restartable(algorithm, 2, torch.ones(SIZE), optimizers=optimizers)
        cluster.train(4)
        state, view = cluster.server.snapshot(), cluster.views[1].clone()
        cluster.train(5)
        cluster.restart(state)
        for worker in (0, 1):
            cluster.come_back(worker)
        assert (cluster.server.master.version, cluster.server.totals.lost_updates) == (4, 5)
        assert torch.allclose(cluster.views[1], view), "parameters and all states"
        assert cluster.server.leases.completed == 4

    def test_a_view_from_before_another_restart_is_not_believed(self):
        """The server has made that version again since, from other pushes."""
        cluster = Restartable("asgd", 2, torch.ones(SIZE))
        state = cluster.server.snapshot()
        cluster.train(4)
        cluster.restart(state, life=1)
        cluster.now += cluster.settings.recovery_s
        cluster.come_back(0)  # worker 1 goes on computing, with its view of version 4
        assert cluster.server.master.version == 3
        del cluster.updates[3:]
        for _ in range(2):
            cluster.push(0, GRADIENT, 0.1)
        cluster.restart(state, life=2)
        cluster.now += cluster.settings.recovery_s
        cluster.come_back(1)
        assert cluster.server.master.version == 0
        assert torch.equal(cluster.server.master.params, torch.ones(SIZE))

    def test_who_does_not_come_is_not_waited_for(self):
        cluster = Restartable("dana-zero", 2, torch.ones(SIZE))
        cluster.train(2)
        cluster.restart(cluster.server.snapshot())
        cluster.come_back(0)
        cluster.now += cluster.settings.recovery_s - 0.1
        cluster.deliver(cluster.server.tick(cluster.now))
        assert 0 not in cluster.views
        cluster.now += 0.1
        cluster.deliver(cluster.server.tick(cluster.now))
        assert 0 in cluster.views

    def test_whoever_beats_is_alive_although_it_has_not_joined_again(self):
        """It computes a batch, and is the last to hear of the restart."""
        cluster = Restartable("dana-zero", 2, torch.ones(SIZE))
        cluster.restart(cluster.server.snapshot())
        cluster.come_back(0)
        for _ in range(10):
            cluster.now += 20
            for worker in (0, 1):
                assert cluster.server.handle(worker, Heartbeat(worker, 1), cluster.now) == [] or worker == 0
            cluster.deliver(cluster.server.tick(cluster.now))
        assert cluster.server.members[1].alive
        assert not cluster.server.finished

    def test_who_speaks_to_a_new_server_is_told_to_join_again(self):
        core, view = started("dana-zero")
        anew = ServerCore(core.settings)
        anew.restore(core.snapshot(), [], 1, 0.0)
        refusal = answer(anew.handle(0, push_on(view), 1.0))
        assert isinstance(refusal, Refusal)
        assert (refusal.rejoin, refusal.reason) == (True, "the server was restarted")

    def test_a_push_that_was_computed_before_the_restart_is_refused(self):
        """Its view has the same version as a view of the new server, but may differ from it."""
        core, _ = started("dana-zero")
        anew = ServerCore(core.settings)
        anew.restore(core.snapshot(), [], 1, 0.0)
        view = parameters(anew.handle(0, replace(JOIN, request=2, params=None), 1.0))
        late = parameters(anew.handle(0, push_on(view, request=3, life=0), 1.0))
        assert (late.applied, late.refused) == (False, "push was computed before the server was restarted")
        again = parameters(anew.handle(0, push_on(late, request=4, life=1), 1.0))
        assert again.applied

    def test_views_travel_as_before(self):
        core, _ = started("dana-zero", wire_view="bf16", recovery_s=0.0)
        anew = ServerCore(core.settings)
        anew.restore(core.snapshot(), [], 1, 0.0)
        [(_, view)] = anew.stream(0, replace(JOIN, request=2), 0.0)
        assert isinstance(view, Streamed)
        assert view.codec.name == "bf16"

    def test_a_new_process_takes_the_place_of_one_that_died_with_the_server(self):
        cluster = Restartable("dana-zero", 2, torch.zeros(SIZE))
        cluster.train(2)
        theta = cluster.server.master.params.clone()
        velocity = cluster.server.members[0].vectors["velocity"].clone()
        cluster.restart(cluster.server.snapshot())
        cluster.join(1, incarnation=2)
        cluster.come_back(0)
        assert torch.allclose(cluster.views[0], theta - 0.9 * 0.1 * velocity), "its velocity starts at zero"

    def test_the_end_survives(self):
        """All workers have left, but none got the answer. The parameters stay, and each share is given back once."""
        plan = Plan(2, 1)
        cluster = Restartable("dana", 2, torch.ones(SIZE), plan=plan)
        for worker in (0, 1):
            cluster.push(worker, GRADIENT, 0.1)
        state = cluster.server.snapshot()
        cluster.leave(0)
        cluster.leave(1)
        theta = cluster.final.pop(0).params
        cluster.restart(state)
        assert not cluster.server.finished
        for worker in (0, 1):
            core = cluster.workers[worker]
            core.state = WorkerState.JOINED  # it never heard of the end
            cluster.come_back(worker)
        for worker in (0, 1):
            cluster.leave(worker)
        assert isinstance(cluster.replies[1], Final)
        assert torch.equal(cluster.final[0].params, theta)


class TestSickWorkers:
    def test_one_that_is_not_finite_is_named_once(self):
        notices: list[str] = []
        core, view = started("asgd")
        core.state.health = PushHealth(notices.append)
        for request in (2, 3):
            view = parameters(core.handle(0, push_on(view, request=request, grad=GRADIENT * NAN), 1.0))
        assert len(notices) == 1
        assert "worker 0 is sick" in notices[0]
        lost = {"refused_pushes": 2, "dropped_batches": 2, "dropped_samples": 8}
        assert core.summary()["sick_workers"] == {"0": {"not_finite": 2, "outliers": 0, **lost}}

    def train_with_an_outlier(self, algorithm: str, *, refuse: bool, factor: float) -> tuple[Restartable, Parameters]:
        cluster = Restartable(algorithm, 2, torch.zeros(SIZE))
        cluster.server = ServerCore(replace(cluster.settings, refuse_outliers=refuse), on_notice=cluster.notices.append)
        for worker in (0, 1):
            cluster.join(worker)
        cluster.train(2 * ENOUGH_PUSHES)
        reply = cluster.push(1, GRADIENT * factor, 0.1)
        assert isinstance(reply, Parameters)
        return cluster, reply

    @pytest.mark.parametrize("algorithm", ["asgd", "dana", "dana-zero"])
    def test_one_with_huge_steps_is_reported(self, algorithm):
        cluster, reply = self.train_with_an_outlier(algorithm, refuse=False, factor=3000.0)
        assert reply.applied
        assert len(cluster.notices) == 1
        assert "worker 1 may be sick" in cluster.notices[0]
        assert cluster.server.summary()["sick_workers"] == {"1": REPORTED}

    def test_and_refused_if_so_wished(self):
        cluster, reply = self.train_with_an_outlier("asgd", refuse=True, factor=3000.0)
        assert (reply.applied, reply.refused) == (False, OUTLIER)
        assert cluster.server.leases.completed == 2 * ENOUGH_PUSHES + 1, "its batch counts as used"
        assert isinstance(cluster.push(1, GRADIENT, 0.1), Parameters)

    def test_a_larger_batch_gradient_is_no_sickness(self):
        cluster, _ = self.train_with_an_outlier("asgd", refuse=True, factor=50.0)
        assert cluster.notices == []

    def test_a_rate_that_rises_is_no_sickness(self):
        """Displacements are compared after division by the rate, because a schedule may begin again."""
        cluster = Restartable("dana", 2, torch.zeros(SIZE))
        for _ in range(2 * ENOUGH_PUSHES):
            for worker in (0, 1):
                cluster.push(worker, GRADIENT, 1e-6)
        cluster.push(0, GRADIENT, 0.1)
        assert cluster.server.summary()["sick_workers"] == {}

    def test_counts_outlive_a_restart(self):
        cluster, _ = self.train_with_an_outlier("asgd", refuse=False, factor=3000.0)
        state = cluster.server.snapshot()
        cluster.restart(state)
        assert cluster.server.summary()["sick_workers"] == {"1": REPORTED}


# ---- the state of any optimizer outlives a restart -------------------------------------------------------------------


KINDS = "sgd adamw amsgrad nadam rmsprop"


@under(
    {
        **dict.fromkeys(("nag-asgd", "multi-asgd", "dana-zero", "dana", "dana-ga"), KINDS),
        **dict.fromkeys(("asgd", "sa", "dana-dc", "dc-asgd", "easgd", "eamsgd"), "sgd adamw"),
        "dana-nadam": "sgd",
    }
)
def test_a_restarted_server_goes_on_where_it_was(algorithm, optimizers):
    """A parameter that had no gradient now and then keeps its own count of them, also in the checkpoint.

    Sums of headings are made afresh when workers come back, so the two ends differ by rounding.
    """
    killed, spared = (Restartable(algorithm, 2, torch.ones(SIZE), optimizers=optimizers) for _ in "ab")
    steps = killed.sync_period
    for cluster in (killed, spared):
        for turn in range(7):
            absent = ((0, 1),) if turn in (3, 5, 6) else ()
            cluster.push(turn % 2, [GRADIENT * (1 + turn)] * steps, 0.1 / (1 + turn), absent=absent)
    killed.server.settle()
    saved = killed.server.snapshot()
    killed.restart(Snapshot(json.loads(json.dumps(saved.facts)), saved.tensors))
    for worker in (0, 1):
        killed.come_back(worker)
        spared.pull(worker)
    for cluster in (killed, spared):
        for turn in range(6):
            cluster.push(turn % 2, [GRADIENT * (2 - turn)] * steps, 0.05)
        for worker in (0, 1):
            cluster.leave(worker)
    torch.testing.assert_close(killed.server.master.params, spared.server.master.params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["nag-asgd", "multi-asgd", "dana-zero"])
def test_a_checkpoint_of_an_earlier_version_has_one_last_rate_for_each_group(algorithm):
    """There, counts had no rates beside them."""
    killed, spared = (Restartable(algorithm, 2, torch.ones(SIZE), optimizers=Optimizers([Adam()])) for _ in "ab")
    for cluster in (killed, spared):
        for turn in range(4):
            cluster.push(turn % 2, GRADIENT * (1 + turn), 0.1 / (1 + turn))
    killed.server.settle()
    saved = killed.server.snapshot()
    facts = json.loads(json.dumps(saved.facts))
    for values in (facts["master"], *facts["members"]):
        *values["counts"], rates = values["counts"]
        values["lr"] = rates
    killed.restart(Snapshot(facts, saved.tensors))
    for worker in (0, 1):
        killed.come_back(worker)
        spared.pull(worker)
    for worker, view in spared.views.items():
        torch.testing.assert_close(killed.views[worker], view, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_an_earlier_version_has_a_member_without_a_state():
    """A worker that was known from the journal alone, when that checkpoint was written, had counts of nothing."""
    cluster = Restartable("dana-zero", 2, torch.ones(SIZE), optimizers=Optimizers([Adam()]))
    for turn in range(4):
        cluster.push(turn % 2, GRADIENT, 0.1)
    cluster.server.settle()
    saved = cluster.server.snapshot()
    facts = json.loads(json.dumps(saved.facts))
    for values in (facts["master"], *facts["members"]):
        *values["counts"], rates = values["counts"]
        values["lr"] = rates
    facts["members"][1]["counts"] = [[0], [0]]
    cluster.restart(Snapshot(facts, saved.tensors))
    assert cluster.server.members[1].counts == Counts.of(SIZE)
