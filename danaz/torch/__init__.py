"""danaz in your own training script.

    import danaz.torch as danaz
    danaz.init()
    model = Net().to(danaz.device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)  # tuned on one GPU
    optimizer = danaz.DistributedOptimizer(optimizer, model)
    for epoch in danaz.epochs(160):                       # epochs of the whole cluster
        for x, y in danaz.shard(loader, epoch):
            optimizer.zero_grad(); loss(model(x), y).backward(); optimizer.step()
    # here the model is the trained one, on every rank

A script that counts steps and draws its own batches has one loop, ``for step in danaz.steps(10_000)``.

The same script runs alone with plain ``python``, and on a cluster with ``danaz launch``. docs/your-script.md shows how
to port a script, call by call.
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
    "seed_for",
    "shard",
    "size",
    "steps",
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

    A ``digest`` stands for the script's configuration: a server that runs another configuration refuses the worker.
    ``seed`` decides the order of the samples. Without it, ``danaz launch --seed`` decides or, in a process alone,
    torch.manual_seed. Raises ValueError if the run was launched with another seed, because all processes must agree on
    it.
    """
    global _current
    if _current is None:
        settings, place = from_environment()
        _current = Session(replace(settings, digest=digest) if digest else settings, place)
        _current.choose_seed(seed)
        atexit.register(_current.end_process)
    elif seed is not None:
        _current.choose_seed(seed)


def device() -> torch.device:
    """Return the device of this rank: its own GPU if there are GPUs, otherwise the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _session().place.device % torch.cuda.device_count())


def is_main() -> bool:
    """Return whether this process is the one that should write files and print. A run has exactly one."""
    session = _session()
    return session.place.worker == 0 and session.group.rank == 0


def rank() -> int:
    """Return this process's rank within its worker (under ssgd, within the cluster). See also ``is_main``."""
    return _session().group.rank


def size() -> int:
    """Return the number of ranks of this worker (under ssgd, of the whole cluster)."""
    return _session().group.size


def local_rank() -> int:
    """Return this process's number among the run's processes on its machine, whichever workers they belong to."""
    return _session().place.local_rank


def local_size() -> int:
    """Return the number of the run's processes on this machine."""
    return _session().place.local_size


def worker_id() -> int:
    """Return the number of this process's worker, from 0."""
    return _session().place.worker


def num_workers() -> int:
    """Return the number of workers that the run was launched with."""
    return _session().settings.workers


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, backward_passes_per_step: int = 1
) -> _DistributedOptimizer:
    """Let the cluster carry out ``optimizer``, which is one of torch.optim over (some of) the parameters of ``model``.

    Each ``step()`` averages the gradient over this worker's ranks, pushes it, and puts the next view into the model.
    When ``backward()`` has returned, every ``p.grad`` is the worker's mean gradient: clip, unscale or log it as ever.
    ``step(loss=loss)`` adds the loss to the run's records. A batch that is not followed by ``step()`` counts as used.
    The loss must be a mean over the samples, not a sum. A script with several optimizers wraps each of them, before its
    loop: their steps on a batch are one update. Raises UnsupportedOptimizerError, with the reason, for an optimizer
    that the algorithm cannot carry out, ValueError for a model that danaz cannot train, and NotInitializedError once
    the run has begun.
    """
    session = _session()
    replicated = session.place.server is None
    wrapped = _DistributedOptimizer(optimizer, model, session.group, backward_passes_per_step, replicated)
    session.adopt(wrapped)
    return wrapped


def epochs(count: int) -> Iterator[int]:
    """Iterate over the epochs of the whole cluster. After the loop, every rank has the trained model (see ``finish``).

    A run has one such loop. Raises LoopError if it is begun a second time, or if an epoch ends without ``shard``.
    """
    return _session().run_epochs(count)


def shard(loader: DataLoader[Any], epoch: int) -> Iterator[Any]:
    """Iterate over this rank's part of the batches that the server leases to this worker in ``epoch`` of ``epochs``.

    ``loader`` gives the data set, the batch size (per worker: its ranks share each batch), shuffling and loading
    processes. Every sample is used once in an epoch, however fast the workers are. If a loop is left by ``break``, the
    batches left over come first in the next epoch. ``len()`` gives the number of batches that this worker would compute
    in an epoch if all workers were equally fast. Raises UnsupportedLoaderError, and LoopError if it is not this loop's
    turn.
    """
    return _session().run_batches(loader, epoch)


def steps(count: int, samples: int = 1) -> Iterator[int]:
    """Iterate over the steps that the server leases to this worker, in a run of ``count`` updates of the whole cluster.

    The script draws the batch of each step itself: it needs no DataLoader. Every rank draws its own, and all ranks
    count the same; ``samples``, the number that each draws, is for the run's records. Each number from 0 to ``count``
    less 1 is used once, by whichever worker is free. If a worker dies, another one is leased its step: draw by
    ``seed_for(step)``, and the batch is drawn again as well. A run has one such loop, in place of ``epochs`` and
    ``shard``; its length counts as one epoch for ``progress`` and for schedulers. ``len()`` gives the number of steps
    that this worker would make if all workers were equally fast. Raises ValueError and LoopError.
    """
    return _session().run_steps(count, samples)


def seed_for(step: int) -> int:
    """Return the seed of a step of ``steps`` on this rank, for ``torch.Generator().manual_seed``.

    It depends on the seed of the run, the step and the rank within its worker. Raises NotInitializedError before the
    run's first step.
    """
    return _session().seed_for(step)


def stop(reason: str = "") -> None:
    """End the run early for every worker. Any rank may call it; it returns when this rank has the trained model.

    The other ranks of this worker leave their loops at their next step, and the other workers at their next view.
    summary.json gives the reason as ``stopped``. The update that this worker is computing may be left out. Leave the
    loop after this call. Nothing happens if the run is over.
    """
    _session().stop(reason)


def finish() -> None:
    """Leave the run in good order, and load θ and the mean batch-norm buffers into every rank's model.

    ``epochs`` calls this by itself at its end. If you call it earlier, this worker leaves (all its ranks leave at their
    next step), the other workers get its batches, and it waits for them to end.
    """
    _session().finish()


def mean(value: Value) -> Value:
    """Return the mean of ``value`` over the ranks of this worker (under ssgd, of the cluster); every rank must call it.

    ``value`` is a float or a tensor of floats, and the mean is of the same kind. Every rank counts the same, however
    many samples it had.
    """
    return between.mean(_session().group, value)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank of this worker (under ssgd, of the cluster); every rank must call it.

    It may hold None, bool, int, float, str, bytes, and lists and dicts of them. It travels as MessagePack, because
    danaz never unpickles what comes over a network. Raises TypeError for anything else.
    """
    return between.broadcast_object(_session().group, value)


def report(**figures: float | str | None) -> None:
    """Add figures, such as ``test_error_percent``, to ``reported`` in the run's summary.json.

    A run has at most 64 figures, with names of at most 100 characters and texts of at most 1000. Raises ValueError for
    more in one call, and RefusedError if the run has too many together with those reported before.
    """
    _session().report(figures)


def metrics() -> Metrics:
    """Return the version, epoch, lag, gap and times that this worker last heard of."""
    return _session().worker.metrics


def progress() -> float:
    """Return the cluster's epoch as a float, for schedules that move with every step; 0 until the first batch."""
    return _session().epoch
