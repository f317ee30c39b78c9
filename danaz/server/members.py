"""What the server remembers of one worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from danaz.protocol.messages import Push

Route = bytes | int  # where replies go: opaque to the core, the transport's own


@dataclass
class Member:
    """A worker that joined."""

    worker: int
    incarnation: int
    route: Route
    request: int  # the newest one seen
    ahead: int  # batches it wants to hold at a time
    vectors: dict[str, Tensor]  # the rule's worker_state, f32[P] each
    lr: tuple[float, ...]  # ηᵢ of its last applied update, per group
    heard_at: float
    alive: bool = True
    left: bool = False
    said_bye: bool = False
    # What it is waiting for; "" while it computes on the view it was sent. One that this server knows only from its
    # checkpoint has yet to "join".
    awaiting: Literal["", "join", "start", "round", "batches", "end"] = "start"
    sent_version: int = 0
    view: Tensor | None = None  # f32[P], kept for the gap and for rules that need it
    # In a pipeline, it has also been sent the view after that one.
    ahead_version: int | None = None
    ahead_view: Tensor | None = None  # f32[P]
    pending: Push | None = None  # waits for its round to fill
    updates: int = 0
    applied_request: int = 0  # of its last applied push
    refused: tuple[int, str] = (0, "")  # its last refused push, and why
    lag: int = 0  # of its last applied push
    gap: float | None = None
    squares: Tensor | None = None  # f64[layers] of this shard, for the gap of its last applied push
    strikes: int = 0  # non-finite pushes in a row

    def sees(self, version: int, ahead: bool) -> None:
        """It is sent the view of ``version``: to compute on, or after the one that it computes on now."""
        if ahead:
            self.ahead_version = version
        else:
            self.sent_version, self.ahead_version = version, None

    def turn(self) -> None:
        """It has pushed what it made of its view; if it was sent the one after that, it computes on that one now."""
        if self.ahead_version is not None:
            self.sent_version, self.ahead_version = self.ahead_version, None
            self.view, self.ahead_view = self.ahead_view, self.view

    @property
    def takes_part(self) -> bool:
        return self.alive and not self.left

    @property
    def computing(self) -> bool:
        return self.takes_part and not self.awaiting


class MeanBuffers:
    """Batch-norm statistics at the end: the mean over the workers that are there then, by their updates.

    A worker that leaves while others go on has statistics of a model long gone, and does not count. But if nobody is
    there at the end, those of the last one that left are better than none. So what is kept does not grow.
    """

    def __init__(self, size: int):
        self.updates = 0  # of the workers that count
        self.total = torch.zeros(size, dtype=torch.float64)  # their buffers, each times its updates
        self.last = torch.zeros(size)  # of the last worker that left early, or without an update

    def hear(self, member: Member, buffers: Tensor, at_the_end: bool) -> None:
        """A worker leaves with these buffers f32[B]."""
        if at_the_end and member.updates:
            self.updates += member.updates
            self.total = self.total.to(buffers.device).add_(buffers, alpha=member.updates)
        else:
            self.last = buffers.clone()

    @property
    def mean(self) -> Tensor:
        """f32[B]; zero if nobody has left."""
        return (self.total / self.updates).float() if self.updates else self.last
