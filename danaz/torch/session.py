"""One process's part in a run, from ``init`` to its end. The functions of danaz.torch call it."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil, inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from danaz.files.seeds import derive_seed
from danaz.optimizers import Optimizers, Own
from danaz.protocol.messages import Plan
from danaz.rules import find_algorithm
from danaz.run.milestones import reach
from danaz.run.rates import effective_lr
from danaz.run.settings import RankInfo, Settings
from danaz.run.signals import note_ending_signals
from danaz.torch.carried import UnsupportedOptimizerError, together, warn_if_not_nesterov
from danaz.torch.data import Portion, UnsupportedLoaderError, read_ahead
from danaz.torch.ending import ModelWatch, exit_unfinished, say
from danaz.torch.evaluating import EvaluationError, Evaluations, check_at
from danaz.torch.exchange import Verdict
from danaz.torch.joining import (
    Membership,
    current_epoch,
    enter,
    machines_per_batch,
    make_membership,
    newest_params,
    of_each_rank,
)
from danaz.torch.joint import JointOptimizer
from danaz.torch.leased import EpochLoaders, LeasedLoader, lengths_of
from danaz.torch.loop import Counted, Item, Loop, LoopError
from danaz.torch.optimizer import DistributedOptimizer
from danaz.torch.optimizer_state import OptimizerState, Rows, StateAtHand, same_state
from danaz.torch.samplers import check_alike, has_distributed_sampler
from danaz.torch.saving import Saved, SavedFileError, check_extra, read, values_of, write
from danaz.torch.schedulers import follow
from danaz.torch.stream import Part, Stream, open_stream
from danaz.vectors.cutting import Spans
from danaz.worker import between
from danaz.worker.core import Step
from danaz.worker.group import Group, make_group
from danaz.worker.worker import Worker


class NotInitializedError(RuntimeError):
    """Something that must come before this call has not been called."""


class Session:
    """What one process knows and does in a run.

    It comes to know more as the script goes on: the optimizer when the script wraps it, its membership in the run with
    the first batch, and the trained model when it has ``finished``.
    """

    def __init__(self, settings: Settings, place: RankInfo, group: Group | None = None):
        """Without a ``group``, it is the world that this process was launched into."""
        self.settings = settings
        self.place = place
        self.group = group or make_group(settings.collective)
        self._seed: int | None = settings.seed  # seed for the order of the samples; None: torch's seed
        self._optimizer: JointOptimizer | None = None
        self._wrappers: list[DistributedOptimizer] = []  # what the script has instead of its optimizers
        self._membership: Membership | None = None
        self._as_counted = Plan(1, 1)  # the plan of the run, in batches as the script counts them
        # The script's loops.
        self.loop = Loop()
        self.epochs = 1
        self._lengths: tuple[int, ...] = ()  # the batches of each epoch as the script has said, if it has
        self.in_loop = False  # whether the script is in its loop over batches
        self._epoch = 0  # the epoch that the loop over batches is in
        self._loaders = EpochLoaders(machines_per_batch(settings, place))
        self._order_seed = 0  # the seed of the run's order of samples, once it has begun
        self._agreed: set[int] = set()  # the epochs whose order is the same on all ranks of this worker
        # The batches.
        self._portion: Portion | None = None  # this rank's part of the batch that is being computed
        self.own_batches = 0  # number of batches that this process has computed
        # The end.
        self._leaves_early = False  # whether the ranks have agreed to leave a run that has batches left
        self.finished = False  # whether this process has left the run in good order
        self._watch = ModelWatch(on_use=self._end_if_left)
        self._evaluations = Evaluations(self.group)
        self._pid = os.getpid()
        reach("init")
        atexit.register(self.close)

    @property
    def is_main(self) -> bool:
        """See danaz.torch.is_main."""
        return self.place.worker == 0 and self.group.rank == 0

    @property
    def optimizer(self) -> JointOptimizer:
        """All optimizers of the script."""
        if self._optimizer is None:
            raise NotInitializedError("wrap the optimizer first: danaz.DistributedOptimizer(optimizer, model)")
        return self._optimizer

    @property
    def _member(self) -> Membership:
        if self._membership is None:
            raise NotInitializedError(
                "nothing is known of the run yet: it begins with the first batch of danaz.shard, or step of danaz.steps"
            )
        return self._membership

    @property
    def worker(self) -> Worker:
        return self._member.worker

    @property
    def _has_begun(self) -> bool:
        """Whether this process has entered the run."""
        return self._membership is not None

    @property
    def _is_only_worker(self) -> bool:
        """Whether this worker makes every update. In an all-reduce world, all machines together are one worker."""
        return self.place.server is None or self.settings.workers == 1

    # ---- before the run --------------------------------------------------------------------------------------------

    def choose_seed(self, seed: int | None) -> None:
        """Choose the seed that decides the order of the samples. None leaves it to torch's seed. Raises ValueError."""
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ValueError(f"danaz.init takes a seed that is a whole number from 0 up, not {seed!r}")
        if self.place.launched and seed is not None and seed != self.settings.seed:
            raise ValueError(
                f"danaz.init(seed={seed}) in a run that was launched with seed {self.settings.seed}, which decides the "
                f"order of the samples for all its processes: launch it with --seed {seed}, or give init no seed"
            )
        self._seed = self.settings.seed if self.place.launched else seed

    def _seed_for(self, loader: DataLoader[Any]) -> int:
        if self._seed is not None:
            return self._seed
        if has_distributed_sampler(loader):
            return 0  # it has a seed of its own
        return torch.initial_seed() if loader.generator is None else loader.generator.initial_seed()

    def adopt(self, optimizer: DistributedOptimizer) -> None:
        """Let this session carry out the steps of ``optimizer``, together with those of the optimizers before.

        Raises NotInitializedError once the run has begun, UnsupportedOptimizerError for optimizers that the algorithm
        cannot carry out, and ValueError for parameters that two of them hold.
        """
        if self._has_begun:
            raise NotInitializedError(
                "danaz.DistributedOptimizer was called after the first batch, but the cluster lays the parameters out "
                "once. Wrap all optimizers before the loop; one that makes no step on a batch moves nothing."
            )
        wrappers = [*self._wrappers, optimizer]
        joint = optimizer.joint if len(wrappers) == 1 else self._join_optimizers(wrappers)
        if reason := find_algorithm(self.settings.algorithm).refusal(joint.optimizers):
            raise UnsupportedOptimizerError(reason)
        self._optimizer, self._wrappers = joint, wrappers
        joint.connect(self)
        reach("optimizer")

    def _join_optimizers(self, wrappers: list[DistributedOptimizer]) -> JointOptimizer:
        """Let all these optimizers make one update together."""
        if any(each.member.passes > 1 for each in wrappers):
            raise UnsupportedOptimizerError(
                "backward_passes_per_step is more than 1, which only a script with one optimizer can have: the passes "
                "of several optimizers cannot be told apart. Leave it out; the result is the same."
            )
        found = [each.optimizers for each in wrappers]
        optimizers = together(found, make_own_steps=self._makes_every_update)
        members = [each.member for each in wrappers]
        for each in wrappers:
            each.joint.exchange.close()
        joint = JointOptimizer(members, optimizers, self.group, replicated=self.place.server is None)
        for each in wrappers:
            each.joint = joint
            each.hand_over_loaded()
        return joint

    @property
    def _makes_every_update(self) -> bool:
        """Whether the algorithm has one optimizer state, and its updates are made in this process."""
        algorithm = find_algorithm(self.settings.algorithm)
        if self.place.server is not None or not algorithm.takes_own:
            return False
        rule = algorithm.rule(optimizer=Optimizers([Own()]))
        return rule.all_reduce or rule.max_workers == 1

    # ---- the loop over epochs --------------------------------------------------------------------------------------

    def run_epochs(self, count: int, batches: Sequence[int] | Callable[[int], int] | None = None) -> Counted[int]:
        """See danaz.torch.epochs."""
        self.loop.begin(count, f"danaz.epochs({count})")
        self.epochs = count
        self._lengths = () if batches is None else lengths_of(count, batches)
        return Counted(self._epochs(), lambda: count)

    def _epochs(self) -> Iterator[int]:
        first = min(current_epoch(self.place, self.group), self.epochs - 1)
        try:
            yield from self.loop.epochs(first, lambda: self._is_over)
        except GeneratorExit:
            # A break looks the same as an exception. Only if the script goes on and uses the model was it a break.
            if self._has_begun and not self.finished:
                self._watch.begin(self.optimizer.flat.model)
            raise
        self.finish()

    @property
    def _is_over(self) -> bool:
        """Whether this worker gets no more batches."""
        return self._leaves_early or (self._has_begun and self.worker.done)

    # ---- the loop over steps, whose batches the script draws itself ------------------------------------------------

    def run_steps(self, count: int, samples: int) -> Counted[int]:
        """See danaz.torch.steps."""
        return self._run_one_epoch("steps", count, samples, lambda: self._drawn_steps(count, samples))

    def run_stream(self, source: Iterable[Any], count: int, samples: int) -> Counted[Any]:
        """See danaz.torch.stream."""
        return self._run_one_epoch("stream", count, samples, lambda: self._batches_of_stream(source, count, samples))

    def _run_one_epoch(self, call: str, count: int, samples: int, steps: Callable[[], Iterator[Item]]) -> Counted[Item]:
        """Return the loop ``steps`` as the whole loop of a run, which ``call`` of danaz begins."""
        for name, number in (("number of steps", count), ("number of samples", samples)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"danaz.{call} takes the {name}, a whole number from 1 up, not {number!r}")
        self.loop.begin(1, f"danaz.{call}({count})")
        self.epochs = 1
        only_epoch = (item for epoch in self._epochs() for item in self.loop.batches(epoch, self, steps()))
        return Counted(only_epoch, lambda: ceil(count / self._machines_apart))

    @property
    def _machines_apart(self) -> int:
        """How many workers make steps of their own: all of them, but an all-reduce world makes each step together."""
        return 1 if self.place.server is None else self.settings.workers

    def _drawn_steps(self, count: int, samples: int) -> Iterator[int]:
        """Yield the number of each step that this worker is leased."""
        self._join_for_steps(count)
        for step in self._leased_steps():
            self._begin(Portion(step, samples * self.group.size, samples))
            yield step

    def _batches_of_stream(self, source: Iterable[Any], count: int, samples: int) -> Iterator[Any]:
        """Yield a batch of this rank's part of a stream for each step that this worker is leased."""
        if self.place.worker >= self.settings.workers:
            raise UnsupportedLoaderError(
                "this worker has joined a running job, and has no part of its stream, which is divided among the "
                f"{self.settings.workers} workers that the run began with. Begin the run with more workers."
            )
        self._join_for_steps(count)
        stream = self._open_stream(source, count, samples)
        batches = self.worker.reading(stream.batches)
        for step in self._leased_steps():
            delivery = next(batches, None)
            if delivery is None:
                self.stop(f"the stream of worker {self.place.worker} came to its end")
                return
            self._begin(Portion(step, stream.samples, stream.here, delivery.first))
            yield delivery.content

    def _open_stream(self, source: Iterable[Any], count: int, samples: int) -> Stream:
        """Open this rank's part of a stream, after what the worker has read of it if all are equally fast."""
        share = self._member.share
        all_reduce = self.place.server is None
        worker = Part(share.worker, share.workers) if all_reduce else Part(self.place.worker, self.settings.workers)
        done = round(self.epoch * count) // self._machines_apart
        return open_stream(source, worker.split(share.rank, share.ranks), share, self._order_seed, done, samples)

    def _join_for_steps(self, count: int) -> None:
        if not self._has_begun:
            self._order_seed = torch.initial_seed() if self._seed is None else self._seed
            self._join(Plan(count, 1), 1, Plan(count, 1))

    def _leased_steps(self) -> Iterator[int]:
        """Yield the number of each step that this worker is leased."""
        self._epoch = 0
        try:
            self.in_loop = True
            while self._has_more_in(0):
                while self.worker.batches.waiting and not self._is_cut_short:
                    yield self.worker.batches.begin()
        finally:
            self.in_loop = False

    def seed_for(self, step: int) -> int:
        """See danaz.torch.seed_for."""
        return derive_seed(self._order_seed, step, self.worker.group.rank)

    # ---- the loop over batches -------------------------------------------------------------------------------------

    def run_batches(self, loader: DataLoader[Any], epoch: int, *beside: DataLoader[Any]) -> Counted[Any]:
        """See danaz.torch.shard."""
        batches = self.loop.batches(epoch, loader.dataset, self.shard(loader, epoch, *beside))
        return Counted(batches, lambda: self._expected(loader, epoch, beside))

    def _expected(self, loader: DataLoader[Any], epoch: int, beside: Sequence[DataLoader[Any]]) -> int:
        """Return the number of batches that this worker computes in an epoch if all workers are equally fast."""
        machines = machines_per_batch(self.settings, self.place)
        return ceil(self._leased(loader, beside).order.count(epoch) * machines / self.settings.workers)

    def shard(self, loader: DataLoader[Any], epoch: int, *beside: DataLoader[Any]) -> Iterator[Any]:
        """Yield this rank's part of each batch of ``epoch`` that the worker is leased. The first call joins the run."""
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "danaz.shard was iterated under torch.no_grad(), where nothing can be trained; to evaluate, iterate "
                "the loader itself"
            )
        self._epoch = epoch
        leased = self._leased(loader, beside)
        if not self._has_begun:
            self._order_seed = leased.seed
            self._join(leased.plan(self.epochs, self._lengths, epoch), read_ahead(loader), self._counted(leased, epoch))
            self._warn_of_idle_ranks(leased.samples_of_first_batch(epoch))
            if self.group.rank == 0:
                leased.warn_of_distributed_sampler()
        self._loaders.begin(epoch, leased, may_differ=bool(self._lengths))
        leased.double(self._member.plan, self._member.share, self._take)[0].check_count(epoch)
        try:
            self.in_loop = True
            while self._has_more_in(epoch):
                yield from self._batches_of(self._loaders.choose(epoch, int(self._next_epoch)))
        finally:
            self.in_loop = False

    def _batches_of(self, leased: LeasedLoader | None) -> Iterator[Any]:
        """Yield this rank's part of the batches that wait and are of this loader; without one, skip the first."""
        if leased is None:
            batch = self.worker.batches.begin()
            say(f"batch {batch} of an epoch whose loader this process does not have is left out")
            self._begin(Portion(batch, 1, 1))
            self._pass_over_unstepped()
            return
        sampler, batches = leased.double(self._member.plan, self._member.share, self._take)
        try:
            for batch in self.worker.reading(batches):
                if self._is_cut_short:
                    break
                self._begin(sampler.portions.popleft())
                yield batch
        finally:
            # If the script left the loop, the loader has read ahead: those batches come first in the next loop.
            self.worker.batches.put_back([portion.batch for portion in sampler.portions])
            sampler.portions.clear()

    def _leased(self, loader: DataLoader[Any], beside: Sequence[DataLoader[Any]]) -> LeasedLoader:
        return self._loaders.made_of(loader, beside, self._order_seed if self._has_begun else self._seed_for(loader))

    def _counted(self, leased: LeasedLoader, epoch: int) -> Plan:
        """Return the plan of the run in batches as the script counts them."""
        return Plan.of(self._lengths) if self._lengths else Plan(leased.length(epoch), self.epochs)

    def _join(self, plan: Plan, ahead: int, as_counted: Plan) -> None:
        """Join the run. By now the model, the optimizer and the data are known.

        ``ahead`` is the number of batches that the loader reads ahead.
        """
        optimizer = self.optimizer
        self._membership = make_membership(self.settings, self.place, self.group, optimizer, plan, ahead)
        self._as_counted = as_counted
        loaded = self._loaded_state()
        enter(self.worker, optimizer.flat, self.place)
        if loaded is not None and self.worker.metrics.version == 0:  # else it is a run that goes on
            self._state_at_hand.begin_with(loaded)
        both = [each for wrapper in self._wrappers for each in (wrapper, wrapper.wrapped)]
        follow(both, self, one_worker=self._is_only_worker)
        self._say_what_becomes_of_optimizers()
        reach("shard")
        if self.place.guest:
            self.worker.is_asked_to_end = note_ending_signals()

    def _say_what_becomes_of_optimizers(self) -> None:
        """Warn, on the main process, if the optimizers' steps are made in another way than torch makes them."""
        joint = self.optimizer
        if not self.is_main:
            return
        if not joint.makes_own_steps:
            for member in joint.members:
                warn_if_not_nesterov(member.wrapped)
        if len(joint.members) > 1 and not self.moves_at_once:
            warnings.warn(
                f"the script has {len(joint.members)} optimizers, and {self.settings.algorithm} moves all their "
                "parameters together, after the last of their steps on a batch: the second gradient is computed before "
                "the first optimizer has moved. Under dana without a pipeline, under ssgd, and in a process alone, "
                "each moves at its own step, as in torch.",
                stacklevel=2,
            )

    def _warn_of_idle_ranks(self, samples: int) -> None:
        """Warn if some ranks get no samples of a batch, which has ``samples``.

        Batch norm cannot train on one sample. If each rank would get only one, fewer ranks get two samples instead.
        """
        share = self._member.share
        here = share.ranks_at_work(samples)
        if self.group.rank == 0 and here < share.ranks:
            warnings.warn(
                f"only {here} of this worker's {share.ranks} ranks get samples: the worker's ranks share each batch of "
                "batch_size samples, and batch norm needs two on each rank. Raise the loader's batch_size.",
                stacklevel=2,
            )

    def _take(self) -> int | None:
        """Begin the next leased batch for the loader in use, and return its number; None if there is none."""
        return self.worker.batches.begin() if self._loaders.reads(self._next_epoch) else None

    def _has_more_in(self, epoch: int) -> bool:
        """Return whether a batch of this epoch, or one left over from before, is at hand. Wait for one if necessary."""
        self._pass_over_unstepped()
        if not self.worker.batches.waiting and not self._is_over:
            self.worker.pull()
        return not self._is_cut_short and self._next_epoch <= epoch

    @property
    def _is_cut_short(self) -> bool:
        """Whether the run has ended, although batches may be left that were read ahead."""
        return self._leaves_early or (self.worker.done and not self.worker.batches.any)

    @property
    def _next_epoch(self) -> float:
        """The epoch of the batch that waits first; infinite if none waits."""
        waiting = self.worker.batches.waiting
        return self._member.plan.place_of(waiting[0])[0] if waiting else inf

    # ---- one batch -------------------------------------------------------------------------------------------------

    def _begin(self, portion: Portion) -> None:
        self._evaluations.check_none_under_way()
        self._pass_over_unstepped()
        self._portion = portion
        self.optimizer.begin_batch(portion.weight)

    def _pass_over_unstepped(self) -> None:
        """If the loop went on from a batch without a step, count that batch as used, on all ranks alike."""
        if self._portion is not None:
            self.optimizer.pass_over()

    def is_edited(self) -> bool:
        """See Updates."""
        return self.worker.is_edited()

    @property
    def moves_at_once(self) -> bool:
        """See Updates."""
        return self._member.moves_at_once

    def move(self, grad: Tensor, absent: Spans, verdict: Verdict) -> None:
        """See Updates."""
        self._check_batch()
        assert self._portion is not None
        lr = tuple(self.applied_lr(verdict.lr))
        self.worker.move(Step(self._portion.batch, lr, 0, verdict.loss, absent, ends_batch=False), grad)

    def push(self, grad: Tensor | None, absent: Spans, verdict: Verdict) -> None:
        """See Updates."""
        portion = self._end_batch()
        self._agree_on_order(portion)
        # Each rank may have made its own edit. What it has done between the moves of a batch is seen by nobody.
        if self.worker.replicated and (verdict.edited or (grad is None and self.group.size > 1)):
            self.group.broadcast(edited_params=self.optimizer.flat.params)
        lr = tuple(self.applied_lr(verdict.lr))
        self.worker.push(Step(portion.batch, lr, portion.samples, verdict.loss, absent, portion.order), grad)
        self._average_buffers_after(portion.batch)

    def _agree_on_order(self, portion: Portion) -> None:
        """Raise OrderError if the ranks of this worker do not have the same order in the epoch of a batch."""
        epoch, _ = self._member.plan.place_of(portion.batch)
        if self.group.size > 1 and epoch not in self._agreed:
            check_alike(of_each_rank(self.group, portion.order), epoch)
            self._agreed.add(epoch)

    def skip(self) -> None:
        """See Updates."""
        batch = self._end_batch().batch
        self.worker.skip(batch, self.applied_lr(self.optimizer.rates))
        self._average_buffers_after(batch)

    def _average_buffers_after(self, batch: int) -> None:
        """Average the ranks' buffers if ``batch`` was the last of its epoch that the worker holds.

        The script may evaluate next. All ranks have made this push together, and hold the same batches. At the end of
        the loop they may be apart, because one of them has called ``stop``.
        """
        place_of = self._member.plan.place_of
        if all(place_of(held)[0] > place_of(batch)[0] for held in self.worker.batches.held):
            self._evaluations.buffers.average(self.optimizer.flat)

    def end(self) -> None:
        """See Updates."""
        self._end_batch()
        self._leaves_early = True

    def _end_batch(self) -> Portion:
        self._evaluations.check_none_under_way()
        self._check_batch()
        portion, self._portion = self._portion, None
        assert portion is not None
        self.own_batches += 1
        return portion

    def _check_batch(self) -> None:
        """Raise RuntimeError if no batch is under way."""
        if self._portion is None and self.finished:
            raise RuntimeError(
                "optimizer.step() was called after the end of the run; after danaz.stop(reason), leave the loop"
            )
        if not self._has_begun:
            raise RuntimeError(
                "optimizer.step() was called outside of danaz.shard, which knows the batches of this process: write "
                "`for epoch in danaz.epochs(N):` and, within it, `for batch in danaz.shard(loader, epoch):` in place "
                "of the loops over epochs and over the loader"
            )
        if self._portion is None:
            raise RuntimeError(
                "optimizer.step() was called twice for one batch, or outside of danaz.shard: call it once for each "
                "batch of danaz.shard, before the next one is taken. Nothing around danaz.shard may read ahead; let "
                "the loader do it, by num_workers and pin_memory"
            )

    def applied_lr(self, lr: list[float]) -> list[float]:
        """See Updates."""
        warmed_up = partial(
            effective_lr,
            epoch=self.epoch,
            workers=self.settings.workers,
            warmup_epochs=self.settings.warmup_epochs,
        )
        scales = self._member.lr_scale
        return [warmed_up([rate], scale=scale)[0] for rate, scale in zip(lr, scales, strict=True)]

    # ---- evaluation in mid-run -------------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self, model: nn.Module, at: str, together: bool) -> Iterator[None]:
        """See danaz.torch.evaluating."""
        check_at(at)
        self._end_if_left()
        flat, buffers = self.optimizer.flat, self._evaluations.buffers
        trained = set(map(id, flat.trained))
        if not any(id(parameter) in trained for parameter in model.parameters()):
            raise ValueError(
                "danaz.evaluating was given a model without any parameter that DistributedOptimizer trains"
            )
        params = self._params_of_server(together) if at == "server" and not self.finished else None
        if together:
            between.barrier(self.group, "danaz.evaluating(together=True)")
            buffers.average(flat)
        with self._evaluations.evaluating(model, flat, params, buffers.of(flat)):
            yield

    def _params_of_server(self, together: bool) -> Tensor:
        if self.worker.conversation is None and not together:
            raise EvaluationError(
                "danaz.evaluating(at='server') was entered by a rank that has no connection to the server. Enter it on "
                "the worker's first rank, within `if danaz.rank() == 0:` or `if danaz.is_main():`, or on all ranks "
                "with together=True"
            )
        params = None if self.worker.conversation is None else newest_params(self.place, self.worker)
        if together and not self.worker.replicated:
            params = between.broadcast(self.group, params)
        assert params is not None
        return params

    # ---- the optimizer's state, and the script's own checkpoints ---------------------------------------------------

    @property
    def _state_at_hand(self) -> StateAtHand:
        return StateAtHand(self.worker, self._member.rule, self.optimizer.param_groups)

    def state_rows(self) -> Rows | None:
        """See Updates."""
        if not self._has_begun:
            return None
        state = self._state_at_hand.read()
        return {} if state is None else self._state_at_hand.rows(state)

    def _loaded_state(self) -> OptimizerState | None:
        """Return the state that this rank is to begin with, and put the view that goes with it into the model.

        In an all-reduce world, it is rank 0's on every rank. Elsewhere, only worker 0 begins with it: every worker's
        momentum is added to the look-ahead, and it is there once.
        """
        loaded, at_hand, state = self._loaded_rows(), self._state_at_hand, None
        if loaded is not None and self.is_main:
            state = at_hand.state_of(loaded[0], self.applied_lr(loaded[1]))
            if state is None:
                warnings.warn(
                    f"the optimizer's state is not taken over: under {self.settings.algorithm} it is on the server. "
                    "The run begins with the parameters, and without momentum.",
                    stacklevel=2,
                )
        if self.place.server is None:
            state = same_state(self.group, state, self.optimizer.flat.params.device)
        if state is not None:
            self.optimizer.flat.params.copy_(at_hand.view_of(state))
        return state

    def _loaded_rows(self) -> tuple[Rows, list[float]] | None:
        """Return what the script has loaded into its optimizers, in torch's form, and the rates; None if nothing."""
        if all(each.loaded is None for each in self._wrappers):
            return None
        rows: Rows = {}
        rates: list[float] = []
        for each in self._wrappers:
            own, own_rates = each.loaded or ({}, each.rates)
            first = self.optimizer.numbers_of(each.member).start
            rows |= {first + number: row for number, row in own.items()}
            rates += own_rates
        return rows, rates

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        """See danaz.torch.save."""
        check_extra(extra)
        self._end_if_left()
        if not self.is_main:
            return
        optimizer, params, buffers = self.optimizer, None, self._evaluations.buffers
        optimizer.flat.bring_home()
        state = self._state_at_hand.read() if self._has_begun else None
        if state is not None and not self._evaluations.shows_others(optimizer.flat):
            params = self._state_at_hand.params_of_torch(state, self.finished)
        of_optimizers = [each.state_dict() for each in self._wrappers]
        with self._evaluations.evaluating(optimizer.flat.model, optimizer.flat, params, buffers.of(optimizer.flat)):
            of_models = [values_of(model) for model in optimizer.models]
        saved = Saved(
            epoch=self.loop.reached,
            progress=self.epoch,
            version=self.worker.metrics.version if self._has_begun else 0,
            seed=self._seed,
            algorithm=self.settings.algorithm,
            has_optimizer_state=any(bool(each["state"]) for each in of_optimizers),
            extra=extra,
        )
        write(path, of_models, of_optimizers, saved)

    def load(self, path: Path) -> Saved:
        """See danaz.torch.load."""
        if self._has_begun and not self.finished:
            raise LoopError(
                "danaz.load was called in mid-run: call it before the first batch, to begin from the file, or after "
                "the run. To go back to better parameters in mid-run, call model.load_state_dict(…)"
            )
        models, optimizers, saved = read(path)
        for name, found, expected in (
            ("models", models, self.optimizer.models),
            ("optimizers", optimizers, self._wrappers),
        ):
            if len(found) != len(expected):
                raise SavedFileError(f"{path} holds {len(found)} {name}, and this script has {len(expected)}")
        for model, values in zip(self.optimizer.models, models, strict=True):
            model.load_state_dict(values)
        for optimizer, state in zip(self._wrappers, optimizers, strict=True):
            if not self.finished:
                optimizer.load_state_dict(state)
        return saved

    # ---- the clock of the script's schedulers (see schedulers.Clock) -----------------------------------------------

    @property
    def epoch(self) -> float:
        """The cluster's epoch, as this worker last heard."""
        return self.worker.metrics.epoch if self._has_begun else 0.0

    @property
    def epochs_over(self) -> int:
        return self._epoch

    @property
    def ticks(self) -> float:
        return self._as_counted.batches_until(self.epoch)

    # ---- the end ---------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """See danaz.torch.stop."""
        if self.finished:
            return
        if not self._has_begun:
            raise NotInitializedError(
                "danaz.stop was called before the run began; it begins with the first batch of danaz.shard"
            )
        self._leave(reason or "the script asked for it")

    def finish(self) -> None:
        """See danaz.torch.finish."""
        if self._has_begun and not self.finished:
            self._leave("")

    def _leave(self, stop: str) -> None:
        """Leave the run in good order, with all ranks of this worker. ``stop`` is the reason to end it for everyone."""
        if self._never_stepped and self._knows_that_nobody_trained:
            raise RuntimeError(
                "optimizer.step() was never called, so nothing was trained. Call it once for each batch of "
                "danaz.shard, on the optimizer that danaz.DistributedOptimizer returned."
            )
        self._evaluations.end()
        self._agree_to_end()
        self.worker.leave(between.first_text(self.group, stop) if self._leaves_early else "")
        reach("finish")
        if self.worker.came_late:
            if self.group.rank == 0:
                say("the run was complete before this worker came; there is nothing left to do")
            raise SystemExit(0)  # without the trained model, the rest of the script is of no use
        self.finished = True
        self._portion = None
        self._watch.end()
        if self.worker.ends_early:
            raise SystemExit(128 + signal.SIGTERM)  # the code after the script's loop is meant for a run that is over

    @property
    def _never_stepped(self) -> bool:
        """Whether the script has skipped every batch that this process was given."""
        return self.optimizer.was_passed_over and not self.optimizer.was_stepped

    @property
    def _knows_that_nobody_trained(self) -> bool:
        """Whether the run has made no update, as far as it has come.

        While other workers compute, one of them may have made an update that this worker has not heard of.
        """
        worker = self.worker
        saw_the_end = worker.done and not worker.ends_early and not worker.came_late
        return worker.metrics.version == 0 and (self._is_only_worker or saw_the_end)

    def _agree_to_end(self) -> None:
        """Bring all ranks to the point where they leave, although the others may be anywhere in their loops.

        This rank makes the steps that the others wait for, without samples of its own. It goes on until all ranks have
        heard, in the same step, that it asks to end. The update of that step is not made.
        """
        self.optimizer.exchange.asks_to_end = True
        self._leaves_early = self._leaves_early or (self.group.size == 1 and not self.worker.done)
        while not self._is_over:
            if self._portion is None and not self.worker.batches.any:
                self.worker.pull()
                continue
            if self._portion is None:
                self._begin(Portion(batch=-1, samples=1, here=0))
            self.optimizer.pass_over()

    def report(self, figures: dict[str, float | str | None]) -> None:
        """See danaz.torch.report."""
        self._end_if_left()
        if not self.finished:
            raise NotInitializedError(
                "danaz.report was called before the end of the run: it comes after the loop over danaz.epochs(), or "
                "after danaz.finish()"
            )
        self.worker.report(figures)

    def close(self) -> None:
        """Close the connections. The process calls this at its exit."""
        reach("leave")
        if self._has_begun:
            self.worker.close(in_good_order=self.finished)
        if self.finished:
            self.group.close()

    # ---- a script that did not come to the end ---------------------------------------------------------------------

    @property
    def _left(self) -> str:
        return f"the script left its loop in epoch {self.loop.reached} of {self.loop.count}"

    def _end_if_left(self) -> None:
        """End the run if the script has left its loop and goes on, and no exception is being handled."""
        if self.loop.was_left and self._has_begun and not self.finished and sys.exc_info()[1] is None:
            say(f"{self._left}; the run ends here for every worker. To say so, and why, call danaz.stop(reason) first.")
            self.stop(self._left)

    def end_process(self) -> None:
        """At the exit of the process, print a sentence and set an exit code if it would wrongly look like a success."""
        # An exception prints its own traceback. A process that was forked off is not the one that trains.
        if os.getpid() != self._pid or getattr(sys, "last_value", None) is not None:
            return
        missing = self._what_is_missing()
        if not missing:
            return
        say(f"{missing}.")
        try:
            if self._has_begun:
                self.stop(self._left)
        except (RuntimeError, OSError) as error:  # raised by the collective, the link or the server
            say(f"and it could not leave the run in good order: {error}.")
        self.close()
        exit_unfinished()

    def _what_is_missing(self) -> str:
        """Return what this process should have done before its end, but has not; empty if nothing is missing."""
        if self._has_begun:
            if self.finished or self.worker.came_late:
                return ""
            return (
                f"{self._left} and ended before the run was over. To end a run early, call danaz.stop(reason) in the "
                "loop"
            )
        if not self.place.launched:
            return ""  # a process alone need not train
        calls = {
            "danaz.DistributedOptimizer(optimizer, model)": self._optimizer is not None,
            "danaz.epochs(N)": self.loop.count is not None,
            "danaz.shard(loader, epoch)": False,
        }
        missing = ", ".join(call for call, is_made in calls.items() if not is_made)
        return f"the script ended without training: it calls danaz.init(), but never came to {missing}"
