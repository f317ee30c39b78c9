"""danaz in a training script of one's own.

    import danaz.torch as danaz
    danaz.init()
    model = Net().to(danaz.device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)  # tuned on one GPU
    optimizer = danaz.DistributedOptimizer(optimizer, model)
    for epoch in danaz.epochs(160):                       # epochs of the whole cluster
        for x, y in danaz.shard(loader, epoch):
            optimizer.zero_grad(); loss(model(x), y).backward(); optimizer.step()
    # here the model is the trained one, on every rank

The same script runs alone with plain ``python``, and on a cluster with ``danaz launch``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from danaz.optimizer import DistributedOptimizer as _DistributedOptimizer
from danaz.session import NotInitializedError, Session
from danaz.settings import from_environment
from danaz.worker.worker import Metrics

__all__ = [
    "DistributedOptimizer",
    "NotInitializedError",
    "device",
    "epochs",
    "finish",
    "init",
    "metrics",
    "num_workers",
    "progress",
    "rank",
    "report",
    "shard",
    "size",
    "worker_id",
]

_current: Session | None = None


def _session() -> Session:
    if _current is None:
        raise NotInitializedError("call danaz.init() first")
    return _current


def init(*, digest: str = "") -> None:
    """Take this process's place in the cluster. Without ``danaz launch`` it trains alone.

    A ``digest`` stands for the script's configuration: a server that runs another one refuses the worker.
    """
    global _current
    if _current is None:
        settings, place = from_environment()
        _current = Session(replace(settings, digest=digest) if digest else settings, place)


def device() -> torch.device:
    """The device of this rank: a GPU of its own where there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _session().place.device % torch.cuda.device_count())


def rank() -> int:
    """This process's rank within its worker (under ssgd, within the whole cluster)."""
    return _session().group.rank


def size() -> int:
    """Number of ranks of this worker (under ssgd, of the whole cluster)."""
    return _session().group.size


def worker_id() -> int:
    """This machine's number among the workers."""
    return _session().place.worker


def num_workers() -> int:
    """Number of workers of the cluster."""
    return _session().settings.workers


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, backward_passes_per_step: int = 1
) -> _DistributedOptimizer:
    """Let the cluster carry out ``optimizer``, a torch.optim.SGD over (some of) the parameters of ``model``.

    Each ``step()`` averages the gradient over this worker's ranks, pushes it, and puts the next view into the model.
    When ``backward()`` has returned, every ``p.grad`` is the worker's mean gradient: clip, unscale or log it as ever.
    ``step(loss=loss)`` adds the loss to the run's records. A batch that is not followed by ``step()`` counts as used.
    Raises UnsupportedOptimizerError, with the reason, for what DANA cannot stand in for.
    """
    session = _session()
    replicated = session.place.server is None
    wrapped = _DistributedOptimizer(optimizer, model, session.group, backward_passes_per_step, replicated)
    session.adopt(wrapped)
    return wrapped


def epochs(count: int) -> Iterator[int]:
    """Epochs of the whole cluster. Behind the loop, the model is the trained one on every rank (see ``finish``)."""
    session = _session()
    session.epochs = count
    for epoch in range(count):
        if session.over:
            break
        yield epoch
    session.finish()


def shard(loader: DataLoader[Any], epoch: int) -> Iterator[Any]:
    """This rank's part of the batches that the server leases to this worker in ``epoch``.

    ``loader`` gives the data set, the batch size (per worker: its ranks share each batch), shuffling and loading
    processes. Every sample is used once an epoch, whatever the workers' speeds. Raises UnsupportedLoaderError.
    """
    return _session().shard(loader, epoch)


def finish() -> None:
    """Leave the run in good order; load θ and the mean batch-norm buffers into every rank's model."""
    _session().finish()


def report(**figures: float | str | None) -> None:
    """Add figures, such as ``test_error_percent``, to ``reported`` in the run's summary.json.

    A run has at most 64 of them, with names of at most 100 characters and texts of at most 1000: raises ValueError for
    more at once, and RefusedError where the run has too many with those reported before.
    """
    _session().report(figures)


def metrics() -> Metrics:
    """Version, epoch, lag, gap and times, as this worker last heard of them."""
    return _session().worker.metrics


def progress() -> float:
    """The cluster's epoch as a float, for schedules that move with every step; 0 until the first batch."""
    return _session().epoch
