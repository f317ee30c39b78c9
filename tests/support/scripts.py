"""Training scripts on threads of one process, around a server on a real socket. Each is a worker with a session."""

from __future__ import annotations

import atexit
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from sockets import ANYWHERE, PATIENCE_S
from torch import Tensor, nn
from torch.utils.data import Dataset

from danaz.run.settings import RankInfo, Settings
from danaz.server.core import ServerCore
from danaz.server.records import Update
from danaz.server.settings import ServerSettings
from danaz.serving.router import Router
from danaz.serving.socket import BoundRouter
from danaz.torch.optimizer import DistributedOptimizer
from danaz.torch.session import Session
from danaz.worker.group import Group, SoloGroup


class Counted(Dataset[tuple[Tensor, Tensor]]):
    """Notes who fetched which sample, and lets a test hold up a worker."""

    def __init__(self, samples: int, worker: int, fetched: list[tuple[int, int]], hold: Callable[[], object]):
        self.samples, self.worker, self.fetched, self.hold = samples, worker, fetched, hold

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.fetched.append((self.worker, index))
        self.hold()
        return torch.tensor([index / self.samples]), torch.ones(1)


class ThreadGroup:
    """A rank of a world whose ranks are threads of this process."""

    name = "threads"

    def __init__(self, rank: int, slots: list[Tensor | None], barrier: threading.Barrier):
        self.rank, self.size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    @classmethod
    def world(cls, size: int) -> list[Group]:
        """Return all ranks of a new world."""
        slots: list[Tensor | None] = [None] * size
        barrier = threading.Barrier(size, timeout=PATIENCE_S)
        return [cls(rank, slots, barrier) for rank in range(size)] if size > 1 else [SoloGroup()]

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._slots[self.rank] = tensor.detach().clone()
        self._barrier.wait()
        gathered = [each for each in self._slots if each is not None]
        self._barrier.wait()
        assert {each.shape for each in gathered} == {tensor.shape}, "the ranks are out of step"
        return gathered

    def sum_async(self, tensor: Tensor, name: str) -> None:
        tensor.detach().copy_(torch.stack(self._exchange(tensor)).sum(0))

    def wait(self, handle: None) -> None:
        return None

    def broadcast(self, **tensors: Tensor) -> None:
        for tensor in tensors.values():
            tensor.detach().copy_(self._exchange(tensor)[0])

    def close(self) -> None:
        self._barrier.abort()


def run_world(algorithm: str, workers: int, ranks: int, story: Callable[[Session, int], None]) -> None:
    """Run a script on ``workers`` of ``ranks`` each, in one world that has no server elsewhere, as ``ssgd`` does."""
    errors: list[BaseException] = []

    def work(number: int, group: Group) -> None:
        session = Session(Settings(algorithm, workers), RankInfo(worker=number))
        session.group = group
        atexit.unregister(session.close)
        try:
            story(session, number)
        except Exception as error:  # noqa: BLE001  # the test gets it
            errors.append(error)
            group.close()

    threads = [
        threading.Thread(target=work, args=(number // ranks, group))
        for number, group in enumerate(ThreadGroup.world(workers * ranks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    if errors:
        raise errors[0]


@dataclass
class ScriptCluster:
    """A server on a ROUTER socket, and workers on threads of the same process."""

    settings: ServerSettings
    updates: list[Update] = field(default_factory=list)
    fetched: list[tuple[int, int]] = field(default_factory=list)  # (worker, sample)
    errors: list[BaseException] = field(default_factory=list)
    end_s: float = PATIENCE_S  # time within which the server must end after its workers
    stopping: bool = False

    def __post_init__(self) -> None:
        self.core = ServerCore(self.settings, on_update=self.updates.append)
        self.bound = BoundRouter(ANYWHERE)
        self.address = self.bound.address
        self.threads = [threading.Thread(target=self._guarded, args=(self._serve,))]

    def _serve(self) -> None:
        Router(self.bound).serve(self.core, None, lambda: self.stopping)

    def worker(self, number: int, story: Callable[[Session, int], None], ranks: int = 1) -> None:
        """Add a worker; ``story`` is what its script does, on each of its ``ranks``."""
        for group in ThreadGroup.world(ranks):
            work = partial(self._work, number, story, group)
            self.threads.append(threading.Thread(target=self._guarded, args=(work,)))

    def _work(self, number: int, story: Callable[[Session, int], None], group: Group) -> None:
        settings = Settings(self.settings.algorithm, self.settings.workers)
        session = Session(settings, RankInfo(worker=number, server=self.address))
        session.group = group
        atexit.unregister(session.close)
        try:
            story(session, number)
        finally:
            session.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.errors.append(error)
            raise

    def run(self) -> None:
        """Run the cluster; return when everyone has ended."""
        for thread in self.threads:
            thread.start()
        for thread in self.threads[1:]:
            thread.join(PATIENCE_S)
        hanging = [thread for thread in self.threads[1:] if thread.is_alive()]
        if not hanging:
            self.threads[0].join(self.end_s)
        self.stopping = self.threads[0].is_alive()
        self.threads[0].join(PATIENCE_S)
        self.bound.close(linger_ms=0)
        assert not hanging, "a worker hangs"
        assert not self.stopping, "the server does not end"
        assert not self.errors

    def counts(self) -> Counter[int]:
        return Counter(sample for _, sample in self.fetched)

    def batches_by_worker(self) -> Counter[int]:
        return Counter(update.worker for update in self.updates)


def make_optimizer(session: Session) -> tuple[nn.Linear, DistributedOptimizer]:
    model = nn.Linear(1, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    optimizer = DistributedOptimizer(sgd, model, session.group, replicated=session.place.server is None)
    session.adopt(optimizer)
    return model, optimizer
