"""What the server remembers of one worker, and the states that a worker goes through."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from danaz.protocol.messages import Push
from danaz.protocol.transitions import Transitions

Route = bytes | int  # where replies go: opaque to the core, the transport's own


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
    """The state of a worker of which a checkpoint holds these three facts."""
    if left and said_bye:
        return S.DISMISSED
    if left:
        return S.LEFT if alive else S.SILENT_LEFT
    if alive:
        return S.EXPECTED
    return S.QUIT if said_bye else S.LOST


@dataclass
class Member:
    """A worker that joined."""

    worker: int
    incarnation: int
    route: Route
    request: int  # the newest one seen
    ahead: int  # number of batches that it wants to hold at a time
    vectors: dict[str, Tensor]  # the rule's worker_state, f32[P] each
    lr: tuple[float, ...]  # ηᵢ of its last applied update, per group
    heard_at: float
    state: MemberState = MemberState.STARTING
    sent_version: int = 0  # of the view that it computes on
    view: Tensor | None = None  # f32[P], kept for the gap and for rules that need it
    ahead_version: int | None = None  # in a pipeline, of the view that it computes on next, if that was sent already
    ahead_view: Tensor | None = None  # f32[P]
    pending: Push | None = None  # the push that waits for its round, in the state IN_ROUND
    updates: int = 0
    applied_request: int = 0  # of its last applied push
    refused: tuple[int, str] = (0, "")  # request number of its last refused push, and why
    lag: int = 0  # of its last applied push
    gap: float | None = None
    squares: Tensor | None = None  # f64[layers] of this shard, for the gap of its last applied push
    strikes: int = 0  # non-finite pushes in a row

    def on(self, event: MemberEvent) -> None:
        """Go to the state after ``event``; a push waits in no state but IN_ROUND. Raises IllegalTransitionError."""
        self.state = MEMBER.after(self.state, event, str(self.worker))
        if self.state is not MemberState.IN_ROUND:
            self.pending = None

    def wait_for_round(self, push: Push) -> None:
        self.on(MemberEvent.ROUND)
        self.pending = push

    def be_shown(self, version: int, ahead: bool) -> None:
        """It is sent the view of ``version``. With ``ahead``, it computes on that one after its present view."""
        self.on(MemberEvent.VIEW)
        if ahead:
            self.ahead_version = version
        else:
            self.sent_version, self.ahead_version = version, None

    def advance_view(self) -> None:
        """It has pushed what it made of its view. If it was sent the view after that, it computes on that one now."""
        if self.ahead_version is not None:
            self.sent_version, self.ahead_version = self.ahead_version, None
            self.view, self.ahead_view = self.ahead_view, self.view

    @property
    def alive(self) -> bool:
        """Whether anyone may wait for it: it is neither silent nor did it quit."""
        return self.state in IS_ALIVE

    @property
    def left(self) -> bool:
        return self.state in HAS_LEFT

    @property
    def said_bye(self) -> bool:
        return self.state in (S.QUIT, S.DISMISSED)

    @property
    def takes_part(self) -> bool:
        return self.state in TAKES_PART

    @property
    def computing(self) -> bool:
        return self.state is MemberState.COMPUTING


class MeanBuffers:
    """Batch-norm statistics at the end: their mean over the workers that stay to the end, weighted by their updates.

    A worker that leaves while others go on has statistics of an old model, and does not count. But if no worker stays
    to the end, those of the last one that left are better than none. The memory does not grow with the workers.
    """

    def __init__(self, size: int):
        self.updates = 0  # of the workers that count
        self.total = torch.zeros(size, dtype=torch.float64)  # their buffers, each times its updates
        self.last = torch.zeros(size)  # of the last worker that left early, or without an update

    def hear(self, member: Member, buffers: Tensor, at_the_end: bool) -> None:
        """Take over the buffers f32[B] of a worker that leaves."""
        if at_the_end and member.updates:
            self.updates += member.updates
            self.total = self.total.to(buffers.device).add_(buffers, alpha=member.updates)
        else:
            self.last = buffers.clone()

    @property
    def mean(self) -> Tensor:
        """f32[B]; zero if nobody has left."""
        return (self.total / self.updates).float() if self.updates else self.last
