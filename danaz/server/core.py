"""The server without I/O, clock or thread: a message and the time in, replies out.

The ROUTER loop feeds it from sockets, the simulator from a schedule, a recording from a file: the same rules, the
same bookkeeping, the same bits. Life of a run: workers join and wait for each other; each then gets a view and
batches, pushes, and gets the next view; when every batch is completed they leave, giving back what their rule says;
when the last has left the parameters are final, and all get them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from danaz.codecs import travelling_bytes, view_codec
from danaz.server.admission import Job, is_worth_receiving, why_not_join, why_not_leave, why_stranger
from danaz.server.answers import Answers, Replies, Streams, whole
from danaz.server.figures import DIVERGED_LOSS_RATIO, Figures, Update
from danaz.server.health import Health
from danaz.server.leases import LeasedElsewhere, Leases
from danaz.server.master import Master, all_finite
from danaz.server.members import Member, Route, mean_by_updates
from danaz.server.messages import MAX_REASON, Bye, GoBack, Heartbeat, Inquire, Join, Leave, Pull, Push, Report, Request
from danaz.server.recovery import Recovery
from danaz.server.refusing import refuse_push, why_refuse
from danaz.server.settings import ServerSettings
from danaz.server.state import CoreState, fill, take
from danaz.server.updating import update_by
from danaz.server.whole import WholeModel, own_part

EVERYBODY_LEFT = "every worker left before the last batch"
RESUM_EVERY = 1000  # updates between fresh sums of the velocities, against drift


class ServerCore:
    """Who takes part, who waits for what, which batch is whose; the vectors are the master's.

    ``now`` is in seconds on any monotonic clock. ``on_update`` is called for each applied update, ``on_milestone``
    when something has come true that a restart must not undo, both before any worker is told; ``on_notice`` hears what
    a person should know; ``on_carried`` what a worker carries from other shards, before its message is heeded. For
    ``ahead`` see Master.
    """

    def __init__(
        self,
        settings: ServerSettings,
        on_update: Callable[[Update], None] = lambda update: None,
        ahead: Callable[[], Tensor] | None = None,
        on_milestone: Callable[[ServerCore], None] = lambda core: None,
        on_notice: Callable[[str], None] = lambda text: None,
        on_carried: Callable[[Push | Leave], None] = lambda message: None,
    ):
        self.settings = settings
        self.on_update = on_update
        self.on_milestone = on_milestone
        self.on_notice = on_notice
        self.on_carried = on_carried
        self.ahead = ahead
        self.members: dict[int, Member] = {}
        self.figures = Figures()
        self.health = Health(on_notice)
        self.life = 0  # grows with each restart
        self.generation = 0  # of shard 0's newest checkpoint
        self.kept: tuple[int, ...] = ()  # checkpoints of this shard, which its workers hear of
        self.recovery: Recovery | None = None  # while a restarted server waits for the workers it knew
        self.started = False
        self.diverged = ""  # the reason, if it did
        self.stopped = ""  # the script's reason, if it ended the run early
        self.final = False  # a worker has the trained model, which who comes back later cannot change
        self._whole: WholeModel | None = None
        self._job: Job | None = None
        self._leases: Leases | None = None
        self._master: Master | None = None
        self.buffers: list[tuple[int, Tensor]] = []  # updates and buffers f32[B] of each worker that left
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

    def state(self, reuse: CoreState | None = None) -> CoreState:
        """A copy of everything that a server started anew must know; in the memory of ``reuse`` it is made faster."""
        return take(self, reuse)

    def restore(self, state: CoreState, journal: Sequence[Update], life: int, now: float) -> None:
        """Go on from ``state``, and from what the workers remember of the updates since, which are in ``journal``.

        ``life`` is larger than that of any server before. Raises ResumeError.
        """
        fill(self, state, now)
        self.life, self.started = life, True
        self.recovery = Recovery(journal, self.job.layout.size, until=now + self.settings.recovery_s)

    def start_from(self, job: Job, leases: Leases, master: Master, whole: WholeModel | None = None) -> None:
        """Take over what the first workers to join usually bring."""
        self._job, self._leases, self._master = job, leases, master
        self._whole = whole or WholeModel(job.layout)

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
        for member in self.members.values():
            if member.alive and not member.said_bye and now - member.heard_at > self.settings.worker_timeout_s:
                self._lose(member)
        return self._settle(now)

    def takes(self, message: Request) -> bool:
        """Whether the vectors that ``message`` announces are worth receiving: if not, it will be refused unseen."""
        member = self.members.get(message.worker)
        return is_worth_receiving(message, self.settings, self._job, member, needs_params=self._master is None)

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
        reason = why_not_join(join, self.settings.digest, self._job, member, self._master is None)
        if reason:
            self._answers.refuse(route, join, reason)
            return
        if self._job is None:
            self._job = Job(join.layout, join.plan, join.momentum)
            self._leases = LeasedElsewhere(join.plan) if self.settings.shard else Leases(join.plan)
            self._whole = WholeModel(whole)
        if self._master is None and join.params is not None:
            rule = self.settings.rule(join.momentum)
            self._master = Master(rule, join.layout, join.params, self.ahead, view_codec(self.settings.wire_view))
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
        if self.started:
            self._admit(member)

    def _admit(self, *members: Member) -> None:
        for member in members:
            if not member.vectors:
                self.master.enter(member)
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
        if leave.stop and not self.leases.done:
            self.stop(member.worker, leave.stop[:MAX_REASON])
        if not self.final:
            if leave.give_back is not None and self._sound(leave.give_back):
                self.master.params.add_(leave.give_back)
            if self._sound(leave.buffers):
                self.buffers.append((member.updates, leave.buffers))
        self.leases.give_up(member.worker)
        if self.settings.shard and leave.done:
            self.leases.close()
        self._resum()

    # ---- serving -------------------------------------------------------------------------------------------------

    def _serve(self, member: Member, message: Push | Pull | Leave | Report | Bye, repeated: bool, now: float) -> None:
        if member.left and isinstance(message, (Push, Pull)):
            self._answers.refuse(member.route, message, "worker has left")
        elif isinstance(message, Push):
            self._push(member, message, repeated, now)
        elif isinstance(message, Pull):
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
        else:
            if isinstance(message, Report):
                self.figures.report(message.figures)
            if isinstance(message, Bye):
                member.said_bye = True
                self.whole.hear(message)
            self._answers.note(member)

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
        reason = why_refuse(self, member, push)
        if reason:
            refuse_push(self, member, push, reason)
            member.turn()
            self._answers.push(member, push, refused=reason)
            return
        member.strikes = 0
        if self.master.rule.barrier:
            # The transport uses its buffer again.
            member.pending, member.awaiting = replace(push, push=push.push.clone()), "round"
        else:
            self._update((push,), now)
            member.turn()
            self._answers.push(member, push, applied=True)

    def diverge(self, reason: str) -> None:
        """End the run early."""
        self.diverged = reason
        self.leases.close()

    def stop(self, worker: int, reason: str) -> None:
        """End the run early, as the script of ``worker`` asks: the others hear of it with their next view."""
        self.stopped = reason
        self.on_notice(f"worker {worker} ends the run early: {reason}")
        self.leases.stop()

    # ---- updating ------------------------------------------------------------------------------------------------

    def _update(self, parts: tuple[Push, ...], now: float) -> None:
        """Make one update of the push of one worker, or of those of a whole round."""
        update = update_by(self, parts)
        if self.master.version % RESUM_EVERY == 0:
            self._resum()
        self.figures.count(update, now)
        self.figures.push_bytes += sum(travelling_bytes(p.push, p.encoded) + p.elsewhere for p in parts)
        self.on_update(update)
        if self.figures.lost_all_bounds(update.loss):
            self.diverge(f"the loss rose to {update.loss:.4g}, over {DIVERGED_LOSS_RATIO:.0f} times the first")

    def _update_by_round(self, now: float) -> None:
        """Make one update of what the live workers pushed, weighted by their samples."""
        members = [m for m in self.members.values() if m.takes_part and m.pending is not None]
        self._update(tuple(m.pending for m in members if m.pending is not None), now)
        for member in members:
            member.pending = None
            self._answers.view(member, applied=True)

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

        And what a script has reported, it will not report again, nor will a worker that has gone bring θ.
        """
        waiting_for_all = self.leases.done and not self.final
        left = 0 if waiting_for_all else sum(member.left for member in self.members.values())
        milestone = (self.life, self.leases.done, left, self.whole.version, *self.figures.reported.items())
        if milestone != self._milestone:
            self._milestone = milestone
            self.on_milestone(self)

    def _start_if_ready(self, now: float) -> None:
        live = [m for m in self.members.values() if m.alive]
        if self._master is None or len(live) < self.settings.workers:
            return
        self.started = True
        self.figures.started_at = now
        self._admit(*live)

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
        """Batch-norm statistics averaged over the workers that have left, by their updates, f32[B]."""
        return mean_by_updates(self.buffers, self.job.layout.buffer_size)
