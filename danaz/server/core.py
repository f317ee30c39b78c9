"""The server without I/O, clock or thread: a message and the time in, replies out.

The ROUTER loop feeds it from sockets, the simulator from a schedule, a recording from a file: the same rules, the
same bookkeeping, the same bits. Life of a run: workers join and wait for each other; each then gets a view and
batches, pushes, and gets the next view; when every batch is completed they leave, giving back what their rule says;
when the last has left the parameters are final, and all get them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from danaz.protocol.messages import (
    MAX_REASON,
    Bye,
    Fetch,
    GoBack,
    Heartbeat,
    Inquire,
    Join,
    Leave,
    Pull,
    Push,
    Report,
    Request,
)
from danaz.protocol.refusals import NEWER_JOINED, OVERFLOW
from danaz.server.admission import (
    Job,
    is_worth_receiving,
    why_not_bye,
    why_not_join,
    why_not_leave,
    why_not_report,
    why_stranger,
)
from danaz.server.answers import Answers, Replies, Streams, whole
from danaz.server.figures import Figures, Update
from danaz.server.health import Health, measured, norm_of
from danaz.server.leases import LeasedElsewhere, Leases
from danaz.server.master import Master
from danaz.server.members import MeanBuffers, Member, Route
from danaz.server.recovery import Recovery
from danaz.server.refusing import refuse_push, why_refuse
from danaz.server.settings import ServerSettings
from danaz.server.snapshot import CoreState, fill, take
from danaz.server.updating import update_by
from danaz.server.whole import WholeModel, own_part
from danaz.vectors.codecs import travelling_bytes, view_codec
from danaz.vectors.cutting import all_finite
from danaz.vectors.flat import Layout

Asked = Push | Pull | Fetch | Leave | Report | Bye  # by somebody who takes part

EVERYBODY_LEFT = "every worker left before the last batch"
RESUM_EVERY = 1000  # updates between fresh sums of the velocities, against drift


class ServerCore:
    """Who takes part, who waits for what, which batch is whose; the vectors are the master's.

    ``now`` is in seconds on any monotonic clock. ``on_update`` is called for each applied update, ``on_milestone``
    when something has come true that a restart must not undo, both before any worker is told; ``on_notice`` hears what
    a person should know; ``on_carried`` what a worker carries from other shards, before its message is heeded;
    ``on_report`` all figures that scripts have reported, before a report is acknowledged. For ``ahead`` see Master.
    """

    def __init__(
        self,
        settings: ServerSettings,
        on_update: Callable[[Update], None] = lambda update: None,
        ahead: Callable[[], Tensor] | None = None,
        on_milestone: Callable[[ServerCore], None] = lambda core: None,
        on_notice: Callable[[str], None] = lambda text: None,
        on_carried: Callable[[Push | Leave], None] = lambda message: None,
        on_report: Callable[[Mapping[str, float | str | None]], None] = lambda reported: None,
    ):
        self.settings = settings
        self.on_update = on_update
        self.on_milestone = on_milestone
        self.on_notice = on_notice
        self.on_carried = on_carried
        self.on_report = on_report
        self.ahead = ahead
        self.members: dict[int, Member] = {}
        self.figures = Figures()
        self.health = Health(on_notice)
        self.life = 0  # grows with each restart
        self.generation = 0  # of shard 0's newest checkpoint
        self.kept: tuple[int, ...] = ()  # checkpoints of this shard, which its workers hear of
        self.sound: tuple[int, ...] = ()  # of these, once training has diverged, those from before: they stay
        self.recovery: Recovery | None = None  # while a restarted server waits for the workers it knew
        self.started = False
        self.diverged = ""  # the reason, if it did
        self.stopped = ""  # the script's reason, if it ended the run early
        self.final = False  # a worker has the trained model, which who comes back later cannot change
        self._whole: WholeModel | None = None
        self._job: Job | None = None
        self._leases: Leases | None = None
        self._master: Master | None = None
        self.buffers = MeanBuffers(0)
        self.untrained = torch.empty(0)  # f32[U], what the model holds beside the parameters, as bytes
        self._milestone: tuple[object, ...] = ()  # the last one
        self._answers = Answers(self)

    @property
    def job(self) -> Job:
        assert self._job is not None, "nobody has joined yet"
        return self._job

    @property
    def whole(self) -> WholeModel:
        assert self._whole is not None, "nobody has joined yet"
        return self._whole

    @property
    def leases(self) -> Leases:
        assert self._leases is not None, "nobody has joined yet"
        return self._leases

    @property
    def master(self) -> Master:
        assert self._master is not None, "worker 0 has not brought the first parameters yet"
        return self._master

    @property
    def epoch(self) -> float:
        """Completed epochs of the whole cluster."""
        return self._leases.epoch if self._leases else 0.0

    # ---- its state on disk ---------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Finish the last update, whose view nobody may have taken. Call this before you read parameters or summary."""
        if self._master is not None:
            self._master.settle()

    def state(self, reuse: CoreState | None = None) -> CoreState:
        """A copy of everything that a server started anew must know; in the memory of ``reuse`` it is made faster."""
        self.settle()
        return take(self, reuse)

    def restore(self, state: CoreState, journal: Sequence[Update], life: int, now: float) -> None:
        """Go on from ``state``, and from what the workers remember of the updates since, which are in ``journal``.

        ``life`` is larger than that of any server before. Raises ResumeError.
        """
        fill(self, state, now)
        self.life, self.started = life, True
        self.figures.restarts += 1
        self.recovery = Recovery(journal, self.job.layout.size, until=now + self.settings.recovery_s)

    def start_from(self, job: Job, leases: Leases, master: Master, whole: WholeModel | None = None) -> None:
        """Take over what the first workers to join usually bring."""
        self._job, self._leases, self._master = job, leases, master
        self._whole = whole or WholeModel(job.layout)
        self.buffers = MeanBuffers(job.layout.buffer_size)

    # ---- stimuli -------------------------------------------------------------------------------------------------

    def handle(self, route: Route, message: Request, now: float) -> Replies:
        """Take one message; returns the replies it sets free, each with the route it goes to."""
        return whole(self.stream(route, message, now))

    def tick(self, now: float) -> Replies:
        """Let time pass: workers that were silent too long are lost."""
        return whole(self.stream_tick(now))

    def stream(self, route: Route, message: Request, now: float) -> Streams:
        """As ``handle``, but views are worked out while they are sent.

        Until a Streamed is used up, or given up, ``message`` must stay as it is and nothing else be asked of the core.
        """
        self.settle()
        if isinstance(message, Join):
            self._join(route, message, now)
            return self._settle(now)
        if isinstance(message, GoBack):
            self._answers.refuse(route, message, "this server goes on from where it is", rejoin=True)
            return self._answers.take()
        if isinstance(message, Inquire):
            self._answers.progress(route, message)
            return self._answers.take()
        stranger = why_stranger(message, self.members.get(message.worker))
        if stranger:
            self._answers.refuse(route, message, stranger, rejoin=True)
            return self._answers.take()
        member = self.members[message.worker]
        member.heard_at, member.alive = now, True
        # Answers follow the newest request: a heartbeat has a socket of its own, a late copy may come from a dead one.
        may_speak = self.started and (self.recovery is None or member.left)
        if not isinstance(message, Heartbeat) and message.request >= member.request and may_speak:
            repeated = message.request == member.request
            member.request, member.route = message.request, route
            if isinstance(message, (Push, Leave)) and self.recovery is None:
                self.on_carried(message)
            self._serve(member, message, repeated, now)
        return self._settle(now)

    def stream_tick(self, now: float) -> Streams:
        """As ``tick``, but views are worked out while they are sent."""
        self.settle()
        for member in self.members.values():
            if member.alive and not member.said_bye and now - member.heard_at > self.settings.worker_timeout_s:
                self._lose(member)
        return self._settle(now)

    def takes(self, message: Request) -> bool:
        """Whether the vectors that ``message`` announces are worth receiving: if not, it will be refused unseen."""
        member = self.members.get(message.worker)
        return is_worth_receiving(
            message, self.settings, self._job, self._whole, member, needs_params=self._master is None
        )

    def refuse(self, reason: str) -> None:
        """Count a message that is not served, also one that could not even be read."""
        self.figures.refusals[reason] += 1

    @property
    def finished(self) -> bool:
        """Every batch is completed, or everyone left before; and nobody has anything more to say."""
        members = self.members.values()
        over = self.started and (self.leases.done or any(member.said_bye for member in members))
        return over and all(member.said_bye or not member.alive for member in members)

    @property
    def _is_deserted(self) -> bool:
        """Whether all workers left in good order, or are gone, while there were batches to train."""
        members = self.members.values()
        all_gone = any(m.left for m in members) and not any(m.takes_part for m in members)
        return self.started and all_gone and not self.leases.done

    def summary(self) -> dict[str, Any]:
        """The figures of summary.json that the server knows."""
        return {
            **self.figures.summary(),
            "complete": self.finished,
            "diverged": bool(self.diverged),
            "diverged_because": self.diverged or None,
            "stopped": self.stopped or (EVERYBODY_LEFT if self._is_deserted else None),
            "epochs": self.epoch,
            "gap_of": self.master.gap_of if self._master else None,
            "params_l2": self.master.l2 if self._master else None,
            "sick_workers": self.health.summary(),
        }

    # ---- joining and leaving -------------------------------------------------------------------------------------

    def _join(self, route: Route, join: Join, now: float) -> None:
        member, whole = self.members.get(join.worker), join.layout
        join = own_part(join, self.settings)
        reason = why_not_join(join, self.settings, self._job, member, self._master is None)
        if reason:
            newest = member.incarnation if member is not None and reason == NEWER_JOINED else 0
            self._answers.refuse(route, join, reason, newest=newest)
            return
        self._take_over(join, whole)
        if member is None or member.incarnation < join.incarnation:
            if member is not None:
                self._lose(member)
            no_lr = (0.0,) * len(join.layout.groups)
            member = Member(join.worker, join.incarnation, route, join.request, join.ahead, {}, no_lr, now)
            self.members[join.worker] = member
        if self.recovery is not None and self.settings.shards == 1:  # a slice newer than the others is of no use
            self.recovery.brought(join)
        # The same incarnation again lost our answer, or comes back after a silence: it keeps its velocity.
        answered = member.computing and member.request == join.request
        member.alive, member.route, member.heard_at, member.request = True, route, now, join.request
        member.pending, member.ahead = None, join.ahead
        if answered:
            self._answers.view(member)
        elif not member.left:
            member.awaiting = "start"
        if self.started and not member.left:
            self.admit(member)

    def _take_over(self, join: Join, whole: Layout) -> None:
        """Learn what the first workers to join bring: the job and, from worker 0, the model's values."""
        if self._job is None:
            self._job = Job(join.layout, join.plan, join.momentum)
            self._leases = LeasedElsewhere(join.plan) if self.settings.shard else Leases(join.plan)
            self._whole = WholeModel(whole)
            self.buffers = MeanBuffers(join.layout.buffer_size)
        if self._master is None and join.params is not None:
            rule = self.settings.rule(join.momentum)
            self._master = Master(rule, join.layout, join.params, self.ahead, view_codec(self.settings.wire_view))
            if join.untrained is not None:
                self.untrained = join.untrained.clone()

    def admit(self, *members: Member, afresh: bool = False) -> None:
        """Give members the vectors that they lack, or new ones in the place of those that they have."""
        for member in members:
            if afresh or not member.vectors:
                self.master.enter(member)
        self._resum()

    def _resum(self) -> None:
        self.master.resum(m for m in self.members.values() if m.takes_part)

    def _lose(self, member: Member) -> None:
        """A worker is gone without a word: others get its batches, and the look-ahead forgets it."""
        member.alive, member.pending = False, None
        self.leases.give_up(member.worker)
        self.health.forget(member.worker)
        if self.started:
            self._resum()

    def _leave(self, member: Member, leave: Leave) -> None:
        member.awaiting = "end"
        if member.left:
            return
        member.left, member.pending, member.vectors = True, None, {}
        member.view = member.ahead_view = None
        if leave.stop and not self.leases.done:
            self.stop(member.worker, leave.stop[:MAX_REASON])
        if not self.final:
            if leave.give_back is not None and self._sound(leave.give_back):
                self._give_back(leave.give_back)
            if self._sound(leave.buffers):
                self.buffers.hear(member, leave.buffers, at_the_end=self.leases.done)
        self.leases.give_up(member.worker)
        self.health.forget(member.worker)
        if self.settings.shard and leave.done:
            self.leases.close()
        self._resum()

    # ---- serving -------------------------------------------------------------------------------------------------

    def _serve(self, member: Member, message: Asked, repeated: bool, now: float) -> None:
        if member.left and isinstance(message, (Push, Pull)):
            self._answers.refuse(member.route, message, "worker has left")
        elif isinstance(message, Push):
            self._push(member, message, repeated, now)
        elif isinstance(message, Pull):
            for batch in () if repeated else message.skipped:
                self._skip(member, batch)
            if message.ahead:
                self._answers.view(member, ahead=True)
            else:
                member.awaiting = "batches"
        elif isinstance(message, Leave):
            reason = why_not_leave(message, self.job)
            if reason:
                self._answers.refuse(member.route, message, reason)
            else:
                self._leave(member, message)
        elif isinstance(message, Report):
            self._report(member, message)
        elif isinstance(message, Fetch):
            self._answers.fetched(member)
        else:
            self._bye(member, message)

    def _report(self, member: Member, report: Report) -> None:
        reason = why_not_report(report, self.figures.reported)
        if reason:
            self._answers.refuse(member.route, report, reason)
            return
        self.figures.report(report.figures)
        self.on_report(self.figures.reported)
        self._answers.note(member)

    def _bye(self, member: Member, bye: Bye) -> None:
        """A worker is gone; one that did not leave before takes no batches with it."""
        reason = why_not_bye(bye, self.settings, self.job, self.whole, member)
        if reason:
            self._answers.refuse(member.route, bye, reason)
            return
        if not member.said_bye:
            self.whole.hear(bye)
        member.said_bye = True
        self._answers.note(member)
        if not member.left:
            self._lose(member)

    def _skip(self, member: Member, batch: int) -> None:
        """``batch`` counts as used, without an update."""
        if self.leases.holds(member.worker, batch):
            self.leases.complete(member.worker, batch)
            self.figures.skipped_batches += 1

    def edit(self, displacement: Tensor) -> None:
        """Add ``displacement`` f32[P] to the parameters, by which the script of this very process has moved its view.

        That is no update and takes no version.
        """
        self.settle()
        self.master.replace(self.master.params + displacement)
        for member in self.members.values():
            if member.view is not None:
                member.view.add_(displacement)

    def _give_back(self, given: Tensor) -> None:
        if not self.master.add(given):
            self.refuse("parameters would leave the range of float32 with what a leaving worker gives back")

    def _sound(self, vector: Tensor) -> bool:
        """Whether a leaving worker's vector may count. One of a diverged model may not, but its worker still leaves."""
        if not all_finite(vector):
            self.refuse("leaving worker's vectors are not finite")
            return False
        return True

    def _push(self, member: Member, push: Push, repeated: bool, now: float) -> None:
        if member.applied_request == push.request:
            self._answers.push(member, push, applied=True)
            return
        if repeated and member.pending is not None:
            return  # it already waits for its round
        if repeated and member.refused[0] == push.request:
            # Whatever has changed since: the worker may have read the first answer by now.
            self._answers.push(member, push, refused=member.refused[1])
            return
        if push.push.numel() == self.job.layout.size:
            push = measured(push)
        reason = why_refuse(self, member, push)
        if not reason and self.master.rule.barrier:
            # The transport uses its buffer again.
            member.pending, member.awaiting = replace(push, push=push.push.clone()), "round"
            return
        if not reason and not self._update((push,), now):
            reason = OVERFLOW
        if reason:
            refuse_push(self, member, push, reason)
        member.turn()
        self._answers.push(member, push, applied=not reason, refused=reason)

    def diverge(self, reason: str) -> None:
        """End the run early. The checkpoints from before stay."""
        if not self.diverged:
            self.diverged, self.sound = reason, self.kept
            self.leases.close()

    def stop(self, worker: int, reason: str) -> None:
        """End the run early, as the script of ``worker`` asks: the others hear of it with their next view."""
        self.stopped = reason
        self.on_notice(f"worker {worker} ends the run early: {reason}")
        self.leases.stop()

    # ---- updating ------------------------------------------------------------------------------------------------

    def _update(self, parts: tuple[Push, ...], now: float) -> bool:
        """Make one update of the push of one worker, or of those of a whole round; or say that it is not finite."""
        if not self.master.is_finite:
            self.diverge("the parameters are not finite: the rule, or what training began with, made them so")
            return False
        update = update_by(self, parts)
        if update is None:
            return False
        for part in parts:
            self.members[part.worker].strikes = 0
            self.health.applied(part.worker)
        if self.master.version % RESUM_EVERY == 0:
            self._resum()
        self.figures.count(update, now)
        self.figures.push_bytes += sum(travelling_bytes(p.push, p.encoded) + p.elsewhere for p in parts)
        self.on_update(update)
        reason = self.figures.divergence(m.worker for m in self.members.values() if m.takes_part)
        if reason:
            self.diverge(reason)
        return True

    def _update_by_round(self, now: float) -> None:
        """Make one update of what the live workers pushed, weighted by their samples.

        If its result is not finite, the largest push is refused, and the others make the update.
        """
        members = [m for m in self.members.values() if m.takes_part and m.pending is not None]
        parts = {m.worker: m.pending for m in members if m.pending is not None}
        while parts and not self._update(tuple(parts.values()), now):
            largest = parts.pop(max(parts, key=lambda worker: norm_of(parts[worker])))
            refuse_push(self, self.members[largest.worker], largest, OVERFLOW)
        for member in members:
            member.pending = None
            applied = member.worker in parts
            self._answers.view(member, applied=applied, refused="" if applied else OVERFLOW)

    # ---- answering -----------------------------------------------------------------------------------------------

    def _settle(self, now: float) -> Streams:
        """Answer everyone who waits for something that has come true."""
        if self.recovery is not None and self.recovery.over(self.members.values(), now):
            self.recovery.conclude(self, now)
            self.recovery = None
            self._resum()
        if not self.started:
            self._start_if_ready(now)
        if self.started and self.recovery is None:
            self._serve_waiting(now)
            self._mark_milestone()
        return self._answers.take()

    def _mark_milestone(self) -> None:
        """Workers may soon hold a first view, an end, or parameters that a leaving worker has changed for good.

        Nor will a worker that has gone bring θ again.
        """
        waiting_for_all = self.leases.done and not self.final
        left = 0 if waiting_for_all else sum(member.left for member in self.members.values())
        milestone = (self.life, self.leases.done, left, self.whole.version)
        if milestone != self._milestone:
            self._milestone = milestone
            self.on_milestone(self)

    def _start_if_ready(self, now: float) -> None:
        live = [m for m in self.members.values() if m.alive]
        if self._master is None or len(live) < self.settings.workers:
            return
        self.started = True
        self.figures.started_at = now
        self.admit(*live)

    def _serve_waiting(self, now: float) -> None:
        live = [m for m in self.members.values() if m.alive]
        round_is_open = any(m.pending for m in live)
        for member in live:
            # A joiner enters at the next round.
            enters = member.awaiting == "start" and not round_is_open
            if enters or (member.awaiting == "batches" and self._has_news(member)):
                self._answers.view(member)
        if round_is_open and not any(m.computing for m in live):
            self._update_by_round(now)
            self._serve_waiting(now)
        elif not self.leases.done or all(m.left for m in live):
            self._answers.final([m for m in live if m.awaiting == "end"])

    def _has_news(self, member: Member) -> bool:
        return self.leases.has_news(member.worker, member.ahead)

    def mean_buffers(self) -> Tensor:
        """Batch-norm statistics of the trained model, f32[B]."""
        return self.buffers.mean
