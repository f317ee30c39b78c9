"""Any order of anything: crashes, silences, lost and repeated messages around one core, and what always holds."""

from __future__ import annotations

import copy

import torch
from cluster import DIGEST, TIMEOUT_S
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from stimuli import LAYOUT, SIZE

from danaz.server.core import ServerCore
from danaz.server.messages import (
    Final,
    Heartbeat,
    Join,
    Parameters,
    Plan,
    Refusal,
    Reply,
    Request,
)
from danaz.server.settings import ServerSettings
from danaz.worker.core import Role, WorkerCore


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
