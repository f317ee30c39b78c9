"""Several servers in one process, each with a slice of one small model, and workers that speak with all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import Parameters, Plan, Push, Reply
from danaz.run.settings import Settings
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.vectors.codecs import Compressor
from danaz.vectors.layout import Layout
from danaz.worker.core import Request, Role, Step, WorkerCore, answers
from danaz.worker.sharded import ShardedLink

ROWS = [["a", [40], [1]], ["b", [8, 6], [6, 1]], ["c", [], []], ["d", [39], [1]]]  # 128 floats
LAYOUT = Layout.from_lists([ROWS, [["mean", [3], [1]]], [40, 0, 88]])
PLAN = Plan(batches_per_epoch=6, epochs=2)


class CoreLink:
    """A link that calls a core directly. What the core says to other workers is kept for them."""

    def __init__(self, core: ServerCore, route: int, mail: dict[int, Reply]):
        self.core, self.route, self.mail = core, route, mail
        self.said: list[Request] = []
        self.alter: Callable[[Request], Request] = lambda request: request  # changes a request on its way

    def exchange(self, request: Request) -> Reply:
        request = self.alter(request)
        self.said.append(request)
        self.mail.update({int(to): reply for to, reply in self.core.handle(self.route, request, 0.0)})
        reply = self.mail.pop(self.route)
        assert answers(reply, request)
        return reply

    def receive_into(self, room: Tensor) -> None:
        """Do nothing, because nothing travels."""

    def close(self) -> None:
        """Do nothing, because nothing is held."""


def make_cores(algorithm: str, shards: int, workers: int = 1, gap_every: int = 1) -> list[ServerCore]:
    return [
        ServerCore(ServerSettings(algorithm, workers, gap_every=gap_every, shard=shard, shards=shards))
        for shard in range(shards)
    ]


@contextmanager
def linked(
    cores: Sequence[ServerCore],
    worker: int = 0,
    compressor: Compressor | None = None,
    ahead: int = 1,
    optimizers: Optimizers = SGD,
) -> Iterator[tuple[WorkerCore, Any, list[CoreLink]]]:
    links = [CoreLink(core, worker, {}) for core in cores]
    link = ShardedLink(links, LAYOUT)
    rule = cores[0].settings.rule(optimizers)
    role = Role(worker, 1, "", optimizers, LAYOUT, PLAN, ahead)
    core = WorkerCore(role, rule.worker_rule, compressor=compressor, push_moves_view=rule.push_moves_view)
    yield core, link, links
    link.close()


def compressor_of(wire: str, shards: int) -> Compressor | None:
    return Settings("dana", wire=wire, server_shards=shards).compressor(LAYOUT)


def say(core: WorkerCore, link: ShardedLink, request: Request) -> Any:
    reply = link.exchange(request)
    core.receive(reply)
    return reply


def push_of(core: WorkerCore, view: Parameters, grad: Tensor | None = None) -> Push:
    """Push ``grad`` f32[P], or ones, for the first batch that the worker holds."""
    grad = torch.ones(LAYOUT.size) if grad is None else grad
    return core.push(Step(view.leases[0], (0.1, 0.1, 0.1), 1, 1.0), grad, view.view.clone())


def gradients() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(3)
    while True:
        yield torch.randn(LAYOUT.size, generator=generator)
