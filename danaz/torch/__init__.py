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

The same script runs alone with plain ``python``, and on a cluster with ``danaz launch``. How to port a script, call by
call, is in docs/your-script.md.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from danaz.run.settings import from_environment
from danaz.torch.loop import LoopError
from danaz.torch.models import check_model
from danaz.torch.optimizer import DistributedOptimizer as _DistributedOptimizer
from danaz.torch.session import NotInitializedError, Session
from danaz.worker import between
from danaz.worker.worker import Metrics

__all__ = [
    "DistributedOptimizer",
    "LoopError",
    "NotInitializedError",
    "broadcast_object",
    "device",
    "epochs",
    "finish",
    "init",
    "is_main",
    "local_rank",
    "local_size",
    "mean",
    "metrics",
    "num_workers",
    "progress",
    "rank",
    "report",
    "shard",
    "size",
    "stop",
    "worker_id",
]

Value = TypeVar("Value", float, Tensor)

_current: Session | None = None


def _session() -> Session:
    if _current is None:
        raise NotInitializedError("call danaz.init() first")
    return _current


def init(*, digest: str = "", seed: int | None = None) -> None:
    """Take this process's place in the cluster. Without ``danaz launch`` it trains alone.

    A ``digest`` stands for the script's configuration: a server that runs another one refuses the worker. ``seed``
    decides the order of the samples; without one, that is ``danaz launch --seed`` or, alone, torch.manual_seed. Raises
    ValueError if the run was launched with another seed: all processes must agree on it.
    """
    global _current
    if _current is None:
        settings, place = from_environment()
        _current = Session(replace(settings, digest=digest) if digest else settings, place)
        _current.choose_seed(seed)
        atexit.register(_current.ending.end_process)
    elif seed is not None:
        _current.choose_seed(seed)


def device() -> torch.device:
    """The device of this rank: a GPU of its own where there are GPUs, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _session().place.device % torch.cuda.device_count())


def is_main() -> bool:
    """Whether this process is the one that writes files and prints: exactly one of the run, whatever the algorithm."""
    session = _session()
    return session.place.worker == 0 and session.group.rank == 0


def rank() -> int:
    """This process's rank within its worker (under ssgd, within the whole cluster). See also ``is_main``."""
    return _session().group.rank


def size() -> int:
    """Number of ranks of this worker (under ssgd, of the whole cluster)."""
    return _session().group.size


def local_rank() -> int:
    """This process's number among the run's processes on its machine, whichever workers they belong to."""
    return _session().place.local_rank


def local_size() -> int:
    """Number of the run's processes on this machine."""
    return _session().place.local_size


def worker_id() -> int:
    """This process's worker's number among the workers."""
    return _session().place.worker


def num_workers() -> int:
    """Number of workers that the run was launched with."""
    return _session().settings.workers


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, backward_passes_per_step: int = 1
) -> _DistributedOptimizer:
    """Let the cluster carry out ``optimizer``, a torch.optim.SGD over (some of) the parameters of ``model``.

    Each ``step()`` averages the gradient over this worker's ranks, pushes it, and puts the next view into the model.
    When ``backward()`` has returned, every ``p.grad`` is the worker's mean gradient: clip, unscale or log it as ever.
    ``step(loss=loss)`` adds the loss to the run's records. A batch that is not followed by ``step()`` counts as used.
    The loss must be a mean over the samples, not a sum. Raises UnsupportedOptimizerError, with the reason, for what
    DANA cannot stand in for, and ValueError for a model that danaz cannot train.
    """
    session = _session()
    check_model(model)
    replicated = session.place.server is None
    wrapped = _DistributedOptimizer(optimizer, model, session.group, backward_passes_per_step, replicated)
    session.adopt(wrapped)
    return wrapped


def epochs(count: int) -> Iterator[int]:
    """Epochs of the whole cluster. Behind the loop, the model is the trained one on every rank (see ``finish``).

    A run has one such loop. Raises LoopError if it is begun a second time, or if an epoch ends without ``shard``.
    """
    return _session().run_epochs(count)


def shard(loader: DataLoader[Any], epoch: int) -> Iterator[Any]:
    """This rank's part of the batches that the server leases to this worker in ``epoch``, which ``epochs`` gave.

    ``loader`` gives the data set, the batch size (per worker: its ranks share each batch), shuffling and loading
    processes. Every sample is used once an epoch, whatever the workers' speeds; what a loop that is left by ``break``
    leaves over comes first in the next epoch's. ``len()`` of it is what this worker would compute in an epoch if all
    workers were equally fast. Raises UnsupportedLoaderError, and LoopError if it is not this loop's turn.
    """
    return _session().run_batches(loader, epoch)


def stop(reason: str = "") -> None:
    """End the run early for every worker, from any rank; returns when the trained model is in this rank's model.

    The other ranks of this worker leave their loops at their next step, the other workers at their next view. The
    reason is in summary.json as ``stopped``. The update that this worker is in the midst of may be left out. Leave the
    loop after it. Nothing happens if the run is over.
    """
    _session().stop(reason)


def finish() -> None:
    """Leave the run in good order; load θ and the mean batch-norm buffers into every rank's model.

    ``epochs`` does so by itself. Called earlier, this worker leaves (all its ranks, at their next step), the others get
    its batches, and it waits for them to end.
    """
    _session().finish()


def mean(value: Value) -> Value:
    """The mean of ``value`` over the ranks of this worker (under ssgd, of the cluster); every rank must call it.

    A float or a tensor of floats; it comes back as what it was. Each rank counts the same, however many samples it had.
    """
    return between.mean(_session().group, value)


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank of this worker (under ssgd, of the cluster); every rank must call it.

    It may be made of None, bool, int, float, str, bytes, and lists and dicts of them: it travels as MessagePack, for
    nothing that comes over a network is unpickled. Raises TypeError for anything else.
    """
    return between.broadcast_object(_session().group, value)


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
