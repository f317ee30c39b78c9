"""A training loop with a pipeline, and servers in its own process that fail while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster import DIGEST
from stimuli import SIZE
from torch import Tensor, nn

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import Plan, Reply
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings
from danaz.server.snapshot import Snapshot
from danaz.torch.alone import LocalLink
from danaz.vectors.model import FlatModel
from danaz.worker.conversation import Conversation
from danaz.worker.core import Request, Role, Step, WorkerCore
from danaz.worker.group import SoloGroup
from danaz.worker.sharded import ShardedLink
from danaz.worker.worker import Worker

PLAN = Plan(batches_per_epoch=40, epochs=1)


class Line(LocalLink):
    """A link to a server in this process, which is killed, or gives its worker up, when the test says so."""

    def __init__(self, algorithm: str, shard: int = 0, shards: int = 1):
        self.settings = ServerSettings(algorithm=algorithm, workers=1, digest=DIGEST, shard=shard, shards=shards)
        self.updates: list = []
        self.life = 0
        self.checkpoint: Snapshot | None = None
        self.before_exchange: Callable[[Request], None] = lambda request: None
        super().__init__(self.start())

    def start(self) -> ServerCore:
        return ServerCore(self.settings, on_update=self.updates.append, on_milestone=self.keep)

    def keep(self, core: ServerCore) -> None:
        core.settle()
        self.checkpoint = core.snapshot()
        del self.updates[core.master.version :]

    def exchange(self, request: Request) -> Reply:
        self.before_exchange(request)
        return super().exchange(request)

    def receive_into(self, room: Tensor) -> None:
        """Do nothing, because nothing travels."""

    def gives_up(self) -> None:
        self.core.tick(time.monotonic() + 1000)

    def restarts(self) -> None:
        self.life += 1
        self.core = self.start()
        assert self.checkpoint is not None
        self.core.restore(self.checkpoint, self.updates[self.checkpoint.version :], self.life, time.monotonic())


def make_worker(*lines: Line, size: int = SIZE, optimizers: Optimizers = SGD) -> Worker:
    """Return a worker with a pipeline that is linked to one server or to all shards."""
    flat = FlatModel(nn.Linear(size, 1, bias=False))
    rule = lines[0].settings.rule(optimizers)
    role = Role(0, 1, DIGEST, optimizers, flat.layout, PLAN, ahead=2)
    core = WorkerCore(role, rule.worker_rule, push_moves_view=rule.push_moves_view)
    link = lines[0] if len(lines) == 1 else ShardedLink(lines, flat.layout)
    return Worker(SoloGroup(), flat, 2, Conversation(core, link), pipelined=True)


def train(worker: Worker, says_good_bye: bool = True) -> None:
    """Train ½‖θ − 1‖², from the join to the end."""
    worker.join(bring_params=True)
    while not worker.done:
        if worker.batches.waiting:
            batch = worker.batches.begin()
            worker.push(Step(batch, (0.05,), 1, 1.0), worker.flat.params - 1)
        else:
            worker.pull()
    worker.leave()
    worker.close(in_good_order=says_good_bye)
