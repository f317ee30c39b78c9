"""Workers and a server that obey the protocol. Each may be killed at any time; messages get lost or arrive twice."""

from __future__ import annotations

import copy
import json

import torch
from cluster import DIGEST, TIMEOUT_S
from stimuli import LAYOUT, SIZE

from danaz.optimizers import SGD
from danaz.protocol.messages import Final, Leave, Parameters, Plan, Push, Refusal, Reply, Request
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.server.snapshot import Snapshot
from danaz.worker.core import Role, Step, WorkerCore
from danaz.worker.states import WorkerState

WORKERS = 3
WAITS_FOR_OTHERS = {"ssgd"}  # these cannot be pipelined either
PushId = tuple[int, int, int]  # worker, incarnation, request


class MortalCluster:
    """Up to three worker cores around one server core, and all that a test needs to check what must always hold.

    Requests may be lost, delivered twice, and delivered again late; replies may be lost. A restarted server has its
    last checkpoint and the journal of all updates, as the keeper has them. In a pipeline, each worker fetches the next
    view before it pushes, and goes on with that view.
    """

    def begin(self, algorithm, ahead, batches, pipelined, optimizers=SGD):
        self.plan, self.optimizers = Plan(batches, 2), optimizers
        self.updates = []
        self.settings = ServerSettings(
            algorithm=algorithm, workers=2, digest=DIGEST, gap_every=1, worker_timeout_s=TIMEOUT_S
        )
        self.pushes: list[list[PushId]] = []  # the pushes in each update
        self.sent_pushes: dict[PushId, Push] = {}
        self.lost, self.lost_pushes = 0, set[PushId]()  # lost by the server's restarts
        self.life = self.journal_life = 0
        self.checkpoint: Snapshot | None = None
        self.core = self.make_core()
        self.pipelined = pipelined and algorithm not in WAITS_FOR_OTHERS
        self.ahead, self.now = ahead + self.pipelined, 0.0
        self.inbox: dict[tuple[int, int], list[Reply]] = {}  # the inbox of each process, by worker and incarnation
        self.sent: dict[int, list[Request]] = {worker: [] for worker in range(WORKERS)}
        self.incarnation = dict.fromkeys(range(WORKERS), 0)
        self.workers: dict[int, WorkerCore] = {}
        self.last: dict[int, Parameters] = {}
        self.views: dict[int, list[torch.Tensor]] = {}  # the views as each worker's process got them
        self.finals: list[Final] = []
        self.leaving: dict[int, Leave] = {}  # the last Leave of each worker's process, if it left when all was done
        self.given_back: dict[tuple[int, int], torch.Tensor | None] = {}  # what each process gave back when it left
        self.applied = {worker: set[PushId]() for worker in range(WORKERS)}  # pushes that its process knows as applied
        for worker in range(2):
            self.start(worker)

    # ---- the server's process ------------------------------------------------------------------------------------

    def make_core(self):
        return ServerCore(self.settings, on_update=self.update, on_milestone=self.milestone)

    def update(self, update):
        self.updates.append(update)
        workers = [worker for worker, _ in update.round or ((update.worker, update.batch),)]
        members = [self.core.members[worker] for worker in workers]
        self.pushes.append([(m.worker, m.incarnation, m.applied_request) for m in members])

    def milestone(self, core):
        if core.life != self.journal_life:
            self.journal_life = core.life
            version = core.master.version
            self.lost += len(self.updates) - version
            self.lost_pushes.update(push for pushes in self.pushes[version:] for push in pushes)
            del self.updates[version:], self.pushes[version:]
        self.write_checkpoint(core)

    def write_checkpoint(self, core):
        core.settle()
        state = core.snapshot()
        self.checkpoint = Snapshot(json.loads(json.dumps(state.facts)), state.tensors)

    def restart(self):
        self.life += 1
        self.core = self.make_core()
        assert self.checkpoint is not None
        self.core.restore(self.checkpoint, self.updates[self.checkpoint.version :], self.life, self.now)
        for member in self.core.members.values():
            if not member.left:
                self.given_back.pop((member.worker, member.incarnation), None)  # it will leave once more

    # ---- workers -------------------------------------------------------------------------------------------------

    def start(self, worker):
        self.incarnation[worker] += 1
        role = Role(worker, self.incarnation[worker], DIGEST, self.optimizers, LAYOUT, self.plan, self.ahead)
        rule = self.settings.rule(self.optimizers)
        self.workers[worker] = WorkerCore(role, rule.worker_rule, push_moves_view=rule.push_moves_view)
        self.last.pop(worker, None)
        self.views[worker] = []
        self.applied[worker] = set()
        self.leaving.pop(worker, None)
        self.inbox[worker, role.incarnation] = []
        self.ask(worker, self.workers[worker].join(torch.ones(SIZE) if worker == 0 else None), lost=False)

    def ask(self, worker, request, lost):
        self.sent[worker].append(copy.deepcopy(request))
        if isinstance(request, Push):
            self.sent_pushes[worker, request.incarnation, request.request] = self.sent[worker][-1]
        if not lost:
            self.to_server(worker, request)

    def to_server(self, worker, request):
        """Send to the server; a restarted process has a new route."""
        before = self.core.members.get(worker)
        was_final, had_left = self.core.state.final, before is not None and before.left
        self.deliver(self.core.handle((worker, request.incarnation), copy.deepcopy(request), self.now))
        if isinstance(request, Leave) and not had_left and self.core.members[worker].left and not was_final:
            self.given_back[worker, request.incarnation] = request.give_back

    def deliver(self, replies):
        for route, reply in replies:
            assert route in self.inbox, "an answer goes to a route that no process has"
            self.inbox[route].append(reply)

    def take(self, worker):
        """Let the worker read its inbox as its link does, which drops late answers."""
        core = self.workers[worker]
        inbox = self.inbox[worker, self.incarnation[worker]]
        while inbox:
            reply = inbox.pop(0)
            if core.unanswered is None or reply.request != core.unanswered.request:
                continue
            before, undecided = core.state, core.undecided
            core.receive(reply)
            if isinstance(reply, Parameters):
                self.last[worker] = reply
                self.views[worker] += [reply.view.clone()] * (reply.view.numel() > 0)
                assert reply.done or worker not in self.leaving, "its process left when the run was over"
                if reply.applied or undecided == reply.last_applied != 0:
                    self.applied[worker].add((worker, core.role.incarnation, undecided))
            elif isinstance(reply, Final):
                self.finals += [reply] * (worker in self.leaving)
            elif isinstance(reply, Refusal) and before not in (WorkerState.JOINING, WorkerState.REJOINING):
                assert reply.rejoin, reply.reason
                assert core.state is WorkerState.JOINED, "a worker that has left is not told to join again"
                self.ask(worker, core.join(), lost=False)

    def step(self, worker, grad, lr, lost):
        core, view = self.workers[worker], self.last.get(worker)
        if core.state is not WorkerState.JOINED or view is None:
            return
        if view.done:
            self.leaving[worker] = core.leave(torch.full((2,), float(worker)))
            self.ask(worker, self.leaving[worker], lost)
        elif view.leases and self.pipelined and core.fetched is None:
            self.ask(worker, core.pull(ahead=True), lost)
        elif view.leases:
            batch, *others = view.leases
            wants_view = not (self.pipelined and others)
            step = Step(batch, (lr,), 2, 1.0)
            params = torch.empty(SIZE)
            core.compute_on(params)
            self.ask(worker, core.push(step, torch.full((SIZE,), grad), params, wants_view=wants_view), lost)
        else:
            self.ask(worker, core.pull(), lost)

    def recover(self, worker):
        """Let the worker go on without faults until the end: it repeats unanswered requests, and reads the answers."""
        core = self.workers[worker]
        if core.unanswered is not None:
            self.to_server(worker, self.sent[worker][-1])
        self.take(worker)
        if core.state is WorkerState.LEFT:
            self.ask(worker, core.bye(), lost=False)
            self.take(worker)
        else:
            self.step(worker, 1.0, 0.1, lost=False)
