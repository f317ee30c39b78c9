"""Workers and a server, joined in memory. There is no socket, and time is a number that the test sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import Final, Heartbeat, Join, Parameters, Plan, Refusal, Replies, Reply
from danaz.server.core import ServerCore
from danaz.server.records import Update
from danaz.server.settings import ServerSettings
from danaz.vectors.cutting import Spans
from danaz.vectors.layout import Layout
from danaz.worker.core import Request, Role, Step, WorkerCore

DIGEST = "the same everywhere"
TIMEOUT_S = 60.0
ENDLESS = Plan(batches_per_epoch=1_000_000, epochs=1)


def layout_of(*groups: int, buffers: int = 0) -> Layout:
    """Return a layout with one layer for each parameter group; ``groups`` gives the number of floats in each."""
    layers = [[f"layer{number}", [size], [1]] for number, size in enumerate(groups)]
    return Layout.from_lists([layers, [["running_mean", [buffers], [1]]] if buffers else [], list(groups)])


class Cluster:
    """N worker cores around one server core. Each method does what a worker does next, or what happens to it."""

    def __init__(
        self,
        algorithm: str,
        workers: int,
        params: Tensor,
        *,
        groups: Sequence[int] = (),
        optimizers: Optimizers = SGD,
        lr_correction: bool = True,
        plan: Plan = ENDLESS,
        ahead: int = 1,
        sync_period: int | None = None,
        weight_decay: tuple[float, ...] = (),
        gap_every: int = 0,
        buffers: int = 0,
        hyperparameters: Mapping[str, Any] | None = None,
    ):
        self.layout = layout_of(*(groups or [params.numel()]), buffers=buffers)
        self.optimizers, self.plan, self.params = optimizers, plan, params
        self.settings = ServerSettings(
            algorithm=algorithm,
            workers=workers,
            digest=DIGEST,
            lr_correction=lr_correction,
            sync_period=sync_period,
            weight_decay=weight_decay,
            gap_every=gap_every,
            worker_timeout_s=TIMEOUT_S,
            hyperparameters=dict(hyperparameters or {}),
        )
        self.updates: list[Update] = []
        self.sync_period = self.settings.rule(self.optimizers).worker_rule.sync_period
        self.ahead = max(ahead, self.sync_period)
        self.server = ServerCore(self.settings, on_update=self.updates.append)
        self.now = 0.0
        self.workers: dict[int, WorkerCore] = {}
        self.views: dict[int, Tensor] = {}  # the views of the workers that have one to compute on
        self.replies: dict[int, Reply] = {}  # the last reply to each worker
        self.final: dict[int, Final] = {}
        for number in range(workers):
            self.join(number)

    # ---- what workers do -----------------------------------------------------------------------------------------

    def join(self, worker: int, incarnation: int = 1) -> None:
        role = Role(worker, incarnation, DIGEST, self.optimizers, self.layout, self.plan, self.ahead)
        rule = self.settings.rule(self.optimizers)
        self.workers[worker] = WorkerCore(role, rule.worker_rule, push_moves_view=rule.push_moves_view)
        self.say(worker, self.workers[worker].join(self.params if worker == 0 else None))

    def push(
        self,
        worker: int,
        grads: Tensor | Sequence[Tensor],
        lr: float | Sequence[float],
        *,
        samples: int = 1,
        loss: float | None = 1.0,
        absent: Spans = (),
        edit: Tensor | None = None,
    ) -> Reply | None:
        """Push for the first batches that the worker holds, one for each gradient; all but the last are local steps.

        Return the answer, or None while the worker has to wait.
        """
        rates = (lr,) * len(self.layout.groups) if isinstance(lr, float) else tuple(lr)
        *local, last = [grads] if isinstance(grads, Tensor) else grads
        core, params = self.workers[worker], self.views[worker].clone()
        batches = self.leases(worker)
        for batch, grad in zip(batches, local, strict=False):
            core.local_step(Step(batch, rates, 0, loss, absent), grad, params)
        batch = batches[len(local)]
        return self.say(worker, core.push(Step(batch, rates, samples, loss, absent), last, params, edit=edit))

    def skip(self, worker: int) -> Reply | None:
        """Skip the first batch that the worker holds: it makes no step."""
        return self.say(worker, self.workers[worker].pull(skipped=self.leases(worker)[:1]))

    def pull(self, worker: int) -> Reply | None:
        return self.say(worker, self.workers[worker].pull())

    def leave(self, worker: int, buffers: Tensor | None = None) -> Reply | None:
        if buffers is None:
            buffers = torch.zeros(self.layout.buffer_size)
        return self.say(worker, self.workers[worker].leave(buffers))

    def bye(self, worker: int) -> Reply | None:
        return self.say(worker, self.workers[worker].bye())

    # ---- what happens to them ------------------------------------------------------------------------------------

    def lose(self, *workers: int) -> None:
        """Let these workers be silent for too long, while the server hears from all others."""
        self.now += TIMEOUT_S + 1
        for number, core in self.workers.items():
            if number not in workers:
                self.deliver(self.server.handle(number, Heartbeat(number, core.role.incarnation), self.now))
        for worker in workers:
            self.views.pop(worker, None)
        self.deliver(self.server.tick(self.now))

    def come_back(self, worker: int) -> None:
        """Let a worker that was given up send a request, be refused, and join again with the same incarnation."""
        core = self.workers[worker]
        request = core.unanswered or core.pull()
        refusal = self.say(worker, request)
        if not isinstance(request, Join):
            assert isinstance(refusal, Refusal)
            assert refusal.rejoin
            self.say(worker, core.join())

    # ---- between them --------------------------------------------------------------------------------------------

    def say(self, worker: int, request: Request) -> Reply | None:
        self.views.pop(worker, None)
        self.replies.pop(worker, None)
        self.deliver(self.server.handle(worker, request, self.now))
        return self.replies.get(worker)

    def deliver(self, replies: Replies) -> None:
        for route, reply in replies:
            assert isinstance(route, int)
            self.workers[route].receive(reply)
            self.replies[route] = reply
            if isinstance(reply, Parameters):
                self.views[route] = reply.view.clone()
            elif isinstance(reply, Final):
                self.final[route] = reply

    def leases(self, worker: int) -> tuple[int, ...]:
        reply = self.replies[worker]
        assert isinstance(reply, Parameters)
        return reply.leases
