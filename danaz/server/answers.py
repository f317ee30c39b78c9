"""The answers to workers: views with leases, the trained model, confirmations and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from danaz.protocol.messages import (
    Fetched,
    Final,
    Heartbeat,
    Inquire,
    Noted,
    Parameters,
    Progress,
    Push,
    Refusal,
    Replies,
    Reply,
    Request,
    Route,
    Streamed,
    Streams,
)
from danaz.server.members import Member, MemberEvent
from danaz.server.state import ServerState
from danaz.vectors.cutting import all_finite, announced


class Answers:
    """The answers that wait to be sent, each to the newest request of its worker."""

    def __init__(self, state: ServerState):
        self._state = state
        self._waiting: Streams = []

    def take(self) -> Streams:
        """Return all answers that wait, in order, and forget them.

        With several shards, each view names shard 0's newest checkpoint and all checkpoints that this shard has.
        """
        waiting, self._waiting = self._waiting, []
        if self._state.settings.shards == 1:
            return waiting
        generation, kept = self._state.generation, self._state.kept
        return [(route, _dated(reply, generation, kept)) for route, reply in waiting]

    def refuse(self, route: Route, message: Request, reason: str, rejoin: bool = False, newest: int = 0) -> None:
        """Count a refused message and answer it with the reason; a heartbeat gets no answer."""
        self._state.refuse(reason)
        if not isinstance(message, Heartbeat):
            self._waiting.append((route, Refusal(message.request, reason, rejoin, newest)))

    def send_progress(self, route: Route, question: Inquire) -> None:
        """Tell the epoch of the cluster to anybody who asks, and the parameters to a worker that takes part."""
        member = self._state.members.get(question.worker)
        may_know = member is not None and member.alive and member.incarnation == question.incarnation
        wanted = question.wants_params and may_know and self._state.has_params
        params = self._state.master.params.clone() if wanted else None
        self._waiting.append((route, Progress(question.request, self._state.epoch, params)))

    def confirm(self, member: Member) -> None:
        """Answer that the request of ``member`` was carried out."""
        self._waiting.append((member.route, Noted(member.request)))

    def send_untrained(self, member: Member) -> None:
        """Send what the model holds besides the parameters."""
        self._waiting.append((member.route, Fetched(member.request, self._state.untrained)))

    def answer_push(self, member: Member, push: Push, *, applied: bool = False, refused: str = "") -> None:
        """Answer a push, with the next view if the worker asks for it."""
        if push.wants_view:
            self.send_view(member, applied=applied, refused=refused)
            return
        self._state.master.settle()  # no view will finish the update, and the transport reuses the memory of the push
        self._waiting.append((member.route, self._lease_more(member, applied, refused, size=0)))

    def send_view(self, member: Member, *, applied: bool = False, refused: str = "", ahead: bool = False) -> None:
        """Send the newest view. The worker computes on it next or, with ``ahead``, after its next push."""
        state, codec, size = self._state, self._state.master.view_codec, self._state.job.layout.size
        view = state.master.take_view(member, bool(state.settings.gap_every) or state.master.rule.needs_view, ahead)
        nbytes = codec.encoded_bytes(state.full_model.layout.size)
        state.totals.view_bytes += nbytes
        state.totals.of(member.worker).view_bytes += nbytes
        member.note_sent_view(state.master.version, ahead)
        self._waiting.append((member.route, Streamed(self._lease_more(member, applied, refused, size), view, codec)))

    def _lease_more(self, member: Member, applied: bool, refused: str, size: int) -> Parameters:
        """Lease the batches that a worker lacks. Return the answer that names them, without its view f32[size]."""
        state = self._state
        return Parameters(
            request=member.request,
            version=state.master.version,
            applied=applied,
            refused=refused,
            leases=state.leases.lease_up_to(member.worker, member.ahead),
            done=state.leases.done,
            epoch=state.leases.epoch,
            lag=member.lag,
            gap=member.gap,
            view=announced(size),
            last_applied=member.applied_request,
            life=state.life,
            squares=_to_send(member.squares) if state.settings.shard else (),
        )

    def send_final(self, members: Sequence[Member]) -> None:
        """Send the trained model to workers that have left."""
        state = self._state
        if members:
            state.settle()
        for member in members:
            member.on(MemberEvent.END)
            state.final = state.leases.done
            params, buffers = state.master.params.clone(), state.buffers.mean
            final = Final(member.request, state.master.version, bool(state.diverged), params, buffers)
            self._waiting.append((member.route, final))


def _to_send(squares: Tensor | None) -> tuple[float, ...]:
    """Return ``squares`` as they travel; none if the model has diverged."""
    return () if squares is None or not all_finite(squares) else tuple(squares.tolist())


def _dated(reply: Reply | Streamed, generation: int, kept: tuple[int, ...]) -> Reply | Streamed:
    if isinstance(reply, Streamed):
        return replace(reply, header=replace(reply.header, generation=generation, kept=kept))
    return replace(reply, generation=generation, kept=kept) if isinstance(reply, Parameters) else reply


def materialize(replies: Streams) -> Replies:
    """The same replies with each view in one piece."""
    return [(route, reply.materialize() if isinstance(reply, Streamed) else reply) for route, reply in replies]
