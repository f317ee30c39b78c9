"""One process's part in a run. The functions of danaz.torch call it."""

from __future__ import annotations

import atexit
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from danaz.protocol.messages import Heartbeat, Inquire, Progress
from danaz.run.folder import RunFolder
from danaz.run.milestones import reach
from danaz.run.rates import effective_lr
from danaz.run.settings import RankInfo, Settings
from danaz.run.signals import note_ending_signals
from danaz.server.core import ServerCore
from danaz.serving.pace import telling
from danaz.torch.alone import LocalLink
from danaz.torch.data import Batching, LeaseSampler, Portion, Share, batching_of, read_ahead, rebuild
from danaz.torch.ending import Ending
from danaz.torch.loop import Counted, Loop
from danaz.torch.models import has_batch_norm
from danaz.torch.optimizer import DistributedOptimizer, Verdict, weight_decays
from danaz.torch.schedulers import follow
from danaz.vectors.flat import FlatModel, Spans
from danaz.vectors.untrained import Untrained
from danaz.worker.between import first_text
from danaz.worker.core import Role, WorkerCore
from danaz.worker.group import Group, make_group
from danaz.worker.link import DealerLink, Link
from danaz.worker.sharded import connect
from danaz.worker.staging import IN_PLACE, Staging, staging_for
from danaz.worker.worker import Worker


class NotInitializedError(RuntimeError):
    """Something that must come before this call has not been called."""


