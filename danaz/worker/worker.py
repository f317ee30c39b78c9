"""This machine as one worker: its ranks move together, and one of them speaks with the server.

In an all-reduce world (``ssgd``), no rank speaks with a server elsewhere. Each rank holds the same small server in its
own process, and feeds it the same mean gradient.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isnan, nan
from time import perf_counter
from typing import TypeVar, cast

import torch
from torch import Tensor

from danaz.protocol.messages import TOO_MANY_REPORTED, Fetched, Final, Join, Parameters, Pull, Refusal, Spent
from danaz.vectors.model import FlatModel
from danaz.worker.conversation import Conversation, RefusedError
from danaz.worker.core import Step, WorkerCore
from danaz.worker.group import Group
from danaz.worker.pipeline import Pipeline

NEWS = 7  # number of figures before the batch numbers
END = object()  # comes after the last batch of a data loader
ENDS_EARLY, CAME_LATE = 1, 2  # the news holds one of these; 0: neither


Batch = TypeVar("Batch")


@dataclass
class Metrics:
    """The cluster as this worker last heard of it."""

    version: int = 0
    epoch: float = 0.0  # the whole cluster's epoch
    lag: int = 0  # the lag of this worker's last push
    gap: float | None = None
    refused_pushes: int = 0
    diverged: bool = False
    # What this rank has spent its time on since the run began for it; see messages.Spent.
    computing_s: float = 0.0
    exchanging_s: float = 0.0
    waiting_s: float = 0.0
    reading_s: float = 0.0

    @property
    def spent(self) -> Spent:
        """The times as the server is told them."""
        return Spent(self.computing_s, self.exchanging_s, self.waiting_s, self.reading_s)


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
    def held(self) -> list[int]:
        """The batches that wait or have begun, in any order. They are the same on every rank."""
        return [*self.waiting, *self._begun]

    @property
    def any(self) -> bool:
        """Whether this worker holds a batch that waits or has begun."""
        return bool(self.waiting or self._begun)

    def begun_of(self, held: Sequence[int]) -> list[int]:
        return [batch for batch in held if batch in self._begun]


class Worker:
    """One worker of the cluster; each of its ranks has such an object.

    Only a rank that speaks with a server has a ``conversation``; the other ranks listen to rank 0. ``replicated`` says
    that every rank has a server of its own, so that nothing needs to be broadcast.
    """

    def __init__(
        self,
        group: Group,
        flat: FlatModel,
        ahead: int,
        conversation: Conversation | None,
        replicated: bool = False,
        pipelined: bool = False,
    ):
        self.group = group
        self.flat = flat
        self.batches = LeasedBatches()
        self.metrics = Metrics()
        self.done = False
        self.sync_period = 1
        self.is_asked_to_end: Callable[[], bool] = lambda: False  # called on the rank that speaks
        self.ends_early = False  # whether this worker leaves while the run goes on
        self.conversation = conversation
        self.pipeline = Pipeline(conversation) if pipelined and conversation is not None else None
        self.replicated = replicated or group.size == 1
        self._local_steps = 0  # number of local steps since the last push
        # The news that all ranks must hear is stored after the view, so that one broadcast brings both.
        news_floats = 2 * (NEWS + ahead)  # two f32 make one f64
        self._view_and_news = flat.make_room(0 if self.replicated else news_floats + flat.layout.size % 2)
        self._news: Tensor | None = None if self.replicated else self._view_and_news[-news_floats:].view(torch.float64)
        self._heard: list[float] = []  # the latest news; the rank that speaks need not read it from the device
        self._heard_too_late = False  # whether the rank that speaks has told this one that the worker came late
        self._since = perf_counter()  # up to when time is counted in the metrics

    @property
    def came_late(self) -> bool:
        """Whether the run was over before this worker came, or came back."""
        return self._heard_too_late if self.conversation is None else self.conversation.came_late

    # ---- a batch -------------------------------------------------------------------------------------------------

    def push(self, step: Step, grad: Tensor | None) -> None:
        """Push the mean gradient f32[P] of a batch, and put the next view into the model.

        Without a gradient, no parameter makes a step. With a ``sync_period``, this is a local step between two pushes.
        Raises EditedError if the push cannot carry an edit of the parameters.
        """
        self.batches.end(step.batch)
        if self.pipeline is not None:
            self.pipeline.wait_for_device()
        ended = perf_counter()
        self._local_steps += 1
        if self._local_steps < self.sync_period and self.batches.any:
            self._step_locally(step, grad)
        else:
            self._local_steps = 0
            if self.conversation is not None:
                self._exchange(self.conversation, step, grad)
            self._share()
        self._measure(ended)

    def move(self, step: Step, grad: Tensor) -> None:
        """Make one of several steps on a batch, on this worker alone. The push that ends the batch includes it.

        That push comes without a gradient of its own.
        """
        self._step_locally(step, grad)

    def skip(self, batch: int, lr: Sequence[float]) -> None:
        """Count ``batch`` as used without a step, and push nothing for it."""
        if self._local_steps:
            self.push(Step(batch, tuple(lr), 0, None), None)
            return
        self.batches.end(batch)
        self._end_pipeline()
        self._ask_for_view(lambda core: core.pull(skipped=(batch,)))

    def is_edited(self) -> bool:
        """Return whether the script has changed parameters since the last step; only the rank that speaks can tell."""
        return self.conversation is not None and self.conversation.core.edit(self.flat.params) is not None

    def _step_locally(self, step: Step, grad: Tensor | None) -> None:
        if self.conversation is not None:
            self.conversation.core.local_step(step, grad, self.flat.params)
        if not self.replicated:
            self.group.broadcast(params=self.flat.params)
        self.flat.show_params()

    def _exchange(self, conversation: Conversation, step: Step, grad: Tensor | None) -> None:
        """Push ``step``, and take the answer's view or, in a pipeline, the view that was fetched ahead."""
        core, params = conversation.core, self.flat.params
        edit = self._carried_edit(conversation)
        fetched = self._end_pipeline()
        others = () if fetched is None else tuple(other for other in fetched.leases if other != step.batch)
        if fetched is not None and conversation.came_late:
            self._take(fetched)
        elif self.pipeline is not None and fetched is not None and others and not fetched.done and edit is None:
            push = core.push(step, grad, params, wants_view=False)
            self._take(replace(fetched, leases=others))
            self.pipeline.begin(push)
        else:
            push = core.push(step, grad, params, edit=edit)
            self._take(conversation.ask(push, Parameters))
            if edit is not None and not core.applied:
                params.add_(edit)  # the next push carries the edit

    def _carried_edit(self, conversation: Conversation) -> Tensor | None:
        """Return what the script has changed in the parameters since the last step, if the push is to carry it.

        If pushes are gradients, hand the change to the link instead, and return None.
        """
        edit = conversation.core.edit(self.flat.params)
        if edit is None or conversation.core.rule.pushes != "gradient":
            return edit
        conversation.link.edit(edit)
        return None

    def _end_pipeline(self) -> Parameters | None:
        return None if self.pipeline is None else self.pipeline.end()

    def _measure(self, ended: float) -> None:
        """Count the time since the last call as computing, until the batch ``ended``, and then as exchanging."""
        if self.pipeline is None and self.conversation is not None:
            ended = max(ended, self.conversation.ready_at)
        self.metrics.computing_s += ended - self._since
        self._since = perf_counter()
        self.metrics.exchanging_s += self._since - ended
        self._note_spent()

    def _count(self) -> float:
        """Return the seconds since the last call, which the caller adds to one of the times in the metrics."""
        since, self._since = self._since, perf_counter()
        return self._since - since

    def _note_spent(self) -> None:
        if self.conversation is not None:
            self.conversation.core.spent = self.metrics.spent

    def reading(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the ``batches`` of a data loader, and count the time until each is there as reading."""
        iterator = iter(batches)
        while True:
            self.metrics.computing_s += self._count()
            batch = next(iterator, END)
            self.metrics.reading_s += self._count()
            if batch is END:
                return
            yield cast(Batch, batch)

    # ---- the run, from joining to closing ------------------------------------------------------------------------

    def join(self, bring_params: bool, untrained: Tensor | None = None) -> None:
        """Enter the run. Returns when training starts; the first view is then in the model.

        The worker that brings its parameters also brings ``untrained`` f32[U], which its model holds beside them.
        """
        self._ask_for_view(
            lambda core: core.join(core.staging.lift(self.flat.params) if bring_params else None, untrained)
        )
        self._since = perf_counter()  # the wait for the others, before training begins, is not counted

    def fetch_untrained(self) -> Tensor:
        """Fetch what worker 0 brought beside its parameters, f32[U]; only the rank that speaks can ask."""
        assert self.conversation is not None
        self._end_pipeline()
        return self.conversation.ask(self.conversation.core.fetch(), Fetched).untrained

    def pull(self) -> None:
        """Wait until this worker gets batches, or no batches are left for any worker."""
        self.metrics.computing_s += self._count()
        self._end_pipeline()
        self._ask_for_view(lambda core: core.pull())
        self.metrics.waiting_s += self._count()
        self._note_spent()

    def leave(self, stop: str = "") -> None:
        """Give back, and put the trained model (θ and the mean batch-norm buffers) into every rank's model.

        ``stop``, if given, is the reason why the run ends for all workers. A worker that came late gets no model,
        because nobody has it any more.
        """
        self._end_pipeline()
        self.flat.bring_home()
        if self.came_late:
            return
        self.metrics.computing_s += self._count()
        self._note_spent()
        buffers = self.flat.buffers()
        if self.group.size > 1:
            handle = self.group.sum_async(buffers, "buffers")
            self.group.wait(handle)
            buffers /= self.group.size
        if self.conversation is not None:
            core = self.conversation.core
            final = self.conversation.ask(core.leave(buffers, core.edit(self.flat.params), stop), Final)
            self.flat.params.copy_(final.params)
            buffers, self.metrics.diverged = final.buffers, final.diverged
            self.metrics.version, self.metrics.refused_pushes = final.version, self.conversation.refused_pushes
        if not self.replicated:
            self.group.broadcast(params=self.flat.params, buffers=buffers)
        self.flat.show_params()
        self.flat.load_buffers(buffers)

    def report(self, figures: dict[str, float | str | None]) -> None:
        """Send figures for summary.json from the rank that speaks. Raises RefusedError if the run has too many."""
        if self.conversation is not None:
            reply = self.conversation.send(self.conversation.core.report(figures))
            if isinstance(reply, Refusal) and reply.reason == TOO_MANY_REPORTED:
                raise RefusedError(f"the server refused danaz.report: {reply.reason}")

    def close(self, in_good_order: bool) -> None:
        """Close the link. Say good-bye first if ``in_good_order``: then the worker has left before its process ends."""
        if self.pipeline is not None:
            self.pipeline.close()
        if self.conversation is not None:
            if in_good_order:
                self.conversation.send(self.conversation.core.bye())
            self.conversation.link.close()

    # ---- one view for all ranks ----------------------------------------------------------------------------------

    def _ask_for_view(self, make_request: Callable[[WorkerCore], Join | Pull]) -> None:
        """Let the rank that speaks make a request, and put the view that answers it into every rank's model."""
        self.flat.bring_home()
        if self.conversation is not None:
            core, params = self.conversation.core, self.flat.params
            edit = core.edit(params)
            self._take(self.conversation.ask(make_request(core), Parameters))
            if edit is not None:
                params.add_(edit)  # keep the script's change under the new view; a push will carry it
        self._share()

    def _take(self, reply: Parameters) -> None:
        """Put the news and the view of ``reply`` where all ranks get them from.

        A worker that was asked to end finishes the batches that it has begun, and begins no more.
        """
        assert self.conversation is not None
        if self.is_asked_to_end() and not reply.done:
            self.ends_early = True
            reply = replace(reply, leases=tuple(self.batches.begun_of(reply.leases)))
        self._pack(reply)
        if not self.came_late:
            self.conversation.core.compute_on(self.flat.params)

    def _share(self) -> None:
        """Let all ranks go on with rank 0's view; a pipeline fetches the next view while they compute."""
        if not self.replicated:
            self.group.broadcast(view_and_news=self._view_and_news)
        self.flat.show_params()
        self._unpack()
        if self.pipeline is not None and not self.pipeline.busy and self.batches.any and not self.done:
            self.pipeline.begin(None)

    def _pack(self, reply: Parameters) -> None:
        gap = nan if reply.gap is None else reply.gap
        ending = CAME_LATE if self.came_late else ENDS_EARLY * self.ends_early
        head = [reply.version, reply.epoch, reply.lag, gap, reply.done, ending, len(reply.leases)]
        assert len(head) == NEWS
        self._heard = [*head, *reply.leases]
        if self._news is not None:
            news = torch.tensor(self._heard, dtype=torch.float64)
            self._news[: len(news)].copy_(news, non_blocking=True)

    def _unpack(self) -> None:
        metrics = self.metrics
        if self.conversation is not None:
            metrics.refused_pushes = self.conversation.refused_pushes
        else:
            assert self._news is not None
            self._heard = self._news.tolist()
        version, epoch, lag, gap, done, ending, count, *leases = self._heard
        metrics.version, metrics.epoch, metrics.lag = int(version), epoch, int(lag)
        metrics.gap = None if isnan(gap) else gap
        self.ends_early, self._heard_too_late = ending == ENDS_EARLY, ending == CAME_LATE
        self.done = bool(done) or self.ends_early
        self.batches.replace([int(batch) for batch in leases[: int(count)]])
