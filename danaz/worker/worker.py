"""This machine as one worker: its ranks move together, and one of them speaks with the server.

In an all-reduce world (``ssgd``), no rank speaks with a server elsewhere. Each rank holds the same small server in its
own process, and feeds it the same mean gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from time import perf_counter

import torch
from torch import Tensor

from danaz.protocol.messages import (
    TOO_MANY_REPORTED,
    Bye,
    Fetched,
    Final,
    Join,
    Leave,
    Parameters,
    Pull,
    Push,
    Refusal,
    Reply,
    Report,
)
from danaz.protocol.refusals import COMPLETE
from danaz.vectors.cutting import Spans
from danaz.vectors.model import FlatModel
from danaz.worker.core import LocalStep, Loss, Request, WorkerCore
from danaz.worker.group import Group
from danaz.worker.link import Link
from danaz.worker.pipeline import Pipeline

NEWS = 7  # number of figures in front of the batch numbers
ENDS_EARLY, CAME_LATE = 1, 2  # the news holds one of these; 0: neither


class RefusedError(RuntimeError):
    """The server refuses this worker."""


@dataclass
class Metrics:
    """The cluster as this worker last heard of it."""

    version: int = 0
    epoch: float = 0.0  # the whole cluster's epoch
    lag: int = 0  # the lag of this worker's last push
    gap: float | None = None
    refused_pushes: int = 0
    diverged: bool = False
    computing_s: float = 0.0
    exchanging_s: float = 0.0


class LeasedBatches:
    """The batches leased to this worker: those that wait, and those that have begun."""

    def __init__(self) -> None:
        self.waiting: deque[int] = deque()
        self._begun: set[int] = set()

    def replace(self, held: Sequence[int]) -> None:
        """Take over the server's list of all batches that this worker holds."""
        self._begun &= set(held)
        self.waiting = deque(batch for batch in held if batch not in self._begun)

    def begin(self) -> int:
        batch = self.waiting.popleft()
        self._begun.add(batch)
        return batch

    def end(self, batch: int) -> None:
        self._begun.discard(batch)

    def put_back(self, batches: Sequence[int]) -> None:
        """Put batches that were begun, but not computed, first in the queue again."""
        mine = [batch for batch in batches if batch in self._begun]
        self._begun.difference_update(mine)
        self.waiting.extendleft(reversed(mine))

    @property
    def any(self) -> bool:
        """Whether this worker holds a batch that waits or has begun."""
        return bool(self.waiting or self._begun)

    def begun_of(self, held: Sequence[int]) -> list[int]:
        return [batch for batch in held if batch in self._begun]


