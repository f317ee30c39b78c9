"""The server without I/O, clock or thread: a message and the time in, replies out.

The ROUTER loop feeds it from sockets, the simulator from a schedule, a recording from a file: the same rules, the
same bookkeeping, the same bits. Life of a run: workers join and wait for each other; each then gets a view and
batches, pushes, and gets the next view; when every batch is completed they leave, giving back what their rule says;
when the last has left the parameters are final, and all get them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from danaz.flat import Layout
from danaz.server.figures import DIVERGED_LOSS_RATIO, Figures, Update
from danaz.server.leases import Leases
from danaz.server.master import Master, all_finite
from danaz.server.members import Member, Route
from danaz.server.messages import (
    Bye,
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
    Report,
    Request,
)
from danaz.server.settings import ServerSettings

RESUM_EVERY = 1000  # updates between fresh sums of the velocities, against drift
DIVERGED_STRIKES = 3  # non-finite pushes in a row, of every live worker
MAX_WORKERS = 4096
NOT_FINITE = "push is not finite"

Replies = list[tuple[Route, Reply]]


@dataclass(frozen=True)
class Job:
    """What all workers of a run agree on; the first to join brings it."""

    layout: Layout
    plan: Plan
    momentum: float


class ServerCore:
    """Who takes part, who waits for what, which batch is whose; the vectors are the master's.

    ``now`` is in seconds on any monotonic clock. ``on_update`` is called for each applied update; for ``ahead`` see
    Master.
    """

    def __init__(
        self,
        settings: ServerSettings,
        on_update: Callable[[Update], None] = lambda update: None,
        ahead: Callable[[], Tensor] | None = None,
    ):
        self.settings = settings
        self.on_update = on_update
        self.ahead = ahead
        self.members: dict[int, Member] = {}
        self.figures = Figures()
        self.started = False
        self.diverged = ""  # the reason, if it did
        self._job: Job | None = None
        self._leases: Leases | None = None
        self._master: Master | None = None
        self._buffers: list[Tensor] = []  # f32[B] of each worker that left
        self._replies: Replies = []

    @property
    def job(self) -> Job:
        assert self._job is not None, "nobody has joined yet"
        return self._job

    @property
    def leases(self) -> Leases:
        assert self._leases is not None, "nobody has joined yet"
        return self._leases

    @property
    def master(self) -> Master:
        assert self._master is not None, "worker 0 has not brought the first parameters yet"
        return self._master

    # ---- stimuli -------------------------------------------------------------------------------------------------

    def handle(self, route: Route, message: Request, now: float) -> Replies:
        """Take one message; returns the replies it sets free, each with the route it goes to."""
        if isinstance(message, Join):
            self._join(route, message, now)
            return self._settle(now)
        stranger = self._stranger(message.worker, message.incarnation)
        if stranger:
            self.refuse(stranger)
            return [] if isinstance(message, Heartbeat) else [(route, Refusal(message.request, stranger, rejoin=True))]
        member = self.members[message.worker]
        member.heard_at, member.route = now, route
        if not isinstance(message, Heartbeat) and self.started and message.request >= member.request:
            repeated = message.request == member.request
            member.request = message.request
            self._serve(member, message, repeated, now)
        return self._settle(now)

    def tick(self, now: float) -> Replies:
        """Let time pass: workers that were silent too long are lost."""
        for member in self.members.values():
            if member.alive and not member.said_bye and now - member.heard_at > self.settings.worker_timeout_s:
                self._lose(member)
        return self._settle(now)

    def refuse(self, reason: str) -> None:
        """Count a message that is not served, also one that could not even be read."""
        self.figures.refusals[reason] += 1

    @property
    def finished(self) -> bool:
        """Every batch is completed, and nobody has anything more to say."""
        if not (self.started and self.leases.done):
            return False
        return all(member.said_bye or not member.alive for member in self.members.values())

    def summary(self) -> dict[str, Any]:
        """The figures of summary.json that the server knows."""
        return {
            **self.figures.summary(),
            "diverged": bool(self.diverged),
            "diverged_because": self.diverged or None,
            "epochs": self.leases.epoch if self._leases else 0.0,
            "gap_of": self.master.gap_of if self._master else None,
            "params_l2": self.master.l2 if self._master else None,
        }

    def _stranger(self, worker: int, incarnation: int) -> str:
        """Why a message comes from nobody who takes part; empty if it does not."""
        member = self.members.get(worker)
        if member is None:
            return "worker has not joined"
        if member.incarnation != incarnation:
            return "another incarnation of this worker has joined"
        if not member.alive:
            return "worker was silent too long and was given up"
        return ""

    # ---- joining and leaving -------------------------------------------------------------------------------------

    def _join(self, route: Route, join: Join, now: float) -> None:
        reason = self._unfit(join)
        if reason:
            self.refuse(reason)
            self._replies.append((route, Refusal(join.request, reason, rejoin=False)))
            return
        if self._job is None:
            self._job = Job(join.layout, join.plan, join.momentum)
            self._leases = Leases(join.plan)
        if self._master is None and join.params is not None:
            rule = self.settings.rule(join.momentum)
            self._master = Master(rule, join.layout, join.params, self.ahead)
        member = self.members.get(join.worker)
        if member is None or member.incarnation < join.incarnation:
            if member is not None:
                self._lose(member)
            no_lr = (0.0,) * len(join.layout.groups)
            member = Member(join.worker, join.incarnation, route, join.request, join.ahead, {}, no_lr, now)
            self.members[join.worker] = member
        # The same incarnation again lost our answer, or comes back after a silence: it keeps its velocity.
        member.alive, member.route, member.heard_at, member.request = True, route, now, join.request
        member.pending = None
        if not member.left:
            member.awaiting = "start"
        if self.started:
            self._admit(member)

    def _unfit(self, join: Join) -> str:
        """Why this worker cannot take part; empty if it can."""
        if join.digest != self.settings.digest:
            return "worker and server run different configurations"
        if not 0 <= join.worker < MAX_WORKERS:
            return f"worker number is not within 0..{MAX_WORKERS - 1}"
        if not (-1 < join.momentum < 1 and join.plan.batches_per_epoch > 0 and join.plan.epochs > 0 and join.ahead > 0):
            return "momentum, plan or read-ahead out of range"
        if join.params is not None and (join.params.numel() != join.layout.size or not all_finite(join.params)):
            return "first parameters are not finite or of the wrong size"
        if self._job is not None and self._job != Job(join.layout, join.plan, join.momentum):
            return "model, data plan or momentum differ from those of the workers before"
        member = self.members.get(join.worker)
        if member is not None and member.incarnation > join.incarnation:
            return "a newer incarnation of this worker has joined"
        return ""

    def _admit(self, *members: Member) -> None:
        for member in members:
            if not member.vectors:
                member.vectors = self.master.zeros(self.master.rule.worker_state)
        self._resum()

    def _resum(self) -> None:
        self.master.resum(m for m in self.members.values() if m.takes_part)

    def _lose(self, member: Member) -> None:
        """A worker is gone without a word: others get its batches, and the look-ahead forgets it."""
        member.alive, member.pending = False, None
        self.leases.give_up(member.worker)
        if self.started:
            self._resum()

    def _leave(self, member: Member, leave: Leave) -> None:
        member.awaiting = "end"
        if member.left:
            return
        member.left, member.pending = True, None
        if leave.give_back is not None:
            self.master.params.add_(leave.give_back)
        self._buffers.append(leave.buffers)
        self.leases.give_up(member.worker)
        self._resum()

    # ---- serving -------------------------------------------------------------------------------------------------

    def _serve(self, member: Member, message: Push | Pull | Leave | Report | Bye, repeated: bool, now: float) -> None:
        if isinstance(message, Push):
            self._push(member, message, repeated, now)
        elif isinstance(message, Pull):
            member.awaiting = "batches"
        elif isinstance(message, Leave):
            reason = self._unfit_to_leave(message)
            if reason:
                self.refuse(reason)
                self._replies.append((member.route, Refusal(message.request, reason, rejoin=False)))
            else:
                self._leave(member, message)
        else:
            if isinstance(message, Report):
                self.figures.reported.update(message.figures)
            member.said_bye = member.said_bye or isinstance(message, Bye)
            self._replies.append((member.route, Noted(message.request)))

    def _unfit_to_leave(self, leave: Leave) -> str:
        layout, given = self.job.layout, leave.give_back
        if leave.buffers.numel() != layout.buffer_size or (given is not None and given.numel() != layout.size):
            return "leaving worker's vectors have the wrong size"
        if not all_finite(leave.buffers) or (given is not None and not all_finite(given)):
            return "leaving worker's vectors are not finite"
        return ""

    def _push(self, member: Member, push: Push, repeated: bool, now: float) -> None:
        if repeated and member.applied_request == push.request:
            self._send_view(member, applied=True)
            return
        if repeated and member.pending is not None:
            return  # it already waits for its round
        reason = self._inadmissible(member, push)
        if reason:
            self._refuse_push(member, push, reason)
            return
        member.strikes = 0
        if self.master.rule.barrier:
            member.pending, member.awaiting = push, "round"
        else:
            self._update(member, push, push.push, (push,), now)
            self._send_view(member, applied=True)

    def _inadmissible(self, member: Member, push: Push) -> str:
        """Why a push must touch nothing; empty if it may."""
        if not all(self.leases.holds(member.worker, batch) for batch in push.batches):
            return "batch was not leased to this worker"
        if push.view_version != member.sent_version or member.awaiting:
            return "push was computed on another view than the last one sent"
        if push.push.numel() != self.job.layout.size or len(push.lr) != len(self.job.layout.groups):
            return "push has the wrong size"
        rates_fit = all(isfinite(lr) and lr >= 0 for lr in push.lr)
        if not (rates_fit and push.samples >= 0 and isfinite(push.loss or 0.0) and all_finite(push.push)):
            return NOT_FINITE
        return ""

    def _refuse_push(self, member: Member, push: Push, reason: str) -> None:
        self.refuse(reason)
        if reason == NOT_FINITE:
            # Computed again, the batch would be as bad: it counts as used.
            for batch in push.batches:
                self.leases.complete(member.worker, batch)
            member.strikes += 1
            if all(m.strikes >= DIVERGED_STRIKES for m in self.members.values() if m.takes_part):
                self._diverge(f"the last {DIVERGED_STRIKES} pushes of every worker were not finite")
        else:
            for batch in push.batches:
                if self.leases.holds(member.worker, batch):
                    self.leases.put_back(member.worker, batch)
        self._send_view(member, refused=reason)

    def _diverge(self, reason: str) -> None:
        self.diverged = reason
        self.leases.close()

    # ---- updating ------------------------------------------------------------------------------------------------

    def _update(self, member: Member, last: Push, push: Tensor, parts: tuple[Push, ...], now: float) -> None:
        """Apply one update made of ``parts``, the pushes of one worker or of a whole round; ``last`` came last."""
        master, every = self.master, self.settings.gap_every
        lag = master.version - min(self.members[p.worker].sent_version for p in parts)
        measured = every and master.version % every == 0 and member.view is not None
        gap = master.gap(member.view) if measured and member.view is not None else None
        master.apply(push, last.lr, member, lag)
        for p in parts:
            m = self.members[p.worker]
            m.lr, m.updates, m.applied_request, m.lag, m.gap = last.lr, m.updates + 1, p.request, lag, gap
            for batch in p.batches:
                self.leases.complete(p.worker, batch)
        if master.version % RESUM_EVERY == 0:
            self._resum()
        losses = [p.loss for p in parts if p.loss is not None]
        loss = sum(losses) / len(losses) if losses else None
        who = tuple((p.worker, p.batch) for p in parts) if master.rule.barrier else None
        update = Update(master.version, last.worker, lag, last.lr, gap, master.gap_of, loss, last.batch, who)
        self.figures.count(update, sum(p.samples for p in parts), now)
        self.on_update(update)
        if self.figures.lost_all_bounds(loss):
            self._diverge(f"the loss rose to {loss:.4g}, over {DIVERGED_LOSS_RATIO:.0f} times the first")

    def _update_by_round(self, now: float) -> None:
        """Average what the live workers pushed, weighted by their samples, into one update."""
        members = [m for m in self.members.values() if m.takes_part and m.pending is not None]
        parts = tuple(m.pending for m in members if m.pending is not None)
        samples = sum(p.samples for p in parts)
        mean = torch.zeros_like(parts[0].push)
        for p in parts:
            mean.add_(p.push, alpha=p.samples / samples if samples else 0.0)
        self._update(members[-1], parts[-1], mean, parts, now)
        for member in members:
            member.pending = None
            self._send_view(member, applied=True)

    # ---- answering -----------------------------------------------------------------------------------------------

    def _settle(self, now: float) -> Replies:
        """Answer everyone who waits for something that has come true."""
        if not self.started:
            self._start_if_ready(now)
        if self.started:
            self._serve_waiting(now)
        replies, self._replies = self._replies, []
        return replies

    def _start_if_ready(self, now: float) -> None:
        live = [m for m in self.members.values() if m.alive]
        if self._master is None or len(live) < self.settings.workers:
            return
        self.started = True
        self.figures.started_at = now
        self._admit(*live)

    def _serve_waiting(self, now: float) -> None:
        live = [m for m in self.members.values() if m.alive]
        for member in live:
            if member.awaiting == "start" or (member.awaiting == "batches" and self._has_news(member)):
                self._send_view(member)
        if any(m.pending for m in live) and not any(m.computing for m in live):
            self._update_by_round(now)
            self._serve_waiting(now)
        elif not self.leases.done or all(m.left for m in live):
            self._send_final([m for m in live if m.awaiting == "end"])

    def _has_news(self, member: Member) -> bool:
        return self.leases.done or bool(self.leases.top_up(member.worker, member.ahead))

    def _send_view(self, member: Member, *, applied: bool = False, refused: str = "") -> None:
        """Send the newest view; from now on the worker computes on it."""
        view = self.master.view(member)
        member.awaiting, member.sent_version = "", self.master.version
        if self.settings.gap_every or self.master.rule.needs_view:
            member.view = view
        reply = Parameters(
            request=member.request,
            version=self.master.version,
            applied=applied,
            refused=refused,
            leases=self.leases.top_up(member.worker, member.ahead),
            done=self.leases.done,
            epoch=self.leases.epoch,
            lag=member.lag,
            gap=member.gap,
            view=view,
        )
        self._replies.append((member.route, reply))

    def _send_final(self, members: list[Member]) -> None:
        for member in members:
            member.awaiting = ""
            params, buffers = self.master.params.clone(), self.mean_buffers()
            final = Final(member.request, self.master.version, bool(self.diverged), params, buffers)
            self._replies.append((member.route, final))

    def mean_buffers(self) -> Tensor:
        """Batch-norm statistics averaged over the workers that have left, f32[B]."""
        if not self._buffers:
            return torch.zeros(self.job.layout.buffer_size)
        return torch.stack(self._buffers).mean(0)
