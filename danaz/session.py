"""One process's part in a run, behind the functions of danaz.torch."""

from __future__ import annotations

import atexit
import signal
import sys
from collections.abc import Iterator
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from danaz.data import Batching, LeaseSampler, Portion, Share, batching_of, read_ahead, rebuild
from danaz.flat import FlatModel, Spans
from danaz.milestones import reach
from danaz.optimizer import DistributedOptimizer, Verdict, effective_lr, weight_decays
from danaz.pace import telling
from danaz.run_folder import RunFolder
from danaz.schedulers import follow
from danaz.server.core import ServerCore
from danaz.server.messages import Heartbeat
from danaz.settings import Place, Settings
from danaz.signals import note_ending_signals
from danaz.untrained import Untrained
from danaz.worker.core import Loss, Role, WorkerCore
from danaz.worker.group import Group, make_group
from danaz.worker.link import DealerLink, Link, LocalLink
from danaz.worker.sharded import connect
from danaz.worker.staging import IN_PLACE, Staging, staging_for
from danaz.worker.worker import Worker


class NotInitializedError(RuntimeError):
    """Something that must come before this call has not been called."""


class Session:
    """From ``init`` to the end of the process."""

    def __init__(self, settings: Settings, place: Place):
        self.settings = settings
        self.place = place
        self.group: Group = make_group(settings.collective)
        self.epochs = 1
        self.finished = False
        self._optimizer: DistributedOptimizer | None = None
        self._worker: Worker | None = None
        self._batching: Batching | None = None
        self._portion: Portion | None = None  # of the batch being computed
        self._share = Share()
        self._scales_lr = False
        self.in_loop = False  # the script is in its loop over batches
        self.own_batches = 0  # that this process has computed
        self._loader_batches = 1  # of an epoch, as the script's own loader counts
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
    def epoch(self) -> float:
        """The cluster's, as this worker last heard of it."""
        return 0.0 if self._worker is None else self._worker.metrics.epoch

    @property
    def ticks(self) -> float:
        """See schedulers.Clock."""
        return self.epoch * self._loader_batches

    @property
    def over(self) -> bool:
        """Whether the run has no more batches for anyone."""
        return self._worker is not None and self._worker.done

    def adopt(self, optimizer: DistributedOptimizer) -> None:
        if self._optimizer is not None:
            raise NotInitializedError("danaz trains one model a process: DistributedOptimizer was made already")
        self._optimizer = optimizer
        optimizer.connect(self)
        reach("optimizer")

    # ---- joining -------------------------------------------------------------------------------------------------

    def _join(self, loader: DataLoader[Any]) -> None:
        """Enter the run with the first loader: by now the model, the optimizer and the data are known."""
        optimizer, ahead = self.optimizer, read_ahead(loader)
        rule = self.settings.for_server().rule(optimizer.momentum)
        ahead += rule.worker_rule.sync_period - 1
        pipelined = self.settings.pipeline and self.place.server is not None
        ahead += pipelined  # the batch that is computed while the last one is pushed
        batching = batching_of(loader, self._machines_per_batch, self.settings.seed)
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
            # A server in this process has its vectors where the model is.
            staging = IN_PLACE if self.place.server is None else staging_for(device, role.layout.size)
            core = WorkerCore(role, rule.worker_rule, device, staging, compressor, rule.push_moves_view)
            link = self._link(role, staging)
        self._batching = batching
        self._share = self._share_of_batch()
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
        """Join with a model that is the same on all ranks of all workers, whatever each of them has made."""
        untrained = Untrained(flat.model, flat.trained)
        words, has_server = untrained.packed(), self.place.server is not None
        self.group.broadcast(first_params=flat.params)
        if self.place.worker == 0 or not has_server:
            self.worker.join(True, words if has_server and untrained.size else None)
        else:
            self.worker.join(False)
        if not untrained.size:
            return
        if has_server and self.group.rank == 0:
            found = self.worker.fetch_untrained()
            untrained.load(found)  # or says that this is another model
            words.copy_(found)
        self.group.broadcast(untrained=words)
        untrained.load(words)

    @property
    def _machines_per_batch(self) -> int:
        """Under ssgd one update takes a batch of every worker, otherwise of one."""
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
        """This rank's part of a batch; in a world over all machines, first each machine's."""
        if self.place.server is not None or self.group.size == 1:
            return Share(rank=self.group.rank, ranks=self.group.size)
        worker_of_rank = torch.zeros(self.group.size, dtype=torch.float64)
        worker_of_rank[self.group.rank] = self.place.worker
        self.group.wait(self.group.sum_async(worker_of_rank, "workers"))
        workers = worker_of_rank.tolist()
        mine = [rank for rank, worker in enumerate(workers) if worker == self.place.worker]
        return Share(self.place.worker, self.settings.workers, mine.index(self.group.rank), len(mine))

    # ---- training ------------------------------------------------------------------------------------------------

    def shard(self, loader: DataLoader[Any], epoch: int) -> Iterator[Any]:
        """See danaz.torch.shard."""
        if self._worker is None:
            self._join(loader)
        elif batching_of(loader, self._machines_per_batch, self.settings.seed) != self._batching:
            raise ValueError("danaz.shard: this loader has another size, batch size or order than the run began with")
        assert self._batching is not None
        sampler = LeaseSampler(self._batching, self._share, lambda: self._take(epoch))
        try:
            self.in_loop = True
            while self._more_in(epoch):
                for batch in rebuild(loader, sampler):
                    self._begin(sampler.portions.popleft())
                    yield batch
        finally:
            self.in_loop = False

    def _more_in(self, epoch: int) -> bool:
        """Whether a batch of this epoch (or one left over from before) is at hand, if need be after waiting for one."""
        self._pass_over_unstepped()
        if not self.worker.batches.waiting and not self.worker.done:
            self.worker.pull()
        return self._next_epoch <= epoch

    @property
    def _next_epoch(self) -> float:
        waiting = self.worker.batches.waiting
        assert self._batching is not None
        return self._batching.epoch_of(waiting[0]) if waiting else inf

    def _take(self, epoch: int) -> int | None:
        return self.worker.batches.begin() if self._next_epoch <= epoch else None

    def _begin(self, portion: Portion) -> None:
        self._pass_over_unstepped()
        self._portion = portion
        self.optimizer.exchange.weight = portion.weight

    def _pass_over_unstepped(self) -> None:
        """A batch that the loop has left without a step counts as used, on all ranks alike."""
        if self._portion is not None:
            self.optimizer.pass_over()

    def is_edited(self) -> bool:
        """See Updates."""
        return self.worker.is_edited()

    def push(self, grad: Tensor, absent: Spans, lr: list[float], loss: Loss, verdict: Verdict) -> None:
        """See Updates."""
        portion = self._end_batch()
        if verdict.edited and self.worker.replicated:
            self.group.broadcast(edited_params=self.optimizer.flat.params)  # each rank may have made its own edit
        self.worker.push(grad, self._applied_lr(lr), portion.samples, loss, portion.batch, absent)

    def skip(self) -> None:
        """See Updates."""
        self.worker.skip(self._end_batch().batch, self._applied_lr(self.optimizer.rates))

    def _end_batch(self) -> Portion:
        portion, self._portion = self._portion, None
        if portion is None:
            raise RuntimeError("optimizer.step() was called twice for one batch, or outside of danaz.shard")
        self.own_batches += 1
        return portion

    def _applied_lr(self, lr: list[float]) -> list[float]:
        return effective_lr(
            lr,
            epoch=self.worker.metrics.epoch,
            workers=self.settings.workers,
            warmup_epochs=self.settings.warmup_epochs,
            scales_lr=self._scales_lr,
        )

    # ---- the end -------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """See danaz.torch.finish."""
        if self.finished or self._worker is None:
            return
        if self.optimizer.was_passed_over and not self.optimizer.was_stepped:
            raise RuntimeError(
                "optimizer.step() was never called, so nothing was trained. Call it once for each batch of "
                "danaz.shard, on the optimizer that danaz.DistributedOptimizer returned."
            )
        self._worker.leave()
        if self._worker.came_late:
            if self.group.rank == 0:
                print(
                    "danaz: the run was complete before this worker came; there is nothing left to do", file=sys.stderr
                )
            raise SystemExit(0)  # without the trained model there is nothing to be done with, either
        self.finished = True
        reach("finish")
        if self._worker.ends_early:
            raise SystemExit(128 + signal.SIGTERM)  # what a script does behind its loop is for a run that is over

    def report(self, figures: dict[str, float | str | None]) -> None:
        """See danaz.torch.report."""
        if not self.finished:
            raise NotInitializedError("danaz.report comes after the loop over danaz.epochs(), or after danaz.finish()")
        self.worker.report(figures)

    def _close(self) -> None:
        reach("leave")
        if self._worker is not None:
            self._worker.close(in_good_order=self.finished)
        if self.finished:
            self.group.close()
