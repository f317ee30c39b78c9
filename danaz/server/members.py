"""What the server remembers of one worker, and the states that a worker goes through."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor

from danaz.protocol.messages import Push, Route
from danaz.protocol.transitions import Transitions
from danaz.vectors.counts import Counts


class MemberState(Enum):
    """Where a worker is in its life, as the server sees it."""

    EXPECTED = "expected"  # known from a checkpoint; has yet to join again
    STARTING = "starting"  # has joined; waits for its first view
    COMPUTING = "computing"  # computes on the view that it was sent
    IN_ROUND = "in_round"  # its push waits until the round is complete
    IDLE = "idle"  # waits for batches
    LOST = "lost"  # was silent too long
    QUIT = "quit"  # said good-bye without leaving first
    LEAVING = "leaving"  # has left; waits for the trained model
    LEFT = "left"  # has left, and was sent the trained model
    SILENT_LEAVING = "silent_leaving"  # LEAVING, but silent: nobody waits for it
    SILENT_LEFT = "silent_left"  # LEFT, but silent: nobody waits for it
    DISMISSED = "dismissed"  # has left and said good-bye


class MemberEvent(Enum):
    """What happens to a worker that the server knows."""

    JOIN = "joins"
    VIEW = "is sent a view"
    ROUND = "push waits for its round"
    PULL = "asks for batches"
    LEAVE = "leaves"
    END = "is sent the trained model"
    BYE = "says good-bye"
    SILENCE = "is silent too long"
    HEARD = "is heard again"


S, E = MemberState, MemberEvent
_AT_WORK = (S.STARTING, S.COMPUTING, S.IN_ROUND, S.IDLE)
TAKES_PART = frozenset((S.EXPECTED, *_AT_WORK))
HAS_LEFT = frozenset((S.LEAVING, S.LEFT, S.SILENT_LEAVING, S.SILENT_LEFT, S.DISMISSED))
IS_ALIVE = frozenset((*TAKES_PART, S.LEAVING, S.LEFT, S.DISMISSED))

MEMBER = Transitions(
    "member",
    {
        S.STARTING: "joins",
        S.EXPECTED: "takes part in the checkpoint",
        S.LOST: "is lost in the checkpoint, or in the journal alone",
        S.QUIT: "has quit in the checkpoint",
        S.LEFT: "has left in the checkpoint",
        S.SILENT_LEFT: "has left in the checkpoint, and was silent",
        S.DISMISSED: "has said good-bye in the checkpoint",
    },
    {
        E.JOIN: {
            **dict.fromkeys((S.EXPECTED, *_AT_WORK, S.LOST, S.QUIT), S.STARTING),
            S.LEAVING: S.LEAVING,
            S.SILENT_LEAVING: S.LEAVING,
            S.LEFT: S.LEFT,
            S.SILENT_LEFT: S.LEFT,
            S.DISMISSED: S.DISMISSED,
        },
        E.VIEW: dict.fromkeys(_AT_WORK, S.COMPUTING),
        E.ROUND: {S.COMPUTING: S.IN_ROUND},
        E.PULL: dict.fromkeys(_AT_WORK, S.IDLE),
        E.LEAVE: dict.fromkeys((*_AT_WORK, S.LEAVING, S.LEFT, S.DISMISSED), S.LEAVING),
        E.END: {S.LEAVING: S.LEFT},
        E.BYE: {
            **dict.fromkeys(_AT_WORK, S.QUIT),
            **dict.fromkeys((S.LEAVING, S.LEFT, S.DISMISSED), S.DISMISSED),
        },
        E.SILENCE: {
            **dict.fromkeys((S.EXPECTED, *_AT_WORK), S.LOST),
            S.LEAVING: S.SILENT_LEAVING,
            S.LEFT: S.SILENT_LEFT,
        },
        E.HEARD: {S.SILENT_LEAVING: S.LEAVING, S.SILENT_LEFT: S.LEFT},
    },
)


def restored_state(alive: bool, left: bool, said_bye: bool) -> MemberState:
    """Return the state of a worker from the three facts that a checkpoint holds of it."""
    if left and said_bye:
        return S.DISMISSED
    if left:
        return S.LEFT if alive else S.SILENT_LEFT
    if alive:
        return S.EXPECTED
    return S.QUIT if said_bye else S.LOST


@dataclass
class Member:
    """What the server remembers of a worker that joined."""

    worker: int
    incarnation: int
    route: Route
    request: int  # number of its newest request
    ahead: int  # number of batches that it wants to hold at a time
    vectors: dict[str, Tensor]  # the rule's worker_state, f32[P] each
    heard_at: float
    state: MemberState = MemberState.STARTING
    sent_version: int = 0  # version of the view that it computes on
    view: Tensor | None = None  # f32[P], that view, kept for the gap and for rules that need it
    ahead_version: int | None = None  # in a pipeline, version of its next view, if that was sent already
    ahead_view: Tensor | None = None  # f32[P], that next view, or memory for it
    pending: Push | None = None  # the push that waits for its round, in the state IN_ROUND
    updates: int = 0  # number of its applied pushes
    counts: Counts = field(default_factory=lambda: Counts.of(0))  # gradients in each element of ``vectors``, and ηᵢ
    applied_request: int = 0  # request number of its last applied push
    refused: tuple[int, str] = (0, "")  # request number of its last refused push, and why
    lag: int = 0  # lag of its last applied push
    gap: float | None = None  # gap of that push
    squares: Tensor | None = None  # f64[layers], this shard's part of the gap of its last applied push
    strikes: int = 0  # non-finite pushes in a row

    def on(self, event: MemberEvent) -> None:
        """Go to the state after ``event``; a push waits only in the state IN_ROUND. Raises IllegalTransitionError."""
        self.state = MEMBER.after(self.state, event, str(self.worker))
        if self.state is not MemberState.IN_ROUND:
            self.pending = None

    def wait_for_round(self, push: Push) -> None:
        """Keep ``push`` until the round is complete."""
        self.on(MemberEvent.ROUND)
        self.pending = push

    def note_sent_view(self, version: int, ahead: bool) -> None:
        """Note that the worker is sent the view of ``version``; with ``ahead``, as the one after its present view."""
        self.on(MemberEvent.VIEW)
        if ahead:
            self.ahead_version = version
        else:
            self.sent_version, self.ahead_version = version, None

    def advance_view(self) -> None:
        """Let the worker, which has pushed, compute on the view that it was sent ahead, if there is one."""
        if self.ahead_version is not None:
            self.sent_version, self.ahead_version = self.ahead_version, None
            self.view, self.ahead_view = self.ahead_view, self.view

    @property
    def alive(self) -> bool:
        """Whether others may wait for it: it is not silent and has not quit."""
        return self.state in IS_ALIVE

    @property
    def left(self) -> bool:
        """Whether it has left in good order."""
        return self.state in HAS_LEFT

    @property
    def said_bye(self) -> bool:
        return self.state in (S.QUIT, S.DISMISSED)

    @property
    def takes_part(self) -> bool:
        """Whether it may still push, now or once it has joined again after a restart of the server."""
        return self.state in TAKES_PART

    @property
    def computing(self) -> bool:
        return self.state is MemberState.COMPUTING


class MeanBuffers:
    """The batch-norm statistics of the trained model: the mean of those that workers bring, weighted by their updates.

    Only workers that stay to the end count. One that leaves earlier has the statistics of an older model; they are used
    only if nobody stays to the end. The memory does not grow with the number of workers.
    """

    def __init__(self, size: int):
        self.updates = 0  # updates of the workers that count
        self.total = torch.zeros(size, dtype=torch.float64)  # sum of their buffers, each times its worker's updates
        self.last = torch.zeros(size)  # buffers of the last worker that left early, or without an update

    def hear(self, member: Member, buffers: Tensor, at_the_end: bool) -> None:
        """Take over the buffers f32[B] of a worker that leaves."""
        if at_the_end and member.updates:
            self.updates += member.updates
            self.total = self.total.to(buffers.device).add_(buffers, alpha=member.updates)
        else:
            self.last = buffers.clone()

    @property
    def mean(self) -> Tensor:
        """The mean buffers f32[B]; zero if nobody has left."""
        return (self.total / self.updates).float() if self.updates else self.last
