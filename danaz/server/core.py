"""The server without I/O, clock or thread: it takes messages and the time, and returns replies.

The ROUTER loop feeds it from sockets, the simulator from a schedule, and a replay from a file. The same input gives the
same result to the bit. In a run, workers join and wait for each other. Then each gets a view and batches, pushes, and
gets the next view. When every batch is completed, the workers leave and give back what their rule says. When the last
one has left, the parameters are final, and all workers get them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

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
    Replies,
    Report,
    Request,
    Route,
    Streams,
)
from danaz.protocol.refusals import NEWER_JOINED, OVERFLOW
from danaz.server.admission import (
    is_worth_receiving,
    judge_size,
    refuse_push,
    why_not_bye,
    why_not_join,
    why_not_leave,
    why_not_push,
    why_not_report,
    why_stranger,
)
from danaz.server.answers import Answers, materialize
from danaz.server.full_model import FullModel, own_part
from danaz.server.health import measured, norm_of
from danaz.server.leases import ORDERS_DIFFER, Leases
from danaz.server.master import Master
from danaz.server.members import Member, MemberEvent, MemberState
from danaz.server.records import RunTotals, Update
from danaz.server.recovery import Recovery
from danaz.server.settings import ServerSettings
from danaz.server.snapshot import Snapshot, restore_state, snapshot_of
from danaz.server.state import Job, ServerState
from danaz.server.updating import update_by
from danaz.vectors.codecs import travelling_bytes
from danaz.vectors.cutting import all_finite

Asked = Push | Pull | Fetch | Leave | Report | Bye  # requests that only a member may make

EVERYBODY_LEFT = "every worker left before the last batch"
RESUM_EVERY = 1000  # updates after which the velocities are summed anew, because rounding errors add up


class ServerCore:
    """Turns a message or a tick, and the time, into replies. ``state`` holds what it knows.

    ``now`` is in seconds on any monotonic clock. These callbacks are called: ``on_update`` after each applied update
    and ``on_milestone`` after everything that a restart must not undo, both before any worker is told; ``on_notice``
    with what a person should know; ``on_carried`` with a message that carries news of other shards, before the core
    acts on it; ``on_report`` with all figures that scripts have reported, before a report is confirmed. For ``ahead``
    see Master.
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
        self.state = ServerState(settings, on_notice, ahead)
        self.settings = settings
        self.on_update = on_update
        self.on_milestone = on_milestone
        self.on_carried = on_carried
        self.on_report = on_report
        self.recovery: Recovery | None = None  # while a restarted server waits for the workers that it knew
        self._milestone: tuple[object, ...] = ()  # what marked the last milestone
        self._answers = Answers(self.state)

    # ---- what others may read ------------------------------------------------------------------------------------

    @property
    def members(self) -> dict[int, Member]:
        return self.state.members

    @property
    def totals(self) -> RunTotals:
        return self.state.totals

    @property
    def job(self) -> Job:
        return self.state.job

    @property
    def full_model(self) -> FullModel:
        return self.state.full_model

    @property
    def leases(self) -> Leases:
        return self.state.leases

    @property
    def master(self) -> Master:
        return self.state.master

    @property
    def started(self) -> bool:
        return self.state.started

    @property
    def diverged(self) -> str:
        """The reason, if training diverged."""
        return self.state.diverged

    @property
    def life(self) -> int:
        """The number of this server's life, which grows with each restart."""
        return self.state.life

    @property
    def epoch(self) -> float:
        """Completed epochs of the whole cluster."""
        return self.state.epoch

    @property
    def finished(self) -> bool:
        """Whether training is over, because no batch or no worker is left, and every live worker has said good-bye."""
        members = self.members.values()
        over = self.started and (self.leases.done or any(member.said_bye for member in members))
        return over and all(member.said_bye or not member.alive for member in members)

    @property
    def _is_deserted(self) -> bool:
        """Whether all workers have left in good order, or are lost, while there were batches to train."""
        members = self.members.values()
        all_gone = any(m.left for m in members) and not any(m.takes_part for m in members)
        return self.started and all_gone and not self.leases.done

    def summary(self) -> dict[str, Any]:
        """Return the figures of summary.json that the server knows. Raises UnsettledError: call ``settle`` before."""
        state = self.state
        return {
            **state.totals.summary(),
            "complete": self.finished,
            "diverged": bool(state.diverged),
            "diverged_because": state.diverged or None,
            "stopped": state.stopped or (EVERYBODY_LEFT if self._is_deserted else None),
            "epochs": state.epoch,
            "gap_of": state.master.gap_of if state.has_params else None,
            "params_l2": state.master.l2 if state.has_params else None,
            "sick_workers": state.health.summary(),
        }

    def mean_buffers(self) -> Tensor:
        """Return the batch-norm statistics of the trained model, f32[B]."""
        return self.state.buffers.mean

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Finish the last update, which may be only partly applied. Call this before you read parameters or summary."""
        self.state.settle()

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """Return a copy of what a restarted server must know. The copy is faster into the memory of ``reuse``.

        Raises UnsettledError: call ``settle`` before.
        """
        return snapshot_of(self.state, reuse)

    def restore(self, saved: Snapshot, journal: Sequence[Update], life: int, now: float) -> None:
        """Go on from ``saved``, and from what workers remember of the later updates, which are in ``journal``.

        ``life`` is larger than that of any earlier server of the run. Raises ResumeError.
        """
        restore_state(self.state, saved, now)
        self.state.life, self.state.started = life, True
        self.totals.restarts += 1
        self.recovery = Recovery(journal, self.job.layout.size, until=now + self.settings.recovery_s)

    # ---- stimuli -------------------------------------------------------------------------------------------------

    def handle(self, route: Route, message: Request, now: float) -> Replies:
        """Take one message. Return the replies that can be sent now, each with its route."""
        return materialize(self.stream(route, message, now))

    def tick(self, now: float) -> Replies:
        """Let time pass, and give up workers that were silent too long. Return replies, as ``handle`` does."""
        return materialize(self.stream_tick(now))

    def stream(self, route: Route, message: Request, now: float) -> Streams:
        """Take one message, as ``handle`` does, but compute each view while it is sent.

        Until each Streamed is used up or given up, do not change ``message``, and call no other method of the core.
        """
        self.settle()
        if isinstance(message, Join):
            self._join(route, message, now)
            return self._answer_waiting(now)
        if isinstance(message, GoBack):
            self._answers.refuse(route, message, "this server goes on from where it is", rejoin=True)
            return self._answers.take()
        if isinstance(message, Inquire):
            self._answers.send_progress(route, message)
            return self._answers.take()
        stranger = why_stranger(message, self.members.get(message.worker))
        if stranger:
            self._answers.refuse(route, message, stranger, rejoin=True)
            return self._answers.take()
        member = self.members[message.worker]
        member.heard_at = now
        if not member.alive:
            member.on(MemberEvent.HEARD)
        # Answer the newest request only: a heartbeat has its own socket, and a late copy may come from a closed one.
        may_speak = self.started and (self.recovery is None or member.left)
        if not isinstance(message, Heartbeat) and message.request >= member.request and may_speak:
            repeated = message.request == member.request
            member.request, member.route = message.request, route
            if isinstance(message, (Push, Leave)):
                self.totals.of(member.worker).spent = message.spent
                if self.recovery is None:
                    self.on_carried(message)
            self._serve(member, message, repeated, now)
        return self._answer_waiting(now)

    def stream_tick(self, now: float) -> Streams:
        """Let time pass, as ``tick`` does, but compute each view while it is sent."""
        self.settle()
        for member in self.members.values():
            if member.alive and not member.said_bye and now - member.heard_at > self.settings.worker_timeout_s:
                member.on(MemberEvent.SILENCE)
                self.state.release(member)
        return self._answer_waiting(now)

    def takes(self, message: Request) -> bool:
        """Return whether to receive the vectors that ``message`` announces. If not, it is refused without them."""
        return is_worth_receiving(message, self.state)

    def refuse(self, reason: str) -> None:
        """Count a message that is refused, or that could not be read."""
        self.state.refuse(reason)

    def edit(self, displacement: Tensor) -> None:
        """Add ``displacement`` f32[P], by which the script in this process has changed its view, to the parameters.

        This is not an update, and makes no new version.
        """
        self.settle()
        self.master.replace(self.master.params + displacement)
        for member in self.members.values():
            if member.view is not None:
                member.view.add_(displacement)

    # ---- joining and leaving -------------------------------------------------------------------------------------

    def _join(self, route: Route, join: Join, now: float) -> None:
        member, full_layout = self.members.get(join.worker), join.layout
        join = own_part(join, self.settings)
        reason = why_not_join(join, self.state)
        if reason:
            newest = member.incarnation if member is not None and reason == NEWER_JOINED else 0
            self._answers.refuse(route, join, reason, newest=newest)
            return
        self.state.learn(join, full_layout)
        if member is None or member.incarnation < join.incarnation:
            member = self._replace(member, route, join, now)
        if self.recovery is not None and self.settings.shards == 1:  # a part newer than the other shards' is of no use
            self.recovery.hear(join)
        # If the same incarnation joins again, it missed our answer or was silent for a while. It keeps its velocity.
        self.totals.of(member.worker).machine = join.machine
        answered = member.computing and member.request == join.request
        member.route, member.heard_at, member.request, member.ahead = route, now, join.request, join.ahead
        if answered:
            self._answers.send_view(member)
        else:
            member.on(MemberEvent.JOIN)
        if self.started and not member.left:
            self.state.admit(member)

    def _replace(self, before: Member | None, route: Route, join: Join, now: float) -> Member:
        """Put a new process of a worker in the place of the earlier one, if there was one. Return the new member."""
        if before is not None:
            self.state.release(before)
        member = Member(join.worker, join.incarnation, route, join.request, join.ahead, {}, now)
        self.members[join.worker] = member
        self.totals.of(join.worker).enter(join.machine)
        return member

    def _leave(self, member: Member, leave: Leave) -> None:
        state, had_left = self.state, member.left
        member.on(MemberEvent.LEAVE)
        if had_left:
            return
        member.vectors, member.view, member.ahead_view = {}, None, None
        if leave.stop and not self.leases.done:
            state.stop(member.worker, leave.stop[:MAX_REASON])
        if not state.final:
            if leave.give_back is not None and self._may_count(leave.give_back):
                self._give_back(leave.give_back)
            if self._may_count(leave.buffers):
                state.buffers.hear(member, leave.buffers, at_the_end=self.leases.done)
        state.release(member)
        if self.settings.shard and leave.done:
            self.leases.close()

    def _may_count(self, vector: Tensor) -> bool:
        """Return whether a leaving worker's vector is finite. If not, count it as refused; the worker still leaves."""
        if not all_finite(vector):
            self.refuse("leaving worker's vectors are not finite")
            return False
        return True

    def _give_back(self, given: Tensor) -> None:
        if not self.master.add(given):
            self.refuse("parameters would leave the range of float32 with what a leaving worker gives back")

    # ---- serving -------------------------------------------------------------------------------------------------

    def _serve(self, member: Member, message: Asked, repeated: bool, now: float) -> None:
        if member.left and isinstance(message, (Push, Pull)):
            self._answers.refuse(member.route, message, "worker has left")
        elif isinstance(message, Push):
            self._push(member, message, repeated, now)
        elif isinstance(message, Pull):
            self._pull(member, message, repeated)
        elif isinstance(message, Leave):
            reason = why_not_leave(message, self.job)
            if reason:
                self._answers.refuse(member.route, message, reason)
            else:
                self._leave(member, message)
        elif isinstance(message, Report):
            self._report(member, message)
        elif isinstance(message, Fetch):
            self._answers.send_untrained(member)
        else:
            self._bye(member, message)

    def _pull(self, member: Member, pull: Pull, repeated: bool) -> None:
        for batch in () if repeated else pull.skipped:
            self._skip(member, batch)
        if pull.ahead:
            self._answers.send_view(member, ahead=True)
        else:
            member.on(MemberEvent.PULL)

    def _skip(self, member: Member, batch: int) -> None:
        """Count ``batch`` as used, without an update."""
        if self.leases.holds(member.worker, batch):
            self.leases.complete(member.worker, batch)
            self.totals.skipped_batches += 1

    def _report(self, member: Member, report: Report) -> None:
        reason = why_not_report(report, self.totals.reported)
        if reason:
            self._answers.refuse(member.route, report, reason)
            return
        self.totals.add_reported(report.figures)
        self.on_report(self.totals.reported)
        self._answers.confirm(member)

    def _bye(self, member: Member, bye: Bye) -> None:
        """Note that a worker is gone. If it did not leave before, others get its batches."""
        reason = why_not_bye(bye, self.state, member)
        if reason:
            self._answers.refuse(member.route, bye, reason)
            return
        if not member.said_bye:
            self.full_model.hear(bye)
        member.on(MemberEvent.BYE)
        self._answers.confirm(member)
        if not member.left:
            self.state.release(member)

    def _push(self, member: Member, push: Push, repeated: bool, now: float) -> None:
        if member.applied_request == push.request:
            self._answers.answer_push(member, push, applied=True)
            return
        if repeated and member.state is MemberState.IN_ROUND:
            return
        if repeated and member.refused[0] == push.request:
            # Say the same again, whatever has changed since: the worker may have read the first answer by now.
            self._answers.answer_push(member, push, refused=member.refused[1])
            return
        if push.push.numel() == self.job.layout.size:
            push = measured(push)
        reason = why_not_push(push, member, self.state) or judge_size(push, self.state)
        if not reason and not self.leases.hear_order(push.batch, push.order):
            self._answers.refuse(member.route, push, ORDERS_DIFFER)
            return
        if not reason and self.master.rule.barrier:
            member.wait_for_round(replace(push, push=push.push.clone()))  # the transport reuses its buffer
            return
        if not reason and not self._update((push,), now):
            reason = OVERFLOW
        if reason:
            refuse_push(self.state, member, push, reason)
        member.advance_view()
        self._answers.answer_push(member, push, applied=not reason, refused=reason)

    # ---- updating ------------------------------------------------------------------------------------------------

    def _update(self, parts: tuple[Push, ...], now: float) -> bool:
        """Make one update of one worker's push, or of those of a whole round. Return whether the result is finite."""
        state = self.state
        if not self.master.is_finite:
            state.diverge("the parameters are not finite: the rule, or what training began with, made them so")
            return False
        update = update_by(state, parts, now)
        if update is None:
            return False
        for part in parts:
            self.members[part.worker].strikes = 0
            state.health.count_applied(part.worker)
        if self.master.version % RESUM_EVERY == 0:
            state.resum()
        self.totals.count(update, now)
        for part in parts:
            totals, nbytes = self.totals.of(part.worker), travelling_bytes(part.push, part.encoded) + part.elsewhere
            totals.count(part.samples, update)
            totals.push_bytes += nbytes
            self.totals.push_bytes += nbytes
        self.on_update(update)
        reason = self.totals.divergence(m.worker for m in self.members.values() if m.takes_part)
        if reason:
            state.diverge(reason)
        return True

    def _update_by_round(self, now: float) -> None:
        """Make one update of what the live workers pushed, weighted by their samples.

        If its result is not finite, refuse the largest push, and try again with the others.
        """
        members = [m for m in self.members.values() if m.pending is not None]
        parts = {m.worker: m.pending for m in members if m.pending is not None}
        while parts and not self._update(tuple(parts.values()), now):
            largest = parts.pop(max(parts, key=lambda worker: norm_of(parts[worker])))
            refuse_push(self.state, self.members[largest.worker], largest, OVERFLOW)
        for member in members:
            applied = member.worker in parts
            self._answers.send_view(member, applied=applied, refused="" if applied else OVERFLOW)

    # ---- answering -----------------------------------------------------------------------------------------------

    def _answer_waiting(self, now: float) -> Streams:
        """Answer every worker whose wait is over."""
        if self.recovery is not None and self.recovery.is_over(self.members.values(), now):
            self.recovery.conclude(self.state, now)
            self.recovery = None
            self.state.resum()
        if not self.started and self._can_start:
            self.state.start(now)
        if self.started and self.recovery is None:
            self._serve_waiting(now)
            self._mark_milestone()
        return self._answers.take()

    @property
    def _can_start(self) -> bool:
        return self.state.has_params and sum(m.alive for m in self.members.values()) >= self.settings.workers

    def _mark_milestone(self) -> None:
        """Call ``on_milestone`` if something has happened that a restart must not undo.

        Workers may soon hold a first view, the trained model, or parameters that a leaving worker has changed for good;
        and a worker that is gone will not bring its part of θ again.
        """
        waiting_for_all = self.leases.done and not self.state.final
        left = 0 if waiting_for_all else sum(member.left for member in self.members.values())
        milestone = (self.life, self.leases.done, left, self.full_model.version)
        if milestone != self._milestone:
            self._milestone = milestone
            self.on_milestone(self)

    def _serve_waiting(self, now: float) -> None:
        """Send views to the workers that can go on, complete a round, or send the trained model."""
        live = [m for m in self.members.values() if m.alive]
        round_is_open = any(m.state is MemberState.IN_ROUND for m in live)
        for member in live:
            # A worker that joins enters at the next round.
            enters = member.state is MemberState.STARTING and not round_is_open
            if enters or (member.state is MemberState.IDLE and self.leases.has_news(member.worker)):
                self._answers.send_view(member)
        if round_is_open and not any(m.computing for m in live):
            self._update_by_round(now)
            self._serve_waiting(now)
        elif not self.leases.done or all(m.left for m in live):
            self._answers.send_final([m for m in live if m.state is MemberState.LEAVING])
