"""What the server tells its workers: views with leases, the end, and that something was noted or refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

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
    Reply,
    Request,
    Streamed,
)
from danaz.server.members import Member, Route
from danaz.vectors.cutting import all_finite, announced

if TYPE_CHECKING:
    from danaz.server.core import ServerCore

Replies = list[tuple[Route, Reply]]
Streams = list[tuple[Route, Reply | Streamed]]


class Answers:
    """Answers that wait to be sent, each to the newest request of its worker."""

    def __init__(self, core: ServerCore):
        self._core = core
        self._waiting: Streams = []

    def take(self) -> Streams:
        """All that wait, in order; views of several shards name the checkpoint that holds them, and all there are."""
        waiting, self._waiting = self._waiting, []
        if self._core.settings.shards == 1:
            return waiting
        generation, kept = self._core.generation, self._core.kept
        return [(route, _dated(reply, generation, kept)) for route, reply in waiting]

    def refuse(self, route: Route, message: Request, reason: str, rejoin: bool = False, newest: int = 0) -> None:
        """Count it, and say so; but a heartbeat awaits no answer."""
        self._core.refuse(reason)
        if not isinstance(message, Heartbeat):
            self._waiting.append((route, Refusal(message.request, reason, rejoin, newest)))

    def progress(self, route: Route, question: Inquire) -> None:
        self._waiting.append((route, Progress(question.request, self._core.epoch)))

    def note(self, member: Member) -> None:
        self._waiting.append((member.route, Noted(member.request)))

    def fetched(self, member: Member) -> None:
        self._waiting.append((member.route, Fetched(member.request, self._core.untrained)))

    def push(self, member: Member, push: Push, *, applied: bool = False, refused: str = "") -> None:
        """With the next view, or without where that was fetched already."""
        if push.wants_view:
            self.view(member, applied=applied, refused=refused)
            return
        self._core.master.settle()  # no view is asked for, and the transport uses the push's memory again
        self._waiting.append((member.route, self._parameters(member, applied, refused, size=0)))

    def view(self, member: Member, *, applied: bool = False, refused: str = "", ahead: bool = False) -> None:
        """Send the newest view; the worker computes on it from now on, or from its next push on."""
        core, codec, size = self._core, self._core.master.view_codec, self._core.job.layout.size
        view = core.master.view(member, bool(core.settings.gap_every) or core.master.rule.needs_view, ahead)
        core.figures.view_bytes += codec.encoded_bytes(core.whole.layout.size)
        member.awaiting = ""
        member.sees(core.master.version, ahead)
        self._waiting.append((member.route, Streamed(self._parameters(member, applied, refused, size), view, codec)))

    def _parameters(self, member: Member, applied: bool, refused: str, size: int) -> Parameters:
        core = self._core
        return Parameters(
            request=member.request,
            version=core.master.version,
            applied=applied,
            refused=refused,
            leases=core.leases.top_up(member.worker, member.ahead),
            done=core.leases.done,
            epoch=core.leases.epoch,
            lag=member.lag,
            gap=member.gap,
            view=announced(size),
            last_applied=member.applied_request,
            life=core.life,
            squares=_to_send(member.squares) if core.settings.shard else (),
        )

    def final(self, members: Sequence[Member]) -> None:
        """Send the trained model to workers that have left."""
        core = self._core
        if members:
            core.settle()
        for member in members:
            member.awaiting, core.final = "", core.leases.done
            params, buffers = core.master.params.clone(), core.mean_buffers()
            final = Final(member.request, core.master.version, bool(core.diverged), params, buffers)
            self._waiting.append((member.route, final))


def _to_send(squares: Tensor | None) -> tuple[float, ...]:
    """A model that has diverged has none."""
    return () if squares is None or not all_finite(squares) else tuple(squares.tolist())


def _dated(reply: Reply | Streamed, generation: int, kept: tuple[int, ...]) -> Reply | Streamed:
    if isinstance(reply, Streamed):
        return replace(reply, header=replace(reply.header, generation=generation, kept=kept))
    return replace(reply, generation=generation, kept=kept) if isinstance(reply, Parameters) else reply


def whole(replies: Streams) -> Replies:
    """The same replies with each view in one piece."""
    return [(route, reply.whole() if isinstance(reply, Streamed) else reply) for route, reply in replies]