class Worker:
    """One worker of the cluster; each of its ranks has such an object.

    Only a rank that speaks with a server has a ``core`` and a ``link``; the other ranks listen to rank 0.
    ``replicated`` says that every rank has a server of its own, so that nothing needs to be broadcast.
    """

    def __init__(
        self,
        group: Group,
        flat: FlatModel,
        ahead: int,
        core: WorkerCore | None,
        link: Link | None,
        replicated: bool = False,
        pipelined: bool = False,
    ):
        self.group = group
        self.flat = flat
        self.batches = LeasedBatches()
        self.metrics = Metrics()
        self.done = False
        self.sync_period = 1
        self.is_asked_to_end: Callable[[], bool] = lambda: False  # the rank that speaks asks it
        self.ends_early = False  # whether this worker leaves while the run goes on
        self.came_late = False  # whether the run was over before this worker came, or came back
        self._local_steps = 0  # number of local steps since the last push
        self._core = core
        self._link = link
        self.pipeline = Pipeline(self._exchange) if pipelined and core is not None else None
        self.replicated = replicated or group.size == 1
        # The news that all ranks must hear is stored after the view, so that one broadcast brings both.
        news_floats = 2 * (NEWS + ahead)  # two f32 make one f64
        self._whole = flat.make_room(0 if self.replicated else news_floats + flat.layout.size % 2)
        self._news: Tensor | None = None if self.replicated else self._whole[-news_floats:].view(torch.float64)
        self._heard: list[float] = []  # the news, kept on the rank that speaks, which so need not read it back
        self._since = perf_counter()
        self._ready = self._since  # when the last request was ready to be sent; the device computed until then

    def join(self, bring_params: bool, untrained: Tensor | None = None) -> None:
        """Enter the run. Returns when training starts; the first view is then in the model.

        The worker that brings its parameters also brings ``untrained`` f32[U], which its model holds beside them.
        """
        self._ask(lambda core: core.join(core.staging.lift(self.flat.params) if bring_params else None, untrained))

    def fetch_untrained(self) -> Tensor:
        """Fetch what worker 0 brought beside its parameters, f32[U]; only the rank that speaks can ask."""
        self._pipeline_end()
        reply = self._exchange(lambda core: core.fetch())
        if not isinstance(reply, Fetched):
            raise RefusedError(f"the server answered with {type(reply).__name__} where a model's buffers were due")
        return reply.untrained

    def is_edited(self) -> bool:
        """Return whether the script has changed parameters since the last step; only the rank that speaks can tell."""
        return self._core is not None and self._core.edit(self.flat.params) is not None

    def push(
        self, grad: Tensor | None, lr: Sequence[float], samples: int, loss: Loss, batch: int, absent: Spans = ()
    ) -> None:
        """Push the mean gradient f32[P] of ``batch``, and put the next view into the model.

        Parameters in ``absent`` spans make no step; without a gradient, no parameter does. With a ``sync_period``, this
        is a local step between two pushes. Raises EditedError if the push cannot carry an edit of the parameters.
        """
        self.batches.end(batch)
        if self.pipeline is not None and self._core is not None:
            self._core.staging.catch_up()
        began = perf_counter()
        self._local_steps += 1
        if self._local_steps < self.sync_period and self.batches.any:
            self._step_locally(LocalStep(batch, tuple(lr), samples, loss), grad, absent)
        else:
            self._local_steps = 0
            if self._core is not None:
                edit = self._carried_edit()
                params = self.flat.params
                self._push(
                    lambda core, wants: core.push(grad, lr, samples, loss, batch, params, wants, absent, edit),
                    batch,
                    edit,
                )
            self._share()
        computed = began if self.pipeline is not None else max(began, self._ready)
        self.metrics.computing_s += computed - self._since
        self._since = perf_counter()
        self.metrics.exchanging_s += self._since - computed

    def skip(self, batch: int, lr: Sequence[float]) -> None:
        """Count ``batch`` as used without a step, and push nothing for it."""
        if self._local_steps:
            self.push(None, lr, 0, None, batch)
            return
        self.batches.end(batch)
        self._pipeline_end()
        self._ask(lambda core: core.pull(skipped=(batch,)))

    def _carried_edit(self) -> Tensor | None:
        """Return what the script has changed in the parameters since the last step, if the push is to carry it.

        If pushes are gradients, hand the change to the link instead, and return None.
        """
        assert self._core is not None
        edit = self._core.edit(self.flat.params)
        if edit is None or self._core.rule.pushes != "gradient":
            return edit
        assert self._link is not None
        self._link.edit(edit)
        return None

    def _push(self, make: Callable[[WorkerCore, bool], Push], batch: int, edit: Tensor | None) -> None:
        """Push ``batch``, and go on with the answer's view or, in a pipeline, with the view that was fetched ahead."""
        assert self._core is not None
        fetched = self._pipeline_end()
        if fetched is not None and self.came_late:
            self._take(fetched)
            return
        others = () if fetched is None else tuple(other for other in fetched.leases if other != batch)
        if self.pipeline is None or fetched is None or fetched.done or not others or edit is not None:
            self._take(self._view_from(lambda core: make(core, True)))
            if edit is not None and not self._core.applied:
                self.flat.params.add_(edit)  # the next push carries the edit
            return
        push = make(self._core, False)
        self._take(replace(fetched, leases=others))
        self.pipeline.begin(push)

    def _pipeline_end(self) -> Parameters | None:
        return None if self.pipeline is None else self.pipeline.end()

    def _step_locally(self, step: LocalStep, grad: Tensor | None, absent: Spans) -> None:
        if self._core is not None:
            self._core.local_step(step, self.flat.params, grad, absent)
        if not self.replicated:
            self.group.broadcast(params=self.flat.params)

    def pull(self) -> None:
        """Wait until this worker gets batches, or no batches are left for any worker."""
        self._pipeline_end()
        self._ask(lambda core: core.pull())

    def leave(self, stop: str = "") -> None:
        """Give back, and put the trained model (θ and the mean batch-norm buffers) into every rank's model.

        ``stop``, if given, is the reason why the run ends for all workers. A worker that came late gets no model,
        because nobody has it any more.
        """
        self._pipeline_end()
        self.flat.bring_home()
        if self.came_late:
            return
        buffers = self.flat.buffers()
        if self.group.size > 1:
            handle = self.group.sum_async(buffers, "buffers")
            self.group.wait(handle)
            buffers /= self.group.size
        if self._core is not None:
            edit = self._core.edit(self.flat.params)
            final = self._exchange(lambda core: core.leave(buffers, edit, stop))
            if not isinstance(final, Final):
                raise RefusedError(f"the server answered a worker's leave with {type(final).__name__}")
            self.flat.params.copy_(final.params)
            buffers, self.metrics.diverged = final.buffers, final.diverged
            self.metrics.version = final.version
        if not self.replicated:
            self.group.broadcast(params=self.flat.params, buffers=buffers)
        self.flat.load_buffers(buffers)

    def report(self, figures: dict[str, float | str | None]) -> None:
        """Let the rank that speaks send figures for summary.json. Raises RefusedError if the run has too many."""
        if self._core is not None:
            reply = self._exchange(lambda core: core.report(figures))
            if isinstance(reply, Refusal) and reply.reason == TOO_MANY_REPORTED:
                raise RefusedError(f"the server refused danaz.report: {reply.reason}")

    def close(self, in_good_order: bool) -> None:
        """Close the link. Say good-bye first if ``in_good_order``: then the worker has left before its process ends."""
        if self.pipeline is not None:
            self.pipeline.close()
        if self._core is not None and self._link is not None:
            if in_good_order:
                self._exchange(lambda core: core.bye())
            self._link.close()

    # ---- speaking and listening ----------------------------------------------------------------------------------

    def _ask(self, request: Callable[[WorkerCore], Request]) -> None:
        """Make one exchange, which ends with a new view in every rank's model."""
        self.flat.bring_home()
        if self._core is not None:
            edit = self._core.edit(self.flat.params)
            self._take(self._view_from(request))
            if edit is not None:
                self.flat.params.add_(edit)  # keep the script's change under the new view; a push will carry it
        self._share()

    def _view_from(self, request: Callable[[WorkerCore], Request]) -> Parameters:
        reply = self._exchange(request)
        if not isinstance(reply, Parameters):
            raise RefusedError(f"the server answered with {type(reply).__name__} where a view was due")
        return reply

    def _take(self, reply: Parameters) -> None:
        """Put the news and the parameters to compute on where all ranks get them from.

        A worker that was asked to end finishes the batches that it has begun, and begins no more.
        """
        assert self._core is not None
        if self.is_asked_to_end() and not reply.done:
            self.ends_early = True
            reply = replace(reply, leases=tuple(self.batches.begun_of(reply.leases)))
        self._pack(reply)
        if not self.came_late:
            self._core.compute_on(self.flat.params)

    def _share(self) -> None:
        """Let all ranks go on with rank 0's view; a pipeline fetches the next view while they compute."""
        if not self.replicated:
            self.group.broadcast(view_and_news=self._whole)
        self._unpack()
        if self.pipeline is not None and not self.pipeline.busy and self.batches.any and not self.done:
            self.pipeline.begin(None)

    def _exchange(self, make: Callable[[WorkerCore], Request]) -> Reply:
        assert self._core is not None
        request = make(self._core)
        reply = self._say(request)
        while isinstance(reply, Refusal) and not isinstance(request, (Report, Bye)):
            if isinstance(request, Join) and 0 < reply.newest < self._core.role.incarnation:
                reply = self._say(request := make(self._core))  # join again as a newer incarnation
                continue
            if reply.reason == COMPLETE and isinstance(request, (Join, Push, Pull)):
                self.came_late = True
                return _nothing_to_do(reply, self._core)
            if not reply.rejoin or isinstance(request, Join):
                raise RefusedError(f"the server refused this worker's {type(request).__name__.lower()}: {reply.reason}")
            # The server gave this worker up while it was away, or was restarted: the worker goes on from a fresh view.
            reply = self._say(self._core.join())
            if isinstance(request, Leave) and isinstance(reply, Parameters):
                if request.done and not request.stop and not reply.done:
                    raise RefusedError(
                        "the server went back to before the end of the run, which this process is behind; start it anew"
                    )
                request = make(self._core)
                reply = self._say(request)
        if isinstance(request, Push) and isinstance(reply, Parameters) and not reply.applied:
            self.metrics.refused_pushes += 1
        return reply

    def _say(self, request: Request) -> Reply:
        assert self._core is not None
        assert self._link is not None
        request = self._core.complete(request)
        self._ready = perf_counter()
        reply = self._link.exchange(request)
        self._core.receive(reply)
        return reply

    def _pack(self, reply: Parameters) -> None:
        gap = nan if reply.gap is None else reply.gap
        head = [reply.version, reply.epoch, reply.lag, gap, reply.done, self._ending, len(reply.leases)]
        assert len(head) == NEWS
        self._heard = [*head, *reply.leases]
        if self._news is not None:
            news = torch.tensor(self._heard, dtype=torch.float64)
            self._news[: len(news)].copy_(news, non_blocking=True)

    @property
    def _ending(self) -> int:
        return CAME_LATE if self.came_late else ENDS_EARLY * self.ends_early

    def _unpack(self) -> None:
        if self._core is None:
            assert self._news is not None
            self._heard = self._news.tolist()
        version, epoch, lag, gap, done, ending, count, *leases = self._heard
        metrics = self.metrics
        metrics.version, metrics.epoch, metrics.lag = int(version), epoch, int(lag)
        metrics.gap = None if isnan(gap) else gap
        self.ends_early, self.came_late = ending == ENDS_EARLY, ending == CAME_LATE
        self.done = bool(done) or self.ends_early
        self.batches.replace([int(batch) for batch in leases[: int(count)]])


def _nothing_to_do(refusal: Refusal, core: WorkerCore) -> Parameters:
    """Return what the server would have said to a worker that was there at the end of the run."""
    return Parameters(
        request=refusal.request,
        version=core.version,
        applied=False,
        refused=refusal.reason,
        leases=(),
        done=True,
        epoch=core.epoch,
        lag=0,
        gap=None,
        view=torch.empty(0),
    )