class Session:
    """What one process knows and does, from ``init`` to its end."""

    def __init__(self, settings: Settings, place: RankInfo):
        self.settings = settings
        self.place = place
        self.group: Group = make_group(settings.collective)
        self.epochs = 1
        self.loop = Loop()
        self.finished = False
        self._ends = False  # whether the ranks have agreed to leave a run that has batches left
        self._optimizer: DistributedOptimizer | None = None
        self._worker: Worker | None = None
        self._batching: Batching | None = None
        self._epoch = 0  # the epoch that the loop over batches is in
        self._portion: Portion | None = None  # this rank's part of the batch that is being computed
        self._share = Share()
        self._scales_lr = False
        self.in_loop = False  # whether the script is in its loop over batches
        self.own_batches = 0  # number of batches that this process has computed
        self._loader_batches = 1  # number of batches in an epoch, as the script's own loader counts them
        self._seed: int | None = None  # seed for the order of the samples; None: the settings' seed
        self._follows_torch = False  # whether to use torch's seed instead, as it is when training begins
        self._loader: tuple[DataLoader[Any], LeaseSampler, DataLoader[Any]] | None = None  # the user's, and its double
        self.ending = Ending(self, self._close)
        reach("init")
        atexit.register(self._close)

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            raise NotInitializedError("the run begins with the first `for batch in danaz.shard(loader, epoch)`")
        return self._worker

    @property
    def optimizer(self) -> DistributedOptimizer:
        if self._optimizer is None:
            raise NotInitializedError("wrap the optimizer first: danaz.DistributedOptimizer(optimizer, model)")
        return self._optimizer

    @property
    def has_optimizer(self) -> bool:
        return self._optimizer is not None

    @property
    def has_begun(self) -> bool:
        """Whether this process has entered the run. It enters with its first batch."""
        return self._worker is not None

    @property
    def came_late(self) -> bool:
        """Whether the run was over before this process entered it."""
        return self._worker is not None and self._worker.came_late

    @property
    def epoch(self) -> float:
        """The cluster's epoch, as this worker last heard."""
        return 0.0 if self._worker is None else self._worker.metrics.epoch

    @property
    def epochs_over(self) -> int:
        """See schedulers.Clock."""
        return self._epoch

    @property
    def ticks(self) -> float:
        """See schedulers.Clock."""
        return self.epoch * self._loader_batches

    @property
    def over(self) -> bool:
        """Whether this worker gets no more batches."""
        return self._ends or (self._worker is not None and self._worker.done)

    def choose_seed(self, seed: int | None) -> None:
        """Choose the seed that decides the order of the samples. None leaves it to torch's seed. Raises ValueError."""
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ValueError(f"danaz.init takes a seed that is a whole number from 0 up, not {seed!r}")
        if self.place.launched and seed is not None and seed != self.settings.seed:
            raise ValueError(
                f"danaz.init(seed={seed}) in a run that was launched with seed {self.settings.seed}, which decides the "
                f"order of the samples for all its processes: launch it with --seed {seed}, or give init no seed"
            )
        self._seed = None if self.place.launched else seed
        self._follows_torch = not self.place.launched and seed is None

    def _seed_for(self, loader: DataLoader[Any]) -> int:
        if self._follows_torch:
            return torch.initial_seed() if loader.generator is None else loader.generator.initial_seed()
        return self.settings.seed if self._seed is None else self._seed

    def adopt(self, optimizer: DistributedOptimizer) -> None:
        if self._optimizer is not None:
            raise NotInitializedError("danaz trains one model a process: DistributedOptimizer was made already")
        self._optimizer = optimizer
        optimizer.connect(self)
        reach("optimizer")

    # ---- joining -------------------------------------------------------------------------------------------------

    def _join(self, loader: DataLoader[Any]) -> None:
        """Enter the run with the first loader. By now the model, the optimizer and the data are known."""
        optimizer, ahead = self.optimizer, read_ahead(loader)
        rule = self.settings.for_server().rule(optimizer.momentum)
        ahead += rule.worker_rule.sync_period - 1
        pipelined = self.settings.pipeline and self.place.server is not None
        ahead += pipelined  # one more: the batch that is computed while the last one is pushed
        self._seed = self._seed_for(loader)
        self._follows_torch = False
        batching = batching_of(loader, self._machines_per_batch, self._seed)
        everyone_alike = self.place.server is None
        core, link = None, None
        if everyone_alike or self.group.rank == 0:
            role = Role(
                worker=0 if everyone_alike else self.place.worker,
                incarnation=self.place.incarnation,
                digest=self.settings.digest,
                momentum=optimizer.momentum,
                layout=optimizer.flat.layout,
                plan=batching.plan(self.epochs),
                ahead=ahead,
            )
            compressor = self.settings.compressor(role.layout)
            device = optimizer.flat.params.device
            # A server in this process keeps its vectors on the model's device.
            staging = IN_PLACE if self.place.server is None else staging_for(device, role.layout.size)
            core = WorkerCore(role, rule.worker_rule, device, staging, compressor, rule.push_moves_view)
            link = self._link(role, staging)
        self._batching = batching
        self._share = replace(self._share_of_batch(), least=2 if has_batch_norm(optimizer.flat.model) else 1)
        self._warn_of_idle_ranks(batching)
        self._scales_lr = rule.scales_lr
        self._worker = Worker(self.group, optimizer.flat, ahead, core, link, everyone_alike, pipelined)
        self._worker.sync_period = rule.worker_rule.sync_period
        self._enter(optimizer.flat)
        self._loader_batches = len(loader)
        one_worker = self.place.server is None or self.settings.workers == 1
        follow([optimizer, optimizer.wrapped], self, one_worker=one_worker)
        reach("shard")
        if self.place.guest:
            self._worker.is_asked_to_end = note_ending_signals()

    def _enter(self, flat: FlatModel) -> None:
        """Join the run, and give all ranks of all workers the same model, whatever each of them has built."""
        untrained = Untrained(flat.model, flat.trained)
        words, has_server = untrained.packed(), self.place.server is not None
        self.group.broadcast(first_params=flat.params)
        if self.place.worker == 0 or not has_server:
            self.worker.join(True, words if has_server and untrained.size else None)
        else:
            self.worker.join(False)
        if not untrained.size or self.worker.came_late:
            return
        if has_server and self.group.rank == 0:
            found = self.worker.fetch_untrained()
            untrained.load(found)  # this raises an error if the models differ
            words.copy_(found)
        self.group.broadcast(untrained=words)
        untrained.load(words)

    @property
    def _machines_per_batch(self) -> int:
        """How many workers' batches make one update: those of all workers under ssgd, otherwise one."""
        return self.settings.workers if self.place.server is None else 1

    def _link(self, role: Role, staging: Staging) -> Link:
        if self.place.server is not None:
            heartbeat, keys = Heartbeat(role.worker, role.incarnation), self.place.keys
            addresses = [self.place.server, *self.place.followers]
            dealer = partial(DealerLink, heartbeat=heartbeat, keys=keys, staging=staging)
            return connect(addresses, role.layout, dealer, staging)
        settings = self.settings.for_server(workers=1, weight_decay=weight_decays(self.optimizer.param_groups))
        if self.place.run is None or self.group.rank != 0:
            return LocalLink(ServerCore(settings))
        folder = RunFolder(self.place.run, self.settings.facts())
        core = ServerCore(settings)
        core.on_update = telling(core, folder.record)
        return LocalLink(core, on_close=partial(folder.finish_at_exit, core))

    def _share_of_batch(self) -> Share:
        """Return this rank's part of a batch. A world over all machines splits a batch over the machines first."""
        if self.place.server is not None or self.group.size == 1:
            return Share(rank=self.group.rank, ranks=self.group.size)
        worker_of_rank = torch.zeros(self.group.size, dtype=torch.float64)
        worker_of_rank[self.group.rank] = self.place.worker
        self.group.wait(self.group.sum_async(worker_of_rank, "workers"))
        workers = worker_of_rank.tolist()
        mine = [rank for rank, worker in enumerate(workers) if worker == self.place.worker]
        return Share(self.place.worker, self.settings.workers, mine.index(self.group.rank), len(mine))

    # ---- the script's loops ----------------------------------------------------------------------------------------

    def run_epochs(self, count: int) -> Counted[int]:
        """See danaz.torch.epochs."""
        self.loop.begin(count)
        self.epochs = count
        return Counted(self._epochs(), lambda: count)

    def _epochs(self) -> Iterator[int]:
        try:
            yield from self.loop.epochs(self._first_epoch(), lambda: self.over)
        except GeneratorExit:
            self.ending.watch()
            raise
        self.finish()

    def _first_epoch(self) -> int:
        """Return the epoch that the cluster is in, so that a process that comes back skips the epochs before."""
        if self.place.server is None:
            return 0
        epoch = torch.zeros(1, dtype=torch.float64)
        if self.group.rank == 0:
            inquiry = Inquire(self.place.worker, self.place.incarnation, 1)
            heartbeat = Heartbeat(self.place.worker, self.place.incarnation)
            link = DealerLink(self.place.server, heartbeat, keys=self.place.keys)
            reply = link.exchange(inquiry)
            link.close()
            epoch[0] = reply.epoch if isinstance(reply, Progress) else 0.0  # a restarted shard cannot say
        self.group.broadcast(first_epoch=epoch)
        return min(int(epoch.item()), self.epochs - 1)

    def run_batches(self, loader: DataLoader[Any], epoch: int) -> Counted[Any]:
        """See danaz.torch.shard."""
        batches = self.loop.batches(epoch, loader.dataset, self.shard(loader, epoch))
        return Counted(batches, partial(self._expected, loader))

    def _expected(self, loader: DataLoader[Any]) -> int:
        """Return the number of batches that this worker computes in an epoch if all workers are equally fast."""
        batches = batching_of(loader, self._machines_per_batch, seed=0).batches_per_epoch
        return ceil(batches * self._machines_per_batch / self.settings.workers)

    # ---- training ------------------------------------------------------------------------------------------------

    def shard(self, loader: DataLoader[Any], epoch: int) -> Iterator[Any]:
        """See danaz.torch.shard."""
        self._epoch = epoch
        if self._worker is None:
            self._join(loader)
        elif batching_of(loader, self._machines_per_batch, self._seed_for(loader)) != self._batching:
            raise ValueError(
                "danaz.shard: this loader has another size, batch size or order than the run began with. It is for "
                "training data alone; to evaluate, iterate the loader itself"
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "danaz.shard was iterated under torch.no_grad(), where nothing can be trained; to evaluate, iterate "
                "the loader itself"
            )
        sampler, batches = self._double_of(loader)
        try:
            self.in_loop = True
            while self._more_in(epoch):
                for batch in batches:
                    if self._is_cut_short:
                        break
                    self._begin(sampler.portions.popleft())
                    yield batch
        finally:
            self.in_loop = False
            # If the script left the loop, the loader has read ahead: those batches come first in the next loop.
            self.worker.batches.put_back([portion.batch for portion in sampler.portions])
            sampler.portions.clear()

    def _warn_of_idle_ranks(self, batching: Batching) -> None:
        """Warn if some ranks get no samples of a batch.

        Batch norm cannot train on one sample. If each rank would get only one, fewer ranks get two samples instead.
        """
        here = self._share.ranks_at_work(batching.batch_size)
        if self.group.rank == 0 and here < self._share.ranks:
            warnings.warn(
                f"only {here} of this worker's {self._share.ranks} ranks get samples: batch_size is per worker, its "
                "ranks share each batch, and batch norm needs two samples a rank. Raise the loader's batch_size.",
                stacklevel=2,
            )

    def _more_in(self, epoch: int) -> bool:
        """Return whether a batch of this epoch, or one left over from before, is at hand. Wait for one if necessary."""
        self._pass_over_unstepped()
        if not self.worker.batches.waiting and not self.over:
            self.worker.pull()
        return not self._is_cut_short and self._next_epoch <= epoch

    @property
    def _is_cut_short(self) -> bool:
        """Whether the run has ended, although batches may be left that were read ahead."""
        return self._ends or (self.worker.done and not self.worker.batches.any)

    @property
    def _next_epoch(self) -> float:
        waiting = self.worker.batches.waiting
        assert self._batching is not None
        return self._batching.epoch_of(waiting[0]) if waiting else inf

    def _double_of(self, loader: DataLoader[Any]) -> tuple[LeaseSampler, DataLoader[Any]]:
        """Return the loader that delivers leased batches instead of ``loader``, and its sampler.

        It keeps its processes if ``loader`` keeps its own.
        """
        if self._loader is None or self._loader[0] is not loader:
            assert self._batching is not None
            sampler = LeaseSampler(self._batching, self._share, self._take)
            self._loader = (loader, sampler, rebuild(loader, sampler))
        return self._loader[1:]

    def _take(self) -> int | None:
        return self.worker.batches.begin() if self._next_epoch <= self._epoch else None

    def _begin(self, portion: Portion) -> None:
        self._pass_over_unstepped()
        self._portion = portion
        self.optimizer.exchange.weight = portion.weight

    def _pass_over_unstepped(self) -> None:
        """If the loop went on from a batch without a step, count that batch as used, on all ranks alike."""
        if self._portion is not None:
            self.optimizer.pass_over()

    def is_edited(self) -> bool:
        """See Updates."""
        return self.worker.is_edited()

    def push(self, grad: Tensor, absent: Spans, verdict: Verdict) -> None:
        """See Updates."""
        portion = self._end_batch()
        if verdict.edited and self.worker.replicated:
            self.group.broadcast(edited_params=self.optimizer.flat.params)  # each rank may have made its own edit
        lr = self._applied_lr(verdict.lr)
        self.worker.push(grad, lr, portion.samples, verdict.loss, portion.batch, absent)

    def skip(self) -> None:
        """See Updates."""
        self.worker.skip(self._end_batch().batch, self._applied_lr(self.optimizer.rates))

    def _end_batch(self) -> Portion:
        portion, self._portion = self._portion, None
        if portion is None:
            raise RuntimeError(_why_no_step(self.finished))
        self.own_batches += 1
        return portion

    def end(self) -> None:
        """See Updates."""
        self._end_batch()
        self._ends = True

    def _applied_lr(self, lr: list[float]) -> list[float]:
        return effective_lr(
            lr,
            epoch=self.worker.metrics.epoch,
            workers=self.settings.workers,
            warmup_epochs=self.settings.warmup_epochs,
            scales_lr=self._scales_lr,
        )

    # ---- the end -------------------------------------------------------------------------------------------------

    def stop(self, reason: str) -> None:
        """See danaz.torch.stop."""
        if self.finished:
            return
        if self._worker is None:
            raise NotInitializedError("danaz.stop ends a run that has begun, which the first batch of danaz.shard does")
        self._leave(reason or "the script asked for it")

    def finish(self) -> None:
        """See danaz.torch.finish."""
        if not self.finished and self._worker is not None:
            self._leave("")

    def _leave(self, stop: str) -> None:
        """Leave the run in good order, with all ranks of this worker. ``stop`` is the reason to end it for everyone."""
        if self.optimizer.was_passed_over and not self.optimizer.was_stepped:
            raise RuntimeError(
                "optimizer.step() was never called, so nothing was trained. Call it once for each batch of "
                "danaz.shard, on the optimizer that danaz.DistributedOptimizer returned."
            )
        self._agree_to_end()
        self.worker.leave(first_text(self.group, stop) if self._ends else "")
        reach("finish")
        if self.worker.came_late:
            if self.group.rank == 0:
                print(
                    "danaz: the run was complete before this worker came; there is nothing left to do", file=sys.stderr
                )
            raise SystemExit(0)  # without the trained model, the rest of the script is of no use
        self.finished = True
        self._portion = None
        self.ending.stop_watching()
        if self.worker.ends_early:
            raise SystemExit(128 + signal.SIGTERM)  # the code after the script's loop is meant for a run that is over

    def _agree_to_end(self) -> None:
        """Bring all ranks to the point where they leave, although the others may be anywhere in their loops.

        This rank makes the steps that the others wait for, without samples of its own. It goes on until all ranks have
        heard, in the same step, that it asks to end. The update of that step is not made.
        """
        self.optimizer.exchange.asks_to_end = True
        self._ends = self._ends or (self.group.size == 1 and not self.worker.done)
        while not self.over:
            if self._portion is None and not self.worker.batches.any:
                self.worker.pull()
                continue
            if self._portion is None:
                self._begin(Portion(batch=-1, samples=1, here=0))
            self.optimizer.step()

    def report(self, figures: dict[str, float | str | None]) -> None:
        """See danaz.torch.report."""
        self.ending.end_if_left()
        if not self.finished:
            raise NotInitializedError("danaz.report comes after the loop over danaz.epochs(), or after danaz.finish()")
        self.worker.report(figures)

    def _close(self) -> None:
        reach("leave")
        if self._worker is not None:
            self._worker.close(in_good_order=self.finished)
        if self.finished:
            self.group.close()


def _why_no_step(finished: bool) -> str:
    if finished:
        return "optimizer.step() was called after the end of the run; after danaz.stop(reason), leave the loop"
    return "optimizer.step() was called twice for one batch, or outside of danaz.shard"
