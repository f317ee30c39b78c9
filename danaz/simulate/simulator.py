"""Simulate N workers in one process.

The workers take turns, in the order that the config key ``schedule`` names. In its turn, a worker computes the gradient
of a real batch on its view and pushes it. Server and workers are the same cores as in a live run; only the sockets
between them are replaced by function calls.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danaz.protocol.messages import Final, Parameters, Replies
from danaz.run.config import Config
from danaz.run.rates import effective_lr, lr_at, lr_scale
from danaz.run.settings import Settings
from danaz.server.core import ServerCore
from danaz.serving.journal import RunWriter
from danaz.simulate.batch_reader import BatchReader
from danaz.simulate.orders import make_order
from danaz.simulate.step import EagerStep, make_step
from danaz.torch.carried import decayed_gradient, optimizers_of, weight_decays
from danaz.torch.data import Batching
from danaz.torch.optimizer import kept_loss
from danaz.vectors.model import FlatModel
from danaz.worker.core import Request, Role, Step, WorkerCore
from danaz.workloads import build
from danaz.workloads.computing import choose_device, place
from danaz.workloads.evaluate import final_figures
from danaz.workloads.train import make_optimizer

Progress = Callable[[float, float | None], None]  # (share of the run that is done, from 0 to 1; last loss)


class SimulatedWorker:
    """A worker core, and what the server last told it."""

    def __init__(self, core: WorkerCore):
        self.core = core
        self.batches: deque[int] = deque()  # numbers of the batches that it has leased
        self.waits = True  # whether a reply with a view is still to come
        self.epoch = 0.0  # the cluster's epoch in the last reply
        self.done = False  # no batches are left

    def receive(self, reply: Any) -> None:
        """Take in a reply of the server."""
        self.core.receive(reply)
        if isinstance(reply, Parameters):
            self.waits, self.epoch, self.done = False, reply.epoch, reply.done
            self.batches = deque(reply.leases)


class Simulation:
    """One simulated run of ``config``, written into the folder ``run``. The seed decides every bit of it.

    If the run uses a GPU, the GPU holds the model, any data set that is kept in memory, and the vectors of the server
    and of all workers.

    Raises ConfigError or OrderError if the config cannot be run. The folder is made only after all checks have passed.
    """

    def __init__(self, config: Config, run: Path):
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.device = choose_device(config)
        self.workload = build(config).with_data_on(self.device)
        self.model = place(self.workload.model, config, self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.flat = FlatModel(self.model, [group["params"] for group in self.optimizer.param_groups])
        self.step = make_step(EagerStep(self.model, self.flat, self.workload, config, self.device))
        samples = len(self.workload.train)  # type: ignore[arg-type]
        self.batching = Batching(samples, config.batch_size, seed=config.seed)
        self.batches = BatchReader(self.workload.train, self.batching, config.epochs, config.num_workers)
        self.settings = Settings.of(config, schedule=config.schedule, collective="none")
        self._ahead = torch.zeros_like(self.flat.params)  # f32[P], γ Σⱼ ηⱼvⱼ if the workers keep the velocities
        for_server = self.settings.for_server(weight_decay=weight_decays(self.optimizer.param_groups))
        self.server = ServerCore(for_server, on_update=self._record, ahead=lambda: self._ahead)
        optimizers = optimizers_of(self.optimizer)
        self.rule = for_server.rule(optimizers)
        self._lr_scale = lr_scale(self.rule, optimizers, config.lr_scaling, config.workers)
        self.workers = [self._make_worker(number) for number in range(config.workers)]
        self._order = make_order(config.schedule, config.workers, config.seed)
        run.mkdir(parents=True, exist_ok=True)
        self.folder = RunWriter(run, self.settings.facts())
        self._last_loss: float | None = None
        torch.manual_seed(config.seed)  # which augmentation draws from

    def _make_worker(self, number: int) -> SimulatedWorker:
        role = Role(
            worker=number,
            incarnation=1,
            digest=self.settings.digest,
            optimizers=optimizers_of(self.optimizer),
            layout=self.flat.layout,
            plan=self.batching.plan(self.config.epochs),
            ahead=self.rule.worker_rule.sync_period,
        )
        compressor = self.settings.compressor(self.flat.layout)
        core = WorkerCore(
            role,
            self.rule.worker_rule,
            self.device,
            compressor=compressor,
            push_moves_view=self.rule.push_moves_view,
        )
        return SimulatedWorker(core)

    def _record(self, update: Any) -> None:
        self._last_loss = update.loss
        self.folder.record(replace(update, seconds=None))  # the file is the same to the byte each time

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self, progress: Progress = lambda share, loss: None) -> dict[str, Any]:
        """Train to the end. Returns the content of summary.json."""
        self.start()
        while not all(worker.done for worker in self.workers):
            self.advance(self.config.workers)
            progress(self.server.leases.epoch / self.config.epochs, self._last_loss)
        return self._finish()

    def start(self) -> None:
        """Let all workers join; worker 0 brings the initial parameters."""
        self.model.train()
        for worker in self.workers:
            self.send(worker, worker.core.join(self.flat.params if worker is self.workers[0] else None))

    def advance(self, turns: int) -> None:
        """Give a turn to each of the next ``turns`` workers in the order."""
        for number in islice(self._order, turns):
            self._turn(self.workers[number])

    def _turn(self, worker: SimulatedWorker) -> None:
        if worker.waits or worker.done:
            return
        if worker.batches and self.config.pipeline:
            self.pipelined_turn(worker)
        elif worker.batches:
            self.send(worker, self.make_push(worker))
        else:
            self.send(worker, worker.core.pull())

    def pipelined_turn(self, worker: SimulatedWorker) -> None:
        """Take a turn under ``pipeline``: fetch the view for the next batch, then compute and push this batch."""
        self.send(worker, worker.core.pull(ahead=True))
        self.send(worker, self.make_push(worker, wants_view=False))

    def make_push(self, worker: SimulatedWorker, wants_view: bool = True) -> Request:
        """Compute on the worker's view. Make a local step with every leased batch but the last, and push the last."""
        worker.core.compute_on(self.flat.params)
        self.flat.show_params()
        *earlier, last = worker.batches
        for batch in earlier:
            worker.core.local_step(*self._compute(worker, batch), self.flat.params)
            self.flat.show_params()
        return worker.core.push(*self._compute(worker, last), self.flat.params, wants_view=wants_view)

    def _compute(self, worker: SimulatedWorker, batch: int) -> tuple[Step, Tensor]:
        """Compute ``batch``. Return its step, and its gradient f32[P] including weight decay."""
        x, y = self.batches.take(batch)
        loss = kept_loss(self.step(x.to(self.device), y.to(self.device)))
        grad = decayed_gradient(self.flat, self.optimizer.param_groups)
        return Step(batch, tuple(self._lr(worker, batch)), len(y), loss, self.flat.absent), grad

    def _lr(self, worker: SimulatedWorker, batch: int) -> list[float]:
        config = self.config
        return effective_lr(
            [lr_at(config, self.batching.epoch_of(batch))],
            epoch=worker.epoch,
            workers=config.workers,
            warmup_epochs=config.lr_schedule.warmup_epochs,
            scale=self._lr_scale,
        )

    def send(self, worker: SimulatedWorker, request: Request) -> None:
        """Hand a request to the server, and its replies to the workers that they are for."""
        worker.waits = True
        measures_ahead = self.rule.worker_rule.worker_state and self.settings.gap_every
        before = worker.core.given_back() if measures_ahead else None
        self._deliver(self.server.handle(worker.core.role.worker, worker.core.complete(request), time.perf_counter()))
        if before is not None:
            after = worker.core.given_back()
            assert after is not None
            self._ahead.add_(after).sub_(before)

    def _deliver(self, replies: Replies) -> None:
        for route, reply in replies:
            assert isinstance(route, int)
            self.workers[route].receive(reply)
            if isinstance(reply, Final):
                self.flat.params.copy_(reply.params)
                self.flat.show_params()

    def _finish(self) -> dict[str, Any]:
        """Let all workers give back and leave, then measure the final figures at θ."""
        buffers = self.flat.buffers()  # all workers share one model, and so its batch-norm statistics
        for worker in self.workers:
            self.send(worker, worker.core.leave(buffers))
        first = self.workers[0]
        self.send(first, first.core.report(final_figures(self.model, self.workload, self.config, self.device)))
        for worker in self.workers:
            self.send(worker, worker.core.bye())
        return self.folder.finish(self.server)


def simulate(config: Config, run: Path, progress: Progress = lambda share, loss: None) -> dict[str, Any]:
    """Simulate ``config`` into the run folder ``run``. Returns the content of summary.json."""
    return Simulation(config, run).run(progress)
