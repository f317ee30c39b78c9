"""The server core with time as a number: who takes part, what is applied once, what touches nothing, how a run ends."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from cluster import DIGEST, TIMEOUT_S, Cluster, layout_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from danaz.server.admission import MAX_WORKERS
from danaz.server.core import Replies, ServerCore
from danaz.server.messages import (
    Final,
    Heartbeat,
    Join,
    Leave,
    Noted,
    Parameters,
    Plan,
    Pull,
    Push,
    Refusal,
    Reply,
    Request,
)
from danaz.server.settings import ServerSettings
from danaz.worker.core import Role, WorkerCore

SIZE = 3
LAYOUT = layout_of(SIZE, buffers=2)
PLAN = Plan(batches_per_epoch=10, epochs=2)
JOIN = Join(0, 1, 1, DIGEST, 0.9, LAYOUT, PLAN, 1, torch.ones(SIZE))
GRADIENT = torch.tensor([1.0, -2.0, 3.0])


def make_core(algorithm: str = "dana-zero", workers: int = 1, **changes: object) -> ServerCore:
    changes = {"worker_timeout_s": TIMEOUT_S, "digest": DIGEST, **changes}
    return ServerCore(ServerSettings(algorithm=algorithm, workers=workers, **changes))  # type: ignore[arg-type]


def started(algorithm: str = "dana-zero", workers: int = 1, **changes: object) -> tuple[ServerCore, Parameters]:
    """A core with its workers in the run, and the first view of worker 0."""
    core = make_core(algorithm, workers, **changes)
    for worker in range(workers):
        replies = core.handle(worker, replace(JOIN, worker=worker, params=JOIN.params if worker == 0 else None), 0.0)
    [view] = [reply for route, reply in replies if route == 0]
    assert isinstance(view, Parameters)
    return core, view


def push_on(view: Parameters, worker: int = 0, request: int = 2, grad: Tensor = GRADIENT, **changes: object) -> Push:
    push = Push(worker, 1, request, view.version, (0.1,), 4, 0.5, view.leases[0], grad.clone())
    return replace(push, **changes)  # type: ignore[arg-type]


def answer(replies: Replies, route: object = 0) -> Reply:
    [reply] = [reply for to, reply in replies if to == route]
    return reply


def parameters(replies: Replies, route: object = 0) -> Parameters:
    reply = answer(replies, route)
    assert isinstance(reply, Parameters)
    return reply


def arithmetic_of(core: ServerCore) -> list[object]:
    """All that an update changes, as plain numbers."""
    master = core.master
    vectors = {
        f"{m.worker}.{name}": vector.tolist() for m in core.members.values() for name, vector in m.vectors.items()
    }
    shared = {name: vector.tolist() for name, vector in master.shared.items()}
    rates = [(m.worker, m.lr, m.updates) for m in core.members.values()]
    return [
        master.params.tolist(),
        master.version,
        master.lr,
        master.max_lr,
        vectors,
        shared,
        rates,
        core.figures.updates,
    ]


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
            ({"momentum": 1.0}, "out of range"),
            ({"momentum": float("nan")}, "out of range"),
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
        assert sum(core.figures.refusals.values()) == 1
        assert not core.members
        assert parameters(core.handle(0, JOIN, 0.0)), "and a fit worker finds the place as it was"

    @pytest.mark.parametrize("change", [{"layout": layout_of(SIZE)}, {"plan": Plan(3, 3)}, {"momentum": 0.5}])
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
        assert core.figures.refusals["worker has not joined"] == 1

    def test_a_strangers_heartbeat_is_counted_and_not_answered(self):
        core, _ = started()
        assert core.handle("x", Heartbeat(5, 1), 1.0) == []
        assert core.figures.refusals["worker has not joined"] == 1


class TestExactlyOnce:
    def test_a_push_is_applied(self):
        core, view = started("asgd")
        reply = parameters(core.handle(0, push_on(view), 1.0))
        assert (reply.applied, reply.refused, reply.version, reply.request) == (True, "", 1, 2)
        assert torch.equal(reply.view, torch.ones(SIZE) - 0.1 * GRADIENT)
        assert reply.leases == (1,)
        assert reply.epoch == 0.1

    @pytest.mark.parametrize("algorithm", ["asgd", "nag-asgd", "multi-asgd", "dana-zero", "dana"])
    def test_a_repeated_push_is_applied_once(self, algorithm):
        core, view = started(algorithm, workers=2)
        push = push_on(view)
        first = parameters(core.handle(0, copy.deepcopy(push), 1.0))
        before = arithmetic_of(core)
        again = parameters(core.handle(0, copy.deepcopy(push), 2.0))
        assert arithmetic_of(core) == before
        assert (again.applied, again.version, again.leases) == (True, first.version, first.leases)
        assert torch.equal(again.view, first.view)

    def test_the_repeated_push_is_answered_with_the_view_of_now(self):
        """The reply was lost, and meanwhile another worker pushed."""
        core, view = started("asgd", workers=2)
        core.handle(0, push_on(view), 1.0)
        core.handle(1, push_on(view, worker=1, batch=1), 1.0)
        again = parameters(core.handle(0, push_on(view), 2.0))
        assert (again.applied, again.version) == (True, 2)
        assert torch.equal(again.view, core.master.params)
        assert parameters(core.handle(0, push_on(again, request=3), 3.0)).applied

    def test_a_late_copy_of_an_answered_push_is_dropped(self):
        core, view = started("asgd")
        second = parameters(core.handle(0, push_on(view), 1.0))
        core.handle(0, push_on(second, request=3), 2.0)
        before = arithmetic_of(core)
        assert core.handle(0, push_on(view), 3.0) == []
        assert arithmetic_of(core) == before

    def test_a_late_copy_of_the_join_changes_nothing(self):
        """Else copies of old pushes behind it would look new. A process started anew learns why it is not let in."""
        core, view = started("asgd")
        for request in (2, 3):
            view = parameters(core.handle(0, push_on(view, request=request), 1.0))
        refusal = answer(core.handle("old route", JOIN, 2.0), "old route")
        assert isinstance(refusal, Refusal)
        assert (refusal.request, refusal.reason) == (1, "this incarnation of the worker has joined and gone on")
        assert core.handle(0, push_on(view, request=2), 2.0) == [], "still an old one"
        assert parameters(core.handle(0, push_on(view, request=4), 3.0)).applied

    def test_a_push_on_another_view_is_refused_and_its_batch_leased_again(self):
        core, view = started("asgd", workers=2)
        before = arithmetic_of(core)
        reply = parameters(core.handle(0, push_on(view, view_version=7), 1.0))
        assert not reply.applied
        assert "another view" in reply.refused
        assert reply.leases == (0,), "to whoever comes first, and that is the same worker"
        assert arithmetic_of(core) == before
        assert core.leases.completed == 0
        assert parameters(core.handle(0, push_on(reply, request=3), 2.0)).applied

    def test_the_late_reply_to_a_repeated_push(self):
        """The worker took the first reply, the server meanwhile counts on the second: refused, redone, nothing lost."""
        core, view = started("asgd", workers=2)
        first = parameters(core.handle(0, push_on(view), 1.0))
        core.handle(1, push_on(view, worker=1, batch=1), 1.0)
        core.handle(0, push_on(view), 2.0)
        reply = parameters(core.handle(0, push_on(first, request=3), 3.0))
        assert "another view" in reply.refused
        assert parameters(core.handle(0, push_on(reply, request=4), 4.0)).applied
        assert core.leases.completed == 3
        assert core.master.version == 3

    def test_a_push_once_refused_is_not_applied_later(self):
        """Its copy comes when it would fit: the worker may have read the refusal, and taken its velocity back."""
        core, view = started("asgd", workers=2)
        push = push_on(view, view_version=1)
        assert "another view" in parameters(core.handle(0, push, 1.0)).refused
        core.handle(1, push_on(view, worker=1, batch=1), 2.0)
        assert parameters(core.handle(0, push, 3.0)).version == 1, "the view that the push says it was computed on"
        assert "another view" in parameters(core.handle(0, push, 4.0)).refused
        assert core.master.version == 1

    def test_a_join_repeated_while_a_round_is_open(self):
        """Its answer is on its way: the worker is in this round already."""
        core, view = started("ssgd", workers=2)
        core.handle(0, push_on(view), 1.0)
        again = parameters(core.handle(1, replace(JOIN, worker=1, params=None), 2.0), 1)
        core.handle(1, push_on(again, worker=1), 3.0)
        assert core.master.version == 1

    def test_a_push_waiting_for_its_round_is_taken_once(self):
        core, view = started("ssgd", workers=2)
        assert core.handle(0, push_on(view), 1.0) == []
        assert core.handle(0, push_on(view), 2.0) == []
        replies = core.handle(1, push_on(view, worker=1, batch=1), 3.0)
        assert {route for route, _ in replies} == {0, 1}
        assert core.master.version == 1
        assert torch.allclose(core.master.params, torch.ones(SIZE) - 0.1 * GRADIENT)

    def test_a_pull_is_answered_again(self):
        core, _ = started()
        one, two = (parameters(core.handle(0, Pull(0, 1, 2), float(t))) for t in (1, 2))
        assert one.leases == two.leases == (0,)

    def test_a_heartbeat_comes_from_another_socket(self):
        """It must not draw the answers to itself."""
        core = make_core("ssgd", workers=2)
        core.handle("a", JOIN, 0.0)
        core.handle("heart of a", Heartbeat(0, 1), 5.0)
        replies = core.handle("b", replace(JOIN, worker=1, params=None), 6.0)
        assert {route for route, _ in replies} == {"a", "b"}
        core.handle("a", push_on(parameters(replies, "a")), 7.0)
        core.handle("heart of a", Heartbeat(0, 1), 12.0)
        replies = core.handle("b", push_on(parameters(replies, "b"), worker=1), 13.0)
        assert {route for route, _ in replies} == {"a", "b"}

    def test_answers_follow_a_worker_that_reconnected(self):
        core, view = started("asgd")
        assert parameters(core.handle("new route", push_on(view), 1.0), "new route").applied


NAN, INF = float("nan"), float("inf")
UNSOUND = {
    "NaN": {"push": torch.tensor([1.0, NAN, 1.0])},
    "infinity": {"push": torch.tensor([1.0, INF, 1.0])},
    "minus infinity": {"push": torch.tensor([-INF, 1.0, 1.0])},
    "all NaN": {"push": torch.full((SIZE,), NAN)},
    "NaN loss": {"loss": NAN},
    "infinite loss": {"loss": INF},
    "NaN rate": {"lr": (NAN,)},
    "infinite rate": {"lr": (INF,)},
    "negative rate": {"lr": (-0.1,)},
    "rate beyond float32": {"lr": (1e300,)},
    "negative samples": {"samples": -1},
}
MISFITS = {
    "too short": {"push": torch.ones(SIZE - 1)},
    "too long": {"push": torch.ones(SIZE + 1)},
    "empty": {"push": torch.ones(0)},
    "no rate": {"lr": ()},
    "too many rates": {"lr": (0.1, 0.1)},
}
NOT_LEASED = {
    "batch of another": {"batch": 1},
    "batch of nobody": {"batch": 15},
    "no such batch": {"batch": 10**9},
    "negative batch": {"batch": -1},
    "earlier batch of another": {"earlier": (1,)},
    "the same batch twice": {"earlier": (0,)},
}


@pytest.mark.parametrize("algorithm", ["dana-zero", "dana-ga", "dana", "ssgd", "bmuf"])
class TestWhatTouchesNothing:
    def worn(self, algorithm: str) -> tuple[ServerCore, Parameters, list[object]]:
        """A core of two workers that each have pushed, so that every vector holds something."""
        core, view = started(algorithm, workers=2)
        core.handle(0, push_on(view), 1.0)
        replies = core.handle(1, push_on(view, worker=1, batch=1), 1.0)
        view = parameters(replies) if algorithm in ("ssgd", "bmuf") else parameters(core.handle(0, Pull(0, 1, 3), 1.0))
        return core, view, arithmetic_of(core)

    @pytest.mark.parametrize("change", UNSOUND.values(), ids=UNSOUND)
    def test_an_unsound_push(self, algorithm, change):
        core, view, before = self.worn(algorithm)
        reply = parameters(core.handle(0, push_on(view, request=4, **change), 2.0))
        assert arithmetic_of(core) == before
        assert (reply.applied, reply.refused) == (False, "push is not finite")
        assert core.figures.refusals == {"push is not finite": 1}
        assert core.leases.completed == 3, "computed again, it would be no better: the batch counts as used"
        assert not core.diverged

    @pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
    def test_a_push_of_the_wrong_size(self, algorithm, change):
        core, view, before = self.worn(algorithm)
        reply = parameters(core.handle(0, push_on(view, request=4, **change), 2.0))
        assert arithmetic_of(core) == before
        assert reply.refused == "push has the wrong size"
        assert core.figures.refusals == {"push has the wrong size": 1}
        assert core.leases.completed == 2
        assert view.leases[0] in reply.leases

    @pytest.mark.parametrize("change", NOT_LEASED.values(), ids=NOT_LEASED)
    def test_a_push_of_batches_it_does_not_hold(self, algorithm, change):
        core, view, before = self.worn(algorithm)
        change = {"earlier": (view.leases[0],)} if change == {"earlier": (0,)} else change
        reply = parameters(core.handle(0, push_on(view, request=4, **change), 2.0))
        assert arithmetic_of(core) == before
        assert reply.refused == "batch was not leased to this worker"
        assert core.leases.completed == 2
        assert not core.leases.holds(1, view.leases[0])

    def test_the_refused_push_repeated(self, algorithm):
        """Its answer was lost: refused again, and no strike more."""
        core, view, before = self.worn(algorithm)
        for now in (2.0, 3.0, 4.0, 5.0):
            reply = parameters(core.handle(0, push_on(view, request=4, **UNSOUND["NaN"]), now))
            assert (reply.applied, reply.refused) == (False, "push is not finite")
        assert arithmetic_of(core) == before
        assert core.members[0].strikes == 1
        assert core.leases.completed == 3

    def test_and_the_run_goes_on(self, algorithm):
        core, view, _ = self.worn(algorithm)
        version = core.master.version
        reply = parameters(core.handle(0, push_on(view, request=4, **UNSOUND["NaN"]), 2.0))
        core.handle(0, push_on(reply, request=5), 3.0)
        other = parameters(core.handle(1, Pull(1, 1, 3), 3.0), 1)
        core.handle(1, push_on(other, worker=1, request=4), 3.0)
        assert core.master.version > version


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
        assert cluster.server.master.version == 1, "and now it is waited for"
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
        """A worker against the protocol: nothing is done twice, and the round still closes."""
        core, view = started("ssgd", workers=2)
        core.handle(0, push_on(view), 1.0)
        reply = parameters(core.handle(0, push_on(view, request=3), 1.0))
        assert not reply.applied
        core.handle(1, push_on(view, worker=1, batch=1), 1.0)
        assert core.master.version == 0
        core.handle(0, push_on(reply, request=4), 1.0)
        assert core.master.version == 1
        assert core.leases.completed == 2


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
        assert cluster.pull(0) is None, "there may be more: worker 1 still holds one"
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

    def test_the_same_incarnation_finds_its_velocity_again(self):
        cluster = Cluster("dana-zero", 2, torch.zeros(SIZE))
        cluster.push(0, torch.full((SIZE,), 1.0), 0.1)
        cluster.push(1, torch.full((SIZE,), 2.0), 0.1)
        theta = cluster.server.master.params.clone()
        cluster.lose(1)
        cluster.pull(0)
        assert torch.allclose(cluster.views[0], theta - 0.9 * 0.1 * 1.0), "the look-ahead forgets who is gone"
        cluster.come_back(1)
        assert torch.allclose(cluster.views[1], theta - 0.9 * 0.1 * 3.0)
        cluster.pull(0)
        assert torch.allclose(cluster.views[0], theta - 0.9 * 0.1 * 3.0)

    def test_a_newer_incarnation_starts_at_zero(self):
        cluster = Cluster("dana-zero", 2, torch.zeros(SIZE))
        cluster.push(0, torch.full((SIZE,), 1.0), 0.1)
        cluster.push(1, torch.full((SIZE,), 2.0), 0.1)
        theta = cluster.server.master.params.clone()
        cluster.join(1, incarnation=2)
        assert torch.allclose(cluster.views[1], theta - 0.9 * 0.1 * 1.0)
        assert cluster.server.members[1].vectors["velocity"].tolist() == [0] * SIZE

    def test_a_newer_incarnation_takes_the_place_of_a_live_one(self):
        core, view = started(workers=1)
        fresh = parameters(core.handle("new", replace(JOIN, incarnation=2, params=None), 1.0), "new")
        assert fresh.leases == (0,), "what the old one held"
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

    @pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
    def test_a_diverged_run_ends_for_all(self, algorithm):
        """A result, not a crash: what is under way is not waited for, and everyone leaves with the parameters."""
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
        """Batch norm of a diverged model: it leaves all the same, but not into the mean."""
        cluster = Cluster("dana", 2, torch.ones(SIZE), plan=Plan(1, 1), buffers=2)
        cluster.push(0, GRADIENT, 0.1)
        cluster.leave(0, torch.tensor([NAN, 1.0]))
        cluster.leave(1, torch.tensor([3.0, 4.0]))
        assert cluster.final.keys() == {0, 1}
        assert cluster.final[0].buffers.tolist() == [3.0, 4.0]
        assert cluster.server.figures.refusals["leaving worker's vectors are not finite"] == 1

    def test_a_gap_beyond_float32_is_none(self):
        cluster = Cluster("asgd", 2, torch.ones(SIZE), gap_every=1)
        cluster.push(0, GRADIENT, 1e30)
        cluster.push(1, GRADIENT, 1e30)
        assert [update.gap for update in cluster.updates] == [0.0, None]
        assert cluster.server.summary()["mean_gap"] == 0.0


class TestTheEnd:
    def run_out(self, algorithm: str, workers: int = 3) -> Cluster:
        """Train until every batch is done."""
        generator = torch.Generator().manual_seed(3)
        cluster = Cluster(algorithm, workers, torch.ones(SIZE), plan=Plan(5, 2), buffers=2)
        while not cluster.server.leases.done:
            for worker in range(workers):
                if worker in cluster.views and cluster.leases(worker):
                    cluster.push(worker, torch.randn(SIZE, generator=generator), 0.1)
                elif worker in cluster.views:
                    cluster.pull(worker)
        return cluster

    def test_each_batch_once_and_versions_without_holes(self):
        cluster = self.run_out("asgd")
        assert sorted(update.batch for update in cluster.updates) == list(range(10))
        assert [update.version for update in cluster.updates] == list(range(1, 11))
        assert cluster.server.leases.epoch == 2.0

    def test_all_leave_with_the_mean_of_the_buffers_by_updates(self):
        cluster = self.run_out("asgd")
        assert [cluster.server.members[worker].updates for worker in range(3)] == [4, 3, 3]
        for worker in range(3):
            assert cluster.leave(worker, torch.tensor([float(worker), 6.0])) is None or worker == 2
        for final in cluster.final.values():
            assert final.buffers.tolist() == pytest.approx([0.9, 6.0])
            assert torch.equal(final.params, cluster.server.master.params)
            assert (final.version, final.diverged) == (10, False)
        assert cluster.final.keys() == {0, 1, 2}

    def test_the_parameters_are_final_when_the_last_has_left(self):
        cluster = self.run_out("dana")
        assert cluster.leave(0) is None
        assert cluster.leave(1) is None
        cluster.leave(2)
        assert torch.equal(cluster.final[0].params, cluster.final[2].params)

    def test_dana_ends_at_dana_zeros_parameters(self):
        ends = []
        for algorithm in ("dana", "dana-zero"):
            cluster = self.run_out(algorithm)
            for worker in range(3):
                cluster.leave(worker)
            ends.append(cluster.final[0].params)
        assert torch.allclose(*ends, atol=1e-6)

    def test_a_crashed_worker_forfeits_its_share(self):
        """Then the survivors' sum defines θ."""
        cluster = Cluster("dana", 2, torch.zeros(SIZE), plan=Plan(2, 1))
        for worker in (0, 1):
            cluster.push(worker, torch.full((SIZE,), 1.0 + worker), 0.1)
        cluster.lose(1)
        lookahead = cluster.server.master.params.clone()
        cluster.leave(0)
        assert torch.allclose(cluster.final[0].params, lookahead + 0.9 * 0.1 * 1.0)

    def test_who_comes_back_after_the_end_changes_nothing(self):
        """The others have the trained model already."""
        cluster = Cluster("dana", 2, torch.zeros(SIZE), plan=Plan(2, 1), buffers=1)
        for worker in (0, 1):
            cluster.push(worker, torch.full((SIZE,), 1.0 + worker), 0.1)
        cluster.lose(1)
        cluster.leave(0, torch.tensor([5.0]))
        cluster.come_back(1)
        cluster.leave(1, torch.tensor([7.0]))
        assert torch.equal(cluster.final[0].params, cluster.final[1].params)
        assert torch.equal(cluster.final[0].params, cluster.server.master.params)
        assert cluster.final[1].buffers.tolist() == [5.0]

    def test_a_repeated_leave_gives_back_once(self):
        cluster = Cluster("dana", 1, torch.ones(SIZE), plan=Plan(1, 1))
        cluster.push(0, GRADIENT, 0.1)
        leave = cluster.workers[0].leave(torch.zeros(0))
        first = answer(cluster.server.handle(0, leave, 1.0))
        again = answer(cluster.server.handle(0, leave, 2.0))
        assert isinstance(first, Final)
        assert isinstance(again, Final)
        assert torch.equal(first.params, again.params)

    def test_giving_back_takes_no_version(self):
        cluster = self.run_out("dana")
        for worker in range(3):
            cluster.leave(worker)
        assert cluster.final[0].version == 10 == len(cluster.updates)

    def test_the_dead_are_not_waited_for_at_the_end(self):
        cluster = self.run_out("asgd")
        cluster.leave(0)
        cluster.leave(1)
        assert not cluster.final
        cluster.lose(2)
        assert cluster.final.keys() == {0, 1}

    def test_leaving_early_others_take_over(self):
        cluster = Cluster("dana", 2, torch.ones(SIZE), plan=Plan(4, 1))
        assert isinstance(cluster.leave(1), Final)
        while not cluster.server.leases.done:
            cluster.push(0, GRADIENT, 0.1)
        assert sorted(update.batch for update in cluster.updates) == [0, 1, 2, 3]

    def test_the_look_ahead_forgets_who_left(self):
        cluster = Cluster("dana-zero", 2, torch.zeros(SIZE))
        for worker in (0, 1):
            cluster.push(worker, torch.full((SIZE,), 1.0 + worker), 0.1)
        cluster.leave(1)
        cluster.pull(0)
        assert torch.allclose(cluster.views[0], cluster.server.master.params - 0.9 * 0.1 * 1.0)

    def test_finished_when_all_said_goodbye(self):
        cluster = self.run_out("asgd")
        for worker in range(3):
            cluster.leave(worker)
        for worker in range(3):
            assert not cluster.server.finished
            assert isinstance(cluster.bye(worker), Noted)
        assert cluster.server.finished

    @pytest.mark.parametrize("message", [Push(0, 1, 9, 10, (0.1,), 1, None, 0, GRADIENT), Pull(0, 1, 9)])
    def test_who_left_gets_no_more_work(self, message):
        cluster = Cluster("asgd", 2, torch.ones(SIZE), plan=Plan(4, 1))
        cluster.leave(0)
        refusal = answer(cluster.server.handle(0, message, 1.0))
        assert isinstance(refusal, Refusal)
        assert "left" in refusal.reason
        assert not cluster.server.leases.holds(0, 0)

    @pytest.mark.parametrize(
        ("given", "buffers", "reason"),
        [
            (torch.ones(SIZE + 1), torch.zeros(2), "wrong size"),
            (None, torch.zeros(3), "wrong size"),
        ],
    )
    def test_a_leave_of_the_wrong_size(self, given, buffers, reason):
        core, _ = started("dana")
        before = arithmetic_of(core)
        refusal = answer(core.handle(0, Leave(0, 1, 2, given, buffers), 1.0))
        assert isinstance(refusal, Refusal)
        assert reason in refusal.reason
        assert arithmetic_of(core) == before

    def test_a_share_that_is_not_finite_is_not_added(self):
        core, _ = started("dana")
        before = arithmetic_of(core)
        final = answer(core.handle(0, Leave(0, 1, 2, torch.tensor([NAN, 1.0, 1.0]), torch.zeros(2)), 1.0))
        assert isinstance(final, Final)
        assert arithmetic_of(core) == before

    def test_what_a_script_reports_is_in_the_summary(self):
        cluster = self.run_out("asgd", workers=1)
        cluster.leave(0)
        figures = {"test_error_percent": 1.5, "note": "θ", "perplexity": INF}
        assert isinstance(cluster.say(0, cluster.workers[0].report(figures)), Noted)
        summary = cluster.server.summary()
        assert [summary[name] for name in figures] == [1.5, "θ", None], "JSON has no infinity"


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


