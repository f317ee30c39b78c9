"""What workers and the server say to each other. Field names are the wire's; tensors travel as raw frames.

Every request carries ``request``, a number that grows by one on its worker, and every reply names the request that it
answers. This is how a repeated request and a late reply are recognised.

The type of each field declares the values that it may hold. danaz.protocol.wire checks them when it decodes a message,
so the code that handles a message can rely on them. A plain ``float`` may hold any value, NaN and infinity included.
The server itself judges such values in a push, because a worker whose training has diverged sends them in good faith.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from typing import Annotated

from torch import Tensor

from danaz.optimizers import Optimizers
from danaz.vectors.codecs import FP32, Codec, Encoded
from danaz.vectors.layout import MAX_GROUPS, MAX_TENSORS, Layout

LOCAL = {"local": True}  # a field that does not travel
LATER = {"later": True}  # a field that recordings of earlier versions do not have; it has its default there
MAX_REASON = 300  # characters of a script's reason to end a run


# ---- what a field may hold -------------------------------------------------------------------------------------------


class OutOfRangeError(ValueError):
    """The value has the right type, but its field may not hold it."""


@dataclass(frozen=True)
class Within:
    """The limit of a field that holds a number from ``low`` to ``high``, both included. NaN is refused."""

    low: float
    high: float

    def check(self, value: float) -> None:
        """Raise OutOfRangeError if ``value`` is beyond the limit."""
        if not self.low <= value <= self.high:
            raise OutOfRangeError(f"a number from {self.low} to {self.high} was expected")


@dataclass(frozen=True)
class AtMost:
    """The limit of a field that holds a text, list or table of at most ``length`` characters or entries."""

    length: int

    def check(self, value: Sized) -> None:
        """Raise OutOfRangeError if ``value`` is beyond the limit."""
        if len(value) > self.length:
            raise OutOfRangeError(f"at most {self.length} characters or entries were expected")


LARGEST = 1 << 53  # the largest number that a float holds exactly; JSON and the messages between ranks use floats
MAX_WORKERS = 4096
MAX_AHEAD = 1 << 16  # batches that a worker may hold
MAX_LENGTHS = 1 << 16  # epochs of different lengths that a plan may have
MAX_REPORTED = 64  # figures that a script may report of a run
MAX_NAME = 100  # characters in the name of a figure
MAX_TEXT = 1000  # characters in a figure that is a text

TOO_MANY_REPORTED = f"a run has at most {MAX_REPORTED} reported figures"

Count = Annotated[int, Within(0, LARGEST)]  # also versions, lives, generations, batches and requests
AnyRequest = Annotated[int, Within(-LARGEST, LARGEST)]  # the number of a GoBack is below zero
WorkerNumber = Annotated[int, Within(0, MAX_WORKERS - 1)]
Length = Annotated[int, Within(1, LARGEST)]  # batches in an epoch
Lengths = Annotated[tuple[Length, ...], AtMost(MAX_LENGTHS)]
Ahead = Annotated[int, Within(1, MAX_AHEAD)]
Samples = Annotated[int, Within(0, 1 << 32)]
Square = Annotated[float, Within(0, float("inf"))]
Seconds = Annotated[float, Within(0, LARGEST)]
Text = Annotated[str, AtMost(MAX_TEXT)]
Rates = Annotated[tuple[float, ...], AtMost(MAX_GROUPS)]
Squares = Annotated[tuple[Square, ...], AtMost(MAX_TENSORS)]
Batches = Annotated[tuple[Count, ...], AtMost(MAX_AHEAD)]
AbsentSpans = Annotated[tuple[Annotated[tuple[Count, Count], AtMost(2)], ...], AtMost(MAX_TENSORS)]
Generations = Annotated[tuple[Count, ...], AtMost(1024)]
Reported = Annotated[dict[Annotated[str, AtMost(MAX_NAME)], float | Text | None], AtMost(MAX_REPORTED)]


def check_reported(figures: Mapping[str, object]) -> None:
    """Raise OutOfRangeError if a server would not accept these figures from a training script."""
    too_long = [name for name, value in figures.items() if isinstance(value, str) and len(value) > MAX_TEXT]
    too_long += [name for name in figures if len(name) > MAX_NAME]
    if too_long or len(figures) > MAX_REPORTED:
        what = f"{too_long[0][:MAX_NAME]!r} is longer" if too_long else f"there are {len(figures)} figures"
        raise OutOfRangeError(
            f"danaz.report takes at most {MAX_REPORTED} figures, with names of at most {MAX_NAME} characters and texts "
            f"of at most {MAX_TEXT}; {what}"
        )


# ---- what workers say ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The work of a whole run, as batches numbered from 0, through all epochs."""

    batches_per_epoch: Length  # of the first epoch
    epochs: Annotated[int, Within(1, LARGEST)]
    lengths: Lengths = ()  # the number of batches in each epoch, if the epochs differ

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Plan:
        """Return the plan of epochs with these numbers of batches, of which there is at least one."""
        return cls(lengths[0], len(lengths), () if len(set(lengths)) == 1 else tuple(lengths))

    @property
    def batches(self) -> int:
        return _starts(self.lengths)[-1] if self.lengths else self.batches_per_epoch * self.epochs

    def count(self, epoch: int) -> int:
        """Return the number of batches in an epoch."""
        return self.lengths[epoch] if self.lengths else self.batches_per_epoch

    def place_of(self, batch: int) -> tuple[int, int]:
        """Return the epoch of a batch, and its number in that epoch."""
        if not self.lengths:
            return divmod(batch, self.batches_per_epoch)
        starts = _starts(self.lengths)
        epoch = min(bisect(starts, batch), len(self.lengths)) - 1
        return epoch, batch - starts[epoch]

    def epoch_after(self, batches: int) -> float:
        """Return how many epochs are over when this number of batches is completed."""
        if not self.lengths:
            return batches / self.batches_per_epoch
        epoch, done = self.place_of(batches)
        return epoch + done / self.lengths[epoch]

    def batches_until(self, epoch: float) -> float:
        """Return how many batches are completed when this number of epochs is over."""
        if not self.lengths:
            return epoch * self.batches_per_epoch
        whole = min(int(epoch), len(self.lengths) - 1)
        return _starts(self.lengths)[whole] + (epoch - whole) * self.lengths[whole]


