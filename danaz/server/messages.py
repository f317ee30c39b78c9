"""What workers and the server say to each other. Field names are the wire's; tensors travel as raw frames.

Every request carries ``request``, a number that grows by one on its worker, and every reply names the request it
answers: so a repeated request is recognised, and so is a late reply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from danaz.codecs import FP32, Codec, Encoded
from danaz.flat import Layout

LOCAL = {"local": True}  # a field that does not travel
MAX_REASON = 300  # characters of a script's reason to end a run


@dataclass(frozen=True)
class Plan:
    """The work of a whole run, as batches numbered from 0: batch b is number b % batches_per_epoch of its epoch."""

    batches_per_epoch: int
    epochs: int

    @property
    def batches(self) -> int:
        return self.batches_per_epoch * self.epochs


@dataclass(frozen=True)
class Join:
    """A worker enters, comes back as a new incarnation, or joins again because it was told to.

    Worker 0 brings the first parameters; whoever joins again brings the newest view it has, which may be newer than
    what a server that was restarted knows.
    """

    worker: int
    incarnation: int  # larger each time the worker's process starts anew
    request: int
    digest: str  # of the configuration; server and workers must agree
    momentum: float
    layout: Layout
    plan: Plan
    ahead: int  # batches the worker wants to hold at a time, for its data loader to read ahead
    params: Tensor | None = None  # f32[P]
    version: int = 0  # of params, in that life of the server
    life: int = 0


@dataclass(frozen=True)
class Push:
    """The outcome of one mini-batch."""

    worker: int
    incarnation: int
    request: int
    view_version: int  # of the view it was computed on
    lr: tuple[float, ...]  # η of each parameter group
    samples: int
    loss: float | None
    batch: int  # the leased number
    push: Tensor  # f32[P], a gradient, displacement or parameters as the rule declares
    earlier: tuple[int, ...] = ()  # batches of the local steps since the last push
    life: int = 0  # of the server that sent the view
    wants_view: bool = True  # False: in a pipeline, the next view was fetched already
    squares: tuple[float, ...] = ()  # to shard 0: of each layer of the model what the others answered the push before
    elsewhere: int = 0  # to shard 0: bytes that the others' slices of ``push`` take on the wire
    generation: int = 0  # to the others: of shard 0's newest checkpoint, as it said
    common: tuple[int, ...] = ()  # to shards: the newest two checkpoints that all of them have, as they said
    square: float | None = field(default=None, metadata=LOCAL)  # ‖push‖², if it was summed while the push arrived
    encoded: Encoded | None = field(default=None, metadata=LOCAL)  # how ``push`` travels; None: as it is

    @property
    def batches(self) -> tuple[int, ...]:
        """All that this push completes."""
        return (*self.earlier, self.batch)


@dataclass(frozen=True)
class Pull:
    """A worker that holds no batch asks for one, with a fresh view; or, in a pipeline, for the view after the next."""

    worker: int
    incarnation: int
    request: int
    ahead: bool = False  # it still computes on the view before, and will push what comes of it


@dataclass(frozen=True)
class Heartbeat:
    """A worker is alive, computing. Not answered."""

    worker: int
    incarnation: int


@dataclass(frozen=True)
class Leave:
    """A worker leaves in good order, giving back what its rule says."""

    worker: int
    incarnation: int
    request: int
    give_back: Tensor | None  # f32[P], to be added to the server's parameters
    buffers: Tensor  # f32[B], batch-norm statistics
    done: bool = False  # it heard that no batches are left: a shard that leases none waits for the others, too
    stop: str = ""  # why the script ends the run for all workers, if it does; cut to MAX_REASON characters
    generation: int = 0  # as in Push


@dataclass(frozen=True)
class Report:
    """Figures for summary.json from the training script, such as its test error."""

    worker: int
    incarnation: int
    request: int
    figures: dict[str, float | str | None]


@dataclass(frozen=True)
class Bye:
    """A worker that left has nothing more to report. To shard 0 it brings the end of θ, which others held."""

    worker: int
    incarnation: int
    request: int
    version: int = 0  # of shard 0, at which it got θ
    rest: Tensor | None = None  # f32[P - slice of shard 0]


@dataclass(frozen=True)
class GoBack:
    """To one of several shards: what can it go back to? Or, from a worker that has heard that of all: go back there."""

    worker: int
    incarnation: int
    request: int  # below zero: a count of its own
    generation: int | None = None  # None asks; 0 is the beginning
    newest: int = 0  # number that a checkpoint of any shard has had: no other will have it again


@dataclass(frozen=True)
class Inquire:
    """How far is the run? A process may ask before it has joined."""

    worker: int
    incarnation: int
    request: int


@dataclass(frozen=True)
class Parameters:
    """The answer to Join, Push and Pull: a view, and the batches to compute on it and the next ones."""

    request: int
    version: int
    applied: bool  # whether the push that this answers was applied
    refused: str  # why not, empty if it was
    leases: tuple[int, ...]  # every batch the worker holds, those it has begun included
    done: bool  # the run has no more batches for anyone
    epoch: float  # epochs of the whole cluster so far
    lag: int
    gap: float | None
    view: Tensor  # f32[P]; f32[0] for a push that wants none
    last_applied: int = 0  # request number of this worker's newest push that was applied, however that was answered
    life: int = 0  # of the server: versions may repeat after a restart, (life, version) never does
    squares: tuple[float, ...] = ()  # of another shard than 0: ‖θ − view‖² of each layer of its slice, for the gap
    generation: int = 0  # of shard 0's newest checkpoint: the others keep theirs before they heed what follows
    kept: tuple[int, ...] = ()  # of several shards: the checkpoints that this one has, ascending
    parts: tuple[tuple[int, int, int], ...] = field(default=(), metadata=LOCAL)  # (start, stop, last_applied) of shards


@dataclass(frozen=True)
class Final:
    """The answer to Leave: the trained model."""

    request: int
    version: int
    diverged: bool
    params: Tensor  # f32[P], θ
    buffers: Tensor  # f32[B], the mean over the workers


@dataclass(frozen=True)
class Noted:
    """The answer to Report and Bye."""

    request: int


@dataclass(frozen=True)
class Progress:
    """The answer to Inquire."""

    request: int
    epoch: float  # epochs of the whole cluster so far


@dataclass(frozen=True)
class Refusal:
    """A request that the server will not serve, now or later. The worker must not repeat it."""

    request: int
    reason: str
    rejoin: bool  # whether joining anew is the cure


@dataclass(frozen=True)
class Offer:
    """The answer of a shard that was restarted: to everything, until it is told where to go on; to GoBack also then."""

    request: int
    generations: tuple[int, ...]  # to which it can go back, ascending; 0: to the beginning
    newest: int  # number that a checkpoint here has had
    done: bool  # its newest is of a training that is over
    told: bool = False  # it went back to the one generation that is left


@dataclass(frozen=True)
class Streamed:
    """Parameters whose view is worked out while it is sent: each slice counts until the next one is asked for."""

    header: Parameters  # its view is announced: it has a size and no values
    slices: Iterator[Tensor]  # f32[n] each, as flat.chunks cuts a vector and as the worker decodes it
    codec: Codec = FP32  # it travels in

    @property
    def request(self) -> int:
        return self.header.request

    def whole(self) -> Parameters:
        view: Tensor | None = None
        start = 0
        for piece in self.slices:
            view = piece.new_empty(self.header.view.numel()) if view is None else view
            view[start : start + piece.numel()] = piece
            start += piece.numel()
        assert view is not None
        return replace(self.header, view=view)


def announced(size: int) -> Tensor:
    """A vector f32[size] that is known by its size alone, and takes no memory."""
    return torch.zeros(1).expand(size)


def is_announced(vector: Tensor) -> bool:
    return vector.numel() > 1 and vector.stride() == (0,)


Request = Join | Push | Pull | Heartbeat | Leave | Report | Bye | GoBack | Inquire
Reply = Parameters | Final | Noted | Refusal | Offer | Progress
Message = Request | Reply