# ---- any order of anything ---------------------------------------------------------------------------------------


class ServerUnderFaults(RuleBasedStateMachine):
    """Workers that crash, stall, lose messages both ways and repeat themselves, around one core.

    Each worker obeys the protocol. Requests may be lost, delivered again, and again late; replies may be lost.
    """

    WORKERS = 3

    @initialize(
        algorithm=st.sampled_from(["dana-zero", "dana", "asgd", "ssgd", "dana-ga"]),
        ahead=st.integers(1, 3),
        batches=st.integers(1, 8),
    )
    def begin(self, algorithm, ahead, batches):
        self.plan = Plan(batches, 2)
        self.updates = []
        self.settings = ServerSettings(
            algorithm=algorithm, workers=2, digest=DIGEST, gap_every=1, worker_timeout_s=TIMEOUT_S
        )
        self.core = ServerCore(self.settings, on_update=self.updates.append)
        self.ahead, self.now = ahead, 0.0
        self.inbox: dict[tuple[int, int], list[Reply]] = {}  # of a process: worker and incarnation
        self.sent: dict[int, list[Request]] = {worker: [] for worker in range(self.WORKERS)}
        self.incarnation = dict.fromkeys(range(self.WORKERS), 0)
        self.workers: dict[int, WorkerCore] = {}
        self.last: dict[int, Parameters] = {}
        self.finals: list[Final] = []
        self.applied = dict.fromkeys(range(self.WORKERS), 0)  # pushes, as its worker knows
        self.given_up: set[int] = set()  # may have lost an answer for good
        for worker in range(2):
            self.start(worker)

    # ---- workers -------------------------------------------------------------------------------------------------

    def start(self, worker):
        self.incarnation[worker] += 1
        role = Role(worker, self.incarnation[worker], DIGEST, 0.9, LAYOUT, self.plan, self.ahead)
        self.workers[worker] = WorkerCore(role, self.settings.rule(0.9).worker_rule)
        self.last.pop(worker, None)
        self.applied[worker] = 0
        self.given_up.discard(worker)
        self.inbox[worker, role.incarnation] = []
        self.ask(worker, self.workers[worker].join(torch.ones(SIZE) if worker == 0 else None), lost=False)

    def ask(self, worker, request, lost):
        self.sent[worker].append(copy.deepcopy(request))
        if not lost:
            self.to_server(worker, request)

    def to_server(self, worker, request):
        """A process that starts anew has a new route."""
        self.deliver(self.core.handle((worker, request.incarnation), copy.deepcopy(request), self.now))

    def deliver(self, replies):
        for route, reply in replies:
            assert route in self.inbox, "an answer to nobody"
            self.inbox[route].append(reply)

    def take(self, worker):
        """The worker reads its inbox, as its link does: late answers are dropped."""
        core = self.workers[worker]
        inbox = self.inbox[worker, self.incarnation[worker]]
        while inbox:
            reply = inbox.pop(0)
            if core._outstanding is None or reply.request != core._outstanding.request:
                continue
            asked = core._outstanding
            core.receive(reply)
            if isinstance(reply, Parameters):
                self.last[worker] = reply
                self.applied[worker] += reply.applied
            elif isinstance(reply, Final):
                self.finals.append(reply)
            elif isinstance(reply, Refusal) and not isinstance(asked, Join):
                assert reply.rejoin, reply.reason
                self.given_up.add(worker)
                self.ask(worker, core.join(), lost=False)

    def step(self, worker, grad, lr, lost):
        core, view = self.workers[worker], self.last.get(worker)
        if core._outstanding is not None or core._state != "joined" or view is None:
            return
        if view.done:
            self.ask(worker, core.leave(torch.full((2,), float(worker))), lost)
        elif view.leases:
            push = core.push(torch.full((SIZE,), grad), (lr,), 2, 1.0, view.leases[0])
            self.ask(worker, push, lost)
        else:
            self.ask(worker, core.pull(), lost)

    # ---- what may happen -----------------------------------------------------------------------------------------

    which = st.integers(0, WORKERS - 1)
    gradients = st.sampled_from([1.0, -0.5, 2.0, 0.25])
    rates = st.sampled_from([0.1, 0.05])

    @rule(worker=which, grad=gradients, lr=rates, lost=st.sampled_from([False, False, True]))
    def works(self, worker, grad, lr, lost):
        if worker in self.workers:
            self.take(worker)
            self.step(worker, grad, lr, lost)

    @rule(worker=which)
    def repeats(self, worker):
        """It got no answer in time."""
        core = self.workers.get(worker)
        if core is not None and core._outstanding is not None:
            self.to_server(worker, self.sent[worker][-1])

    @rule(worker=which, age=st.integers(0, 9))
    def old_message_comes_again(self, worker, age):
        if self.sent[worker]:
            self.to_server(worker, self.sent[worker][-1 - age % len(self.sent[worker])])

    @rule(worker=which)
    def replies_are_lost(self, worker):
        if worker in self.workers:
            self.inbox[worker, self.incarnation[worker]].clear()

    @rule(worker=which, grad=st.sampled_from([float("nan"), float("inf")]))
    def breaks_down_numerically(self, worker, grad):
        if worker in self.workers:
            self.take(worker)
            self.step(worker, grad, 0.1, lost=False)

    @rule(worker=which)
    def crashes_and_starts_anew(self, worker):
        core = self.workers.get(worker)
        if core is None or core._state != "left":
            self.start(worker)

    @rule(silent=st.sets(which))
    def time_passes(self, silent):
        self.now += TIMEOUT_S + 1
        for worker in self.workers:
            if worker not in silent:
                self.to_server(worker, Heartbeat(worker, self.incarnation[worker]))
        self.deliver(self.core.tick(self.now))

    # ---- what always holds ---------------------------------------------------------------------------------------

    @invariant()
    def versions_have_no_holes(self):
        assert [update.version for update in self.updates] == list(range(1, len(self.updates) + 1))

    @invariant()
    def no_batch_is_done_twice(self):
        done = [batch for u in self.updates for _, batch in (u.round or ((u.worker, u.batch),))]
        assert len(done) == len(set(done))

    @invariant()
    def no_batch_is_in_two_hands(self):
        if self.core._leases is not None:
            held = [batch for batches in self.core.leases._held.values() for batch in batches]
            assert len(held) == len(set(held))

    @invariant()
    def the_look_ahead_is_the_sum_of_those_who_are_there(self):
        if self.core.started and "sum" in self.core.master.shared:
            there = [m for m in self.core.members.values() if m.takes_part]
            total = sum((m.lr[0] * m.vectors["velocity"] for m in there), torch.zeros(SIZE))
            assert torch.allclose(self.core.master.shared["sum"], total, atol=1e-5)

    @invariant()
    def all_is_finite(self):
        if self.core.started:
            vectors = [self.core.master.params, *self.core.master.shared.values()]
            vectors += [vector for m in self.core.members.values() for vector in m.vectors.values()]
            assert all(vector.isfinite().all() for vector in vectors)

    @invariant()
    def worker_and_server_count_the_same_pushes(self):
        """Exactly once, seen from both ends: else dana's velocities and its server drift apart."""
        for worker, core in self.workers.items():
            member = self.core.members.get(worker)
            answered = core._outstanding is None and core._state == "joined"
            if member and answered and member.incarnation == core.role.incarnation and worker not in self.given_up:
                assert self.applied[worker] == member.updates

    def teardown(self):
        """From wherever it stands, the run comes to its end when faults cease."""
        if not hasattr(self, "core"):
            return
        for _ in range(40 * self.plan.batches + 200):
            if self.core.finished:
                break
            self.now += 1
            for worker in list(self.workers):
                self.recover(worker)
        assert self.core.finished, "the run hangs"
        if not self.core.diverged:
            assert self.core.leases.completed == self.plan.batches
        for final in self.finals[-1:]:  # none if all were given up before they left
            assert torch.equal(final.params, self.core.master.params)

    def recover(self, worker):
        core = self.workers[worker]
        if core._outstanding is not None:
            self.to_server(worker, self.sent[worker][-1])
        self.take(worker)
        if core._outstanding is None and core._state == "left":
            self.ask(worker, core.bye(), lost=False)
            self.take(worker)
        else:
            self.step(worker, 1.0, 0.1, lost=False)


TestServerUnderFaults = ServerUnderFaults.TestCase
TestServerUnderFaults.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
