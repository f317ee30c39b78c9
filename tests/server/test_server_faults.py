"""Crashes of workers and of the server, silences, lost and repeated messages, in any order around one core: the
invariants always hold.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from inspect import signature
from itertools import count

import pytest
import torch
from axis import AXIS
from cluster import TIMEOUT_S
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mortal import WORKERS, MortalCluster
from stimuli import SIZE

from danaz.optimizers import SGD, Optimizers, Scalars
from danaz.protocol.messages import Heartbeat, Parameters, Push
from danaz.worker.states import WorkerState

ALGORITHMS = ["dana-zero", "dana", "asgd", "ssgd", "dana-ga"]


class ServerUnderFaults(MortalCluster, RuleBasedStateMachine):
    """Workers crash, stall, lose messages both ways and repeat them, while the server's core is killed now and then."""

    @initialize(
        algorithm=st.sampled_from(ALGORITHMS),
        ahead=st.integers(1, 3),
        batches=st.integers(1, 8),
        pipelined=st.booleans(),
        optimizers=st.sampled_from([SGD, AXIS["adamw"], AXIS["nadam"]]),
    )
    def begin(self, algorithm, ahead, batches, pipelined, optimizers):
        self.delivered: list[tuple[torch.Tensor, torch.Tensor]] = []  # views: as held, as sent
        super().begin(algorithm, ahead, batches, pipelined, optimizers)

    def deliver(self, replies):
        super().deliver(replies)
        views = [reply.view for _, reply in replies if isinstance(reply, Parameters)]
        self.delivered += [(view, view.clone()) for view in views]

    def undecided(self, worker):
        """Return the request number of the newest push of a worker's process, if it has not heard what came of it."""
        incarnation, last = self.incarnation[worker], self.last[worker].request
        pushes = [r for r in self.sent[worker] if isinstance(r, Push) and r.incarnation == incarnation]
        return max((push.request for push in pushes if push.request > last), default=0)

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
        """A worker gets no answer in time, and repeats its request."""
        core = self.workers.get(worker)
        if core is not None and core.unanswered is not None:
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
        if core is None or core.state is not WorkerState.LEFT:
            self.start(worker)

    @rule(worker=which, lost=st.booleans())
    def leaves_early(self, worker, lost):
        core = self.workers.get(worker)
        if core is not None and core.state is WorkerState.JOINED:
            self.ask(worker, core.leave(torch.full((2,), float(worker))), lost)

    @rule(silent=st.sets(which))
    def time_passes(self, silent):
        self.now += TIMEOUT_S + 1
        for worker in self.workers:
            if worker not in silent:
                self.to_server(worker, Heartbeat(worker, self.incarnation[worker]))
        self.deliver(self.core.tick(self.now))

    @rule()
    def server_writes_a_checkpoint(self):
        if self.core.started and self.core.recovery is None:
            self.write_checkpoint(self.core)

    @precondition(lambda self: self.checkpoint is not None)
    @rule(later=st.sampled_from([0.0, 5.0, 30.0]))
    def server_is_killed(self, later):
        """The kill comes between any two messages. The last answers may or may not arrive."""
        self.restart()
        self.now += later
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
        if self.core.state.has_job:
            to_do = self.core.leases.facts()["returned"]  # held by a worker, or given back
            assert len(to_do) == len(set(to_do))

    @invariant()
    def the_look_ahead_is_the_sum_of_those_who_are_there(self):
        if self.core.started and "sum" in self.core.master.shared:
            [optimizer], total = self.optimizers, torch.zeros(SIZE)
            for member in self.core.members.values():
                if member.takes_part:
                    [count], [rate] = member.counts.counts, member.counts.rates
                    optimizer.add_heading(total, member.vectors, Scalars(rate, count), 1.0)
            assert torch.allclose(self.core.master.shared["sum"], total, atol=1e-5)

    @invariant()
    def a_state_counts_the_gradients_in_it(self):
        """A worker's process begins at zero, and what is refused is not counted.

        The state of a worker that was sick may have begun afresh since.
        """
        if self.core.started and not self.core.recovery:
            sick = self.core.state.health.summary()
            for member in self.core.members.values():
                if member.vectors:
                    [count] = member.counts.counts
                    assert count == member.updates or (str(member.worker) in sick and count < member.updates)
            if self.core.master.shared:
                assert self.core.master.shared_counts.counts == (self.core.master.version,)

    @invariant()
    def all_is_finite(self):
        if self.core.started:
            vectors = [self.core.master.params, *self.core.master.shared.values()]
            vectors += [vector for m in self.core.members.values() for vector in m.vectors.values()]
            assert all(vector.isfinite().all() for vector in vectors)

    @invariant()
    def workers_hold_views_as_they_were_sent(self):
        """Computing changes no view: a restarted server may go on from it. And no view holds a NaN."""
        assert all(torch.equal(held, sent) for held, sent in self.delivered)
        for worker, core in self.workers.items():
            views = self.views[worker]
            assert core.fetched is None or any(torch.equal(core.fetched.params, sent) for sent in views)
            if views:
                point = torch.empty(SIZE)
                core.compute_on(point)
                assert point.isfinite().all()
                # In a pipeline, a worker may add its own push to the view.
                assert self.pipelined or any(torch.equal(point, sent) for sent in views)

    @invariant()
    def worker_and_server_count_the_same_pushes(self):
        """Each push is applied once, as both ends see it. Otherwise their velocities would drift apart."""
        for worker, core in self.workers.items():
            member = self.core.members.get(worker)
            is_in = bool(self.views[worker]) and core.state is not WorkerState.LEFT
            knows_of_restart = is_in and self.last[worker].life == self.core.life
            if member and knows_of_restart and member.incarnation == core.role.incarnation and not self.core.recovery:
                process = worker, member.incarnation
                journal = {push for pushes in self.pushes for push in pushes if push[:2] == process}
                assert member.updates == len(journal)
                assert self.applied[worker] - self.lost_pushes == journal - {(*process, self.undecided(worker))}

    @invariant()
    def the_parameters_are_the_sum_of_the_journals_pushes(self):
        """This holds under rules where the server only adds up pushes and what is given back."""
        core = self.core
        if not core.started or core.recovery or not core.master.rule.view_is_state:
            return
        total = 1 + sum(float(given[0]) for given in self.given_back.values() if given is not None)
        for [push_id] in self.pushes:
            push = self.sent_pushes[push_id]
            total += float(push.push[0]) * (1.0 if core.master.rule.pushes == "displacement" else -push.lr[0])
        assert core.master.params.tolist() == pytest.approx([total] * SIZE, abs=1e-3)

    @invariant()
    def what_is_lost_is_counted(self):
        if self.core.started and not self.core.recovery:
            assert self.core.totals.lost_updates == self.lost
            assert self.core.master.version == self.core.totals.updates == len(self.updates)

    def teardown(self):
        """Whatever its state, the run comes to its end when the faults cease."""
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
        for final in self.finals:  # none if all were given up before they left
            assert torch.equal(final.params, self.core.master.params)


