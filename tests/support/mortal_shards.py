"""The shards of a run and its workers, joined in memory, for tests that kill them."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import torch
from live import read_updates
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import Final, Heartbeat, Parameters, Plan, Push, Reply
from danaz.run.folder import read_summary
from danaz.server.answers import materialize
from danaz.server.core import ServerCore
from danaz.server.rollback import AwaitingRollback
from danaz.server.settings import ServerSettings
from danaz.serving.checkpoint import folder_of
from danaz.serving.journal import RunWriter
from danaz.serving.keeper import RunKeeper, ShardKeeper
from danaz.vectors.layout import Layout
from danaz.worker.conversation import Conversation
from danaz.worker.core import Request, Role, Step, WorkerCore, answers
from danaz.worker.sharded import ShardedLink

LAYOUT = Layout.from_lists([[["a", [40], [1]], ["b", [8, 6], [6, 1]], ["c", [40], [1]]], [], [128]])
PLAN = Plan(batches_per_epoch=12, epochs=1)
ALWAYS = 1e-9  # seconds between checkpoints, so short that each update has one


class Servers:
    """The shards of one run, each on its own machine; this object holds what outlives their processes."""

    def __init__(
        self,
        run: Path,
        algorithm: str = "dana-zero",
        shards: int = 2,
        checkpoint_s: float = ALWAYS,
        workers: int = 1,
        optimizers: Optimizers = SGD,
    ):
        self.run, self.shards, self.optimizers = run / "0", shards, optimizers
        self._settings = [
            ServerSettings(algorithm, workers, recovery_s=0.0, checkpoint_s=checkpoint_s, shard=shard, shards=shards)
            for shard in range(shards)
        ]
        self.folders = [folder_of(run / str(shard), shard) for shard in range(shards)]
        self.keepers: list[RunKeeper | ShardKeeper] = []
        self._served: list[ServerCore | AwaitingRollback] = []
        self.busy = threading.RLock()
        self.mail: defaultdict[tuple[int, int], Queue[Reply]] = defaultdict(Queue)  # the mail by shard and worker
        for shard, settings in enumerate(self._settings):
            (run / str(shard)).mkdir(parents=True)
            self.keepers.append(self._keeper(settings))
            self._served.append(self.keepers[-1].begin())

    def _keeper(self, settings: ServerSettings) -> RunKeeper | ShardKeeper:
        folder = self.folders[settings.shard].parent
        return ShardKeeper(folder, settings) if settings.shard else RunKeeper(RunWriter(folder, {}), settings)

    def handle(self, shard: int, request: Request | Heartbeat, route: int = 0) -> list[tuple[Any, Reply]]:
        with self.busy:
            return materialize(self._served[shard].stream(route, request, time.monotonic()))

    def tick(self, now: float) -> None:
        for served in self._served:
            served.stream_tick(now)

    @property
    def cores(self) -> list[ServerCore]:
        return [keeper.core for keeper in self.keepers]

    def settle(self) -> None:
        """Wait until all checkpoints under way are written."""
        for thread in threading.enumerate():
            if thread.name == "danaz-checkpoint":
                thread.join()

    def kill(self, *shards: int) -> None:
        """Kill these shards' processes (by default all), and start them again."""
        with self.busy:
            self.settle()
            for shard in shards or range(self.shards):
                self.keepers[shard] = self._keeper(self._settings[shard])
                self._served[shard] = self.keepers[shard].resume()

    @property
    def versions(self) -> list[int]:
        return [core.master.version for core in self.cores]

    @property
    def params(self) -> Tensor:
        return torch.cat([core.master.params for core in self.cores])