@lru_cache(maxsize=16)
def _starts(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Return the number of the first batch of each epoch, and at last that of all batches."""
    return tuple(accumulate(lengths, initial=0))


@dataclass(frozen=True)
class Machine:
    """Where the process of a worker runs."""

    host: Annotated[str, AtMost(MAX_NAME)] = ""  # the name that the machine gives itself
    ranks: Count = 1
    device: Annotated[str, AtMost(MAX_NAME)] = ""  # the kind of device that the first rank computes on


UNKNOWN_MACHINE = Machine()


@dataclass(frozen=True)
class Spent:
    """What a worker's process has spent its time on since it began to train, in seconds."""

    computing: Seconds = 0.0
    exchanging: Seconds = 0.0  # from a push, until the next view is in the models of all ranks
    waiting: Seconds = 0.0  # until the server has batches for it
    reading: Seconds = 0.0  # until its data loader has the next batch


NOTHING_SPENT = Spent()


@dataclass(frozen=True)
class Join:
    """A worker enters, comes back as a new incarnation, or joins again because it was told to.

    Worker 0 brings the first parameters. A worker that joins again brings its newest view, which may be newer than
    what a restarted server knows.
    """

    worker: WorkerNumber
    incarnation: Count  # larger each time the worker's process starts anew
    request: Count
    digest: Text  # of the configuration; server and workers must agree
    optimizers: Optimizers  # of each parameter group, or one for all
    layout: Layout
    plan: Plan
    ahead: Ahead  # batches the worker wants to hold at a time, for its data loader to read ahead
    params: Tensor | None = None  # f32[P]
    version: Count = 0  # the version of params, in the life below
    life: Count = 0
    untrained: Tensor | None = None  # f32[U] from worker 0: its frozen parameters and buffers, as bytes
    machine: Machine = field(default=UNKNOWN_MACHINE, metadata=LATER)


@dataclass(frozen=True)
class Push:
    """The outcome of one mini-batch."""

    worker: WorkerNumber
    incarnation: Count
    request: Count
    view_version: Count  # the version of the view that it was computed on
    lr: Rates  # η of each parameter group
    samples: Samples
    loss: float | None
    batch: Count  # the leased number
    push: Tensor  # f32[P], a gradient, displacement or parameters as the rule declares
    earlier: Batches = ()  # batches of the local steps since the last push
    life: Count = 0  # the life of the server that sent the view
    wants_view: bool = True  # False in a pipeline, where the next view was fetched already
    squares: Squares = ()  # to shard 0: what the other shards answered to the push before, for each layer
    elsewhere: Count = 0  # to shard 0: bytes that the other shards' slices of ``push`` take on the wire
    generation: Count = 0  # to the other shards: the generation of shard 0's newest checkpoint, as shard 0 said
    common: Generations = ()  # to all shards: the newest two checkpoints that all of them said they have
    absent: AbsentSpans = ()  # (start, stop) of parameters without a gradient, which make no step
    spent: Spent = field(default=NOTHING_SPENT, metadata=LATER)
    order: Count = field(default=0, metadata=LATER)  # digest of the order of samples in the epoch of ``batch``; 0: none
    square: float | None = field(default=None, metadata=LOCAL)  # ‖push‖², if it was summed while the push arrived
    encoded: Encoded | None = field(default=None, metadata=LOCAL)  # how ``push`` travels; None: as it is

    @property
    def batches(self) -> tuple[int, ...]:
        """All batches that this push completes."""
        return (*self.earlier, self.batch)


@dataclass(frozen=True)
class Pull:
    """A worker that holds no batch asks for one, with a fresh view; or, in a pipeline, for the view after the next."""

    worker: WorkerNumber
    incarnation: Count
    request: Count
    ahead: bool = False  # it still computes on the view before, and will push the result
    skipped: Batches = ()  # batches that made no step, such as after an overflow: they count as used


@dataclass(frozen=True)
class Fetch:
    """A worker asks for what the model holds besides its trained parameters, as worker 0 sent it."""

    worker: WorkerNumber
    incarnation: Count
    request: Count


@dataclass(frozen=True)
class Heartbeat:
    """A worker is alive and computing. The server does not answer it."""

    worker: WorkerNumber
    incarnation: Count


@dataclass(frozen=True)
class Leave:
    """A worker leaves as planned, and gives back what its rule says."""

    worker: WorkerNumber
    incarnation: Count
    request: Count
    give_back: Tensor | None  # f32[P], to be added to the server's parameters
    buffers: Tensor  # f32[B], batch-norm statistics
    done: bool = False  # it heard that no batches are left; a shard without leases then waits for the others
    stop: Annotated[str, AtMost(MAX_REASON)] = ""  # why the script ends the run for all workers, if it does
    generation: Count = 0  # as in Push
    spent: Spent = field(default=NOTHING_SPENT, metadata=LATER)


@dataclass(frozen=True)
class Report:
    """Figures for summary.json from the training script, such as its test error."""

    worker: WorkerNumber
    incarnation: Count
    request: Count
    figures: Reported


@dataclass(frozen=True)
class Bye:
    """A worker that left has nothing more to report. It brings shard 0 the rest of θ, which the other shards held."""

    worker: WorkerNumber
    incarnation: Count
    request: Count
    version: Count = 0  # the version of shard 0 at which it received θ
    rest: Tensor | None = None  # f32[P - slice of shard 0]


@dataclass(frozen=True)
class GoBack:
    """A worker asks one of several shards what it can go back to. When all have answered, it tells them the choice."""

    worker: WorkerNumber
    incarnation: Count
    request: Annotated[int, Within(-LARGEST, -1)]  # a count of its own
    generation: Count | None = None  # None asks; 0 is the beginning
    newest: Count = 0  # the largest number that a checkpoint of any shard has had, which is not used again


@dataclass(frozen=True)
class Inquire:
    """A process asks how far the run is. It may ask before it has joined."""

    worker: WorkerNumber
    incarnation: Count
    request: Count
    wants_params: bool = field(default=False, metadata=LATER)  # it also asks for the server's parameters


# ---- what a server answers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """The answer to Join, Push and Pull: a view, and the batches that the worker is to compute."""

    request: Count
    version: Count
    applied: bool  # whether the push that this answers was applied
    refused: Text  # why not, empty if it was
    leases: Batches  # every batch that the worker holds, including those that it has begun
    done: bool  # the run has no more batches for anyone
    epoch: Annotated[float, Within(0, LARGEST)]  # epochs of the whole cluster so far
    lag: Count
    gap: float | None
    view: Tensor  # f32[P], or f32[0] for a push that wants none
    last_applied: Count = 0  # request number of this worker's newest push that was applied, whatever the answer
    life: Count = 0  # of the server: a version may repeat after a restart, the pair (life, version) never does
    squares: Squares = ()  # from a shard other than 0: ‖θ − view‖² of each layer of its slice, for the gap
    generation: Count = 0  # of shard 0's newest checkpoint: other shards write theirs before they act on what follows
    kept: Generations = ()  # with several shards: the checkpoints that this one has, ascending
    parts: tuple[tuple[int, int, int], ...] = field(default=(), metadata=LOCAL)  # (start, stop, last_applied) of shards


@dataclass(frozen=True)
class Final:
    """The answer to Leave: the trained model."""

    request: Count
    version: Count
    diverged: bool
    params: Tensor  # f32[P], θ
    buffers: Tensor  # f32[B], the mean over the workers


@dataclass(frozen=True)
class Fetched:
    """The answer to Fetch."""

    request: Count
    untrained: Tensor  # f32[U], frozen parameters and buffers as bytes


@dataclass(frozen=True)
class Noted:
    """The answer to Report and Bye."""

    request: Count


@dataclass(frozen=True)
class Progress:
    """The answer to Inquire."""

    request: Count
    epoch: Annotated[float, Within(0, LARGEST)]  # epochs of the whole cluster so far
    params: Tensor | None = None  # f32[P], θ (under rules that push displacements, Θ), if asked for and there are any


@dataclass(frozen=True)
class Refusal:
    """The server will not serve this request, now or later. The worker must not repeat it."""

    request: AnyRequest
    reason: Text
    rejoin: bool  # whether the worker should join again
    newest: Count = 0  # the incarnation of this worker that has joined, if the request came from a lower one


@dataclass(frozen=True)
class Offer:
    """A restarted shard's answer to every request until it is told where to go on, and to GoBack even afterwards."""

    request: AnyRequest
    generations: Generations  # the checkpoints that it can go back to, ascending; 0 is the beginning
    newest: Count  # the largest number that a checkpoint here has had
    done: bool  # training was over when its newest checkpoint was written
    told: bool = False  # it went back to the one generation that is left


@dataclass(frozen=True)
class Streamed:
    """Parameters whose view is computed while it is sent. A slice is valid until the next one is asked for."""

    header: Parameters  # its view is announced: it has a size and no values
    slices: Iterator[Tensor]  # f32[n] each, as cutting.chunks cuts a vector and as the worker decodes it
    codec: Codec = FP32  # the codec that the view travels in

    @property
    def request(self) -> int:
        return self.header.request

    def materialize(self) -> Parameters:
        """Return the parameters with the whole view, f32[P]. This uses up ``slices``."""
        view: Tensor | None = None
        start = 0
        for piece in self.slices:
            view = piece.new_empty(self.header.view.numel()) if view is None else view
            view[start : start + piece.numel()] = piece
            start += piece.numel()
        assert view is not None
        return replace(self.header, view=view)


Request = Join | Push | Pull | Fetch | Heartbeat | Leave | Report | Bye | GoBack | Inquire
Reply = Parameters | Fetched | Final | Noted | Refusal | Offer | Progress
Message = Request | Reply

Route = bytes | int  # where a reply goes; only the transport knows what it means
Replies = list[tuple[Route, Reply]]
Streams = list[tuple[Route, Reply | Streamed]]