TestServerUnderFaults = ServerUnderFaults.TestCase
TestServerUnderFaults.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# ---- long runs, with faults often enough to meet each other ----------------------------------------------------------

FAULTS = {
    ServerUnderFaults.repeats: 4,
    ServerUnderFaults.old_message_comes_again: 4,
    ServerUnderFaults.replies_are_lost: 8,
    ServerUnderFaults.breaks_down_numerically: 1,
    ServerUnderFaults.crashes_and_starts_anew: 1,
    ServerUnderFaults.leaves_early: 1,
    ServerUnderFaults.time_passes: 1,
    ServerUnderFaults.server_writes_a_checkpoint: 1,
    ServerUnderFaults.server_is_killed: 3,
}
ALWAYS = [
    ServerUnderFaults.versions_have_no_holes,
    ServerUnderFaults.no_batch_is_done_twice,
    ServerUnderFaults.no_batch_is_in_two_hands,
    ServerUnderFaults.the_look_ahead_is_the_sum_of_those_who_are_there,
    ServerUnderFaults.a_state_counts_the_gradients_in_it,
    ServerUnderFaults.all_is_finite,
    ServerUnderFaults.workers_hold_views_as_they_were_sent,
    ServerUnderFaults.worker_and_server_count_the_same_pushes,
    ServerUnderFaults.the_parameters_are_the_sum_of_the_journals_pushes,
    ServerUnderFaults.what_is_lost_is_counted,
]
WORK_PER_FAULT = 2


def rehearse(algorithm: str, optimizers: Optimizers, seed: int, pipelined: bool) -> int:
    """Carry one run to its end in virtual time. Return the number of faults it survived. A failure names its seed."""
    chance = random.Random(f"{algorithm} {seed}")
    machine = ServerUnderFaults()
    machine.begin(algorithm, chance.randint(1, 3), chance.randint(20, 80), pipelined, optimizers)
    faults = 0
    while not machine.core.finished and faults < 300:
        for _ in range(chance.randint(0, 2 * WORK_PER_FAULT)):
            if chance.random() < 0.3:
                act(machine, ServerUnderFaults.repeats, chance)  # after a while without an answer
            act(machine, ServerUnderFaults.works, chance)
        [fault] = chance.choices(list(FAULTS), list(FAULTS.values()))
        faults += act(machine, fault, chance)
    machine.teardown()
    return faults


def act(machine: ServerUnderFaults, what: Callable[..., None], chance: random.Random) -> bool:
    """Let one thing happen, with random arguments. Return whether it could."""
    arguments = {
        "worker": chance.randrange(WORKERS),
        "grad": chance.choice([float("nan"), float("inf")] if "numerically" in what.__name__ else [1.0, -0.5, 2.0]),
        "lr": chance.choice([0.1, 0.05]),
        "lost": chance.random() < 0.1,
        "age": chance.randint(0, 9),
        "silent": {worker for worker in range(WORKERS) if chance.random() < 0.3},
        "later": chance.choice([0.0, 0.0, 0.0, 5.0, 30.0]),
    }
    if what is ServerUnderFaults.server_is_killed and machine.checkpoint is None:
        return False
    what(machine, **{name: arguments[name] for name in signature(what).parameters if name in arguments})
    for holds in ALWAYS:
        holds(machine)
    return True


@pytest.mark.parametrize("least", [1000, pytest.param(4000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("algorithm", "optimizer", "pipelined"),
    [
        ("dana-zero", "sgd", False),
        ("dana-zero", "adamw", True),
        ("dana", "sgd", True),
        ("dana", "adamw", False),
        ("asgd", "sgd", False),
        ("asgd", "adamw", True),
        ("ssgd", "adamw", False),
        ("dana-ga", "nadam", True),
    ],
)
def test_thousands_of_faults_in_long_runs(algorithm, optimizer, pipelined, least):
    faults = 0
    for seed in count():
        faults += rehearse(algorithm, AXIS[optimizer], seed, pipelined)
        if faults >= least:
            return