class Way:
    """A worker's link to one shard, whichever process serves the shard."""

    def __init__(self, servers: Servers, shard: int, worker: int = 0):
        self._servers, self._shard, self._worker = servers, shard, worker
        self.answered = threading.Event()
        self.before: Callable[[Request], None] = lambda request: None
        self.is_lost: Callable[[], bool] = lambda: False  # whether the answer is lost, so that the request is repeated
        self.common: tuple[int, ...] | None = None  # replaces the push's ``common``

    def exchange(self, request: Request) -> Reply:
        self.before(request)
        if isinstance(request, Push) and self.common is not None:
            request = replace(request, common=self.common)
        replies = self._servers.handle(self._shard, request, self._worker)
        if self.is_lost():
            return self.exchange(request)
        for worker, reply in replies:
            self._servers.mail[self._shard, worker].put(reply)
        reply = self._servers.mail[self._shard, self._worker].get(timeout=60.0)
        assert answers(reply, request)
        self.answered.set()
        return reply

    def receive_into(self, room: Tensor) -> None:
        """Do nothing, because nothing travels."""

    def close(self) -> None:
        """Do nothing, because nothing is held."""


class Trainer:
    """One worker, whose gradient is a function of the batch."""

    def __init__(self, servers: Servers, worker: int = 0):
        self.servers = servers
        self.ways = [Way(servers, shard, worker) for shard in range(servers.shards)]
        self.waits: list[float] = []
        self.while_it_waits: Callable[[], None] = lambda: None
        self.link = ShardedLink(self.ways, LAYOUT, pause=self._wait)
        rule = servers.cores[0].settings.rule(servers.optimizers).worker_rule
        self.core = WorkerCore(Role(worker, 1, "", servers.optimizers, LAYOUT, PLAN), rule)
        self.conversation = Conversation(self.core, self.link)
        self.reply: Any = None

    def _wait(self, wait_s: float) -> None:
        self.waits.append(wait_s)
        self.while_it_waits()

    def join(self) -> None:
        self.reply = self.conversation.ask(self.core.join(torch.ones(LAYOUT.size)), Parameters)

    def push(self) -> None:
        batch = self.reply.leases[0]
        grad = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(batch))
        push = self.core.push(Step(batch, (0.1,), 4, 1.0), grad, self.reply.view.clone())
        self.reply = self.conversation.ask(push, Parameters)

    def train(self, pushes: int = 1000) -> None:
        for _ in range(pushes):
            if self.reply.done:
                return
            self.push()
            self.servers.settle()

    def leave(self) -> Tensor:
        return self.conversation.ask(self.core.leave(torch.empty(0)), Final).params

    def bye(self) -> None:
        self.conversation.send(self.core.bye())


def undisturbed_end(folder: Path, optimizers: Optimizers = SGD) -> Tensor:
    """Return θ at the end of a run in which nothing fails."""
    with training(folder, checkpoint_s=0.0, optimizers=optimizers) as trainer:
        trainer.train()
        return trainer.leave()


@contextmanager
def training(folder: Path, **settings: Any) -> Iterator[Trainer]:
    """Start the servers, and yield a worker that has joined."""
    trainer = Trainer(Servers(folder, **settings))
    trainer.join()
    try:
        yield trainer
    finally:
        trainer.servers.settle()
        trainer.link.close()


def check_end(trainer: Trainer, undisturbed: Tensor, restarts: int = 1) -> None:
    """Check that the bits are the same, every batch counts once, no version is missing, and no checkpoint is kept."""
    trainer.train()
    assert torch.equal(trainer.leave(), undisturbed)
    trainer.bye()
    check_run(trainer.servers, restarts)
    assert not any(folder.exists() for folder in trainer.servers.folders)


def check_run(servers: Servers, restarts: int) -> None:
    for keeper in servers.keepers:
        keeper.finish()
    updates, run = read_updates(servers.run), servers.run
    assert [update["version"] for update in updates] == list(range(1, 13))
    assert sorted(update["batch"] for update in updates) == list(range(12))
    summary = read_summary(run)
    assert (summary["complete"], summary["restarts"]) == (True, restarts)
    assert not servers.folders[0].exists()
    assert (run / "parameters.safetensors").exists()
