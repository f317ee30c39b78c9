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

A script that counts steps and draws its own batches has one loop, ``for step in danaz.steps(10_000)``; one whose data
is a stream has ``for batch in danaz.stream(loader, 10_000)``.

The same script runs alone with plain ``python``, and on a cluster with ``danaz launch``. docs/your-script.md shows how
to port a script, call by call.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from danaz.run.settings import from_environment
from danaz.torch.data import UnsupportedLoaderError
from danaz.torch.evaluating import EvaluationError
from danaz.torch.loop import LoopError
from danaz.torch.optimizer import DistributedOptimizer as _DistributedOptimizer
from danaz.torch.saving import Saved, SavedFileError
from danaz.torch.session import NotInitializedError, Session
from danaz.torch.stream import stream_part as _stream_part
from danaz.worker import between
from danaz.worker.between import DifferentCallsError
from danaz.worker.worker import Metrics

__all__ = [
    "DifferentCallsError",
    "DistributedOptimizer",
    "EvaluationError",
    "LoopError",
    "NotInitializedError",
    "Saved",
    "SavedFileError",
    "allgather",
    "allreduce",
    "barrier",
    "broadcast",
    "broadcast_object",
    "device",
    "epochs",
    "evaluating",
    "finish",
    "init",
    "is_main",
    "load",
    "local_rank",
    "local_size",
    "mean",
    "metrics",
    "num_workers",
    "progress",
    "rank",
    "report",
    "save",
    "seed_for",
    "shard",
    "size",
    "steps",
    "stop",
    "stream",
    "stream_part",
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
    return _session().is_main


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
    if isinstance(optimizer, _DistributedOptimizer):
        raise TypeError(
            "danaz.DistributedOptimizer was given an optimizer that it has wrapped before: wrap each one once"
        )
    given: list[object] = [optimizer, model]  # a script without type checks may give anything
    if not isinstance(given[0], torch.optim.Optimizer) or not isinstance(given[1], nn.Module):
        found = " and ".join(type(each).__name__ for each in given)
        raise TypeError(f"danaz.DistributedOptimizer takes the optimizer first, and then the model, not {found}")
    replicated = session.place.server is None
    wrapped = _DistributedOptimizer(optimizer, model, session.group, backward_passes_per_step, replicated)
    session.adopt(wrapped)
    return wrapped


def epochs(count: int, batches: Sequence[int] | Callable[[int], int] | None = None) -> Iterator[int]:
    """Iterate over the epochs of the whole cluster. After the loop, every rank has the trained model (see ``finish``).

    All epochs have as many batches as the first, unless ``batches`` says how many each has: the ``len`` of the loader
    that the epoch will be given, in a list of ``count`` numbers, or as a function of the epoch. It must be the same in
    all processes. A run has one such loop. Raises LoopError if it is begun a second time, or if an epoch ends without
    ``shard``, and ValueError for numbers that are none.
    """
    return _session().run_epochs(count, batches)


def shard(loader: DataLoader[Any], epoch: int, *beside: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over this rank's part of the batches that the server leases to this worker in ``epoch`` of ``epochs``.

    ``loader`` gives the data set, the batch size (per worker: its ranks share each batch), shuffling or a sampler, and
    loading processes. Every sample is used as often in an epoch as the sampler says, however fast the workers are. If a
    loop is left by ``break``, the batches left over come first in the next epoch. ``len()`` gives the number of batches
    that this worker would compute in an epoch if all workers were equally fast.

    With loaders ``beside`` the first, each item is a tuple: a batch of the first, whose epochs count, and a batch of
    each of the others, which begin again when they are used up. Each rank gets its own part of those as well.

    Raises UnsupportedLoaderError, LoopError if it is not this loop's turn, and OrderError if the processes of the run
    would not train on the same batches.
    """
    given: list[object] = [loader, *beside]  # a script without type checks may give anything
    for each in given:
        if not isinstance(each, DataLoader):
            raise UnsupportedLoaderError(
                f"danaz.shard takes a torch.utils.data.DataLoader, not {type(each).__name__}: it needs to know the "
                "data set, the batch size and the order"
            )
    return _session().run_batches(loader, epoch, *beside)


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


def stream(source: Iterable[Any], updates: int, samples: int = 1) -> Iterator[Any]:
    """Iterate over this rank's own batches of a stream, in a run of ``updates`` updates of the whole cluster.

    ``source`` is a DataLoader of an IterableDataset, whose ``batch_size`` is per worker: its ranks share each batch. Or
    it is any other iterable (also a loader with ``batch_size=None``), each item of which is a batch for one rank; then
    all ranks count the same, and ``samples``, the number in a batch, is for the run's records.

    Of R ranks in all, each reads every R-th item and passes over the others, so that no item is used twice in a pass;
    see ``stream_part`` for a faster way. When the stream ends, it begins again. If it is an iterator, which cannot, the
    run ends for all workers. A run has one such loop, in place of ``epochs`` and ``shard``; its length counts as one
    epoch for ``progress`` and for schedulers, and ``len()`` gives the number of batches that this worker would compute
    if all workers were equally fast.

    Raises ValueError, LoopError, UnsupportedLoaderError, StreamError for a stream that gives nothing, and OrderError if
    the ranks do not read the same stream.
    """
    return _session().run_stream(source, updates, samples)


def stream_part() -> tuple[int, int]:
    """Return (index, count) to a data set that ``stream`` reads: it should give items index, index + count and so on.

    A data set calls it in its ``__iter__``, before it gives the first item, and then reads only what belongs to its
    part, such as the files number index, index + count and so on. That says that it divides itself: ``stream`` passes
    over none of its items. The count includes the loader's processes, and may differ from worker to worker. Outside of
    ``stream``, the parts are those of the loading processes of torch's DataLoader: (0, 1) without them.
    """
    return _stream_part()


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


def allreduce(value: Value, op: str = "mean") -> Value:
    """Return the mean, sum, max or min of ``value`` over the ranks of this worker; every rank must call it.

    Under ssgd, the ranks are those of the whole cluster. ``value`` is a number or a tensor, of the same type and shape
    on each rank. The result is of the same kind, and a tensor stays on its device; but the sum of whole numbers of any
    size is int64, as torch.sum has it, and the mean takes floats only. Every rank counts the same, however many samples
    it had. Raises ValueError if the tensors differ in kind, TypeError for another value, and DifferentCallsError if the
    ranks make different calls, each on every rank.
    """
    return between.allreduce(_session().group, value, op)


def allgather(value: Any) -> list[Any]:
    """Return every rank's ``value``, in the order of the ranks of this worker; every rank must call it.

    All values are tensors, which may differ in shape, and come to the device of this rank's own; or they are what
    ``broadcast`` takes. Raises TypeError and DifferentCallsError as ``allreduce`` does.
    """
    return between.allgather(_session().group, value)


def broadcast(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank of this worker (under ssgd, of the cluster); every rank must call it.

    It is a tensor, or None, bool, int, float, str, bytes, or lists and dicts of them. What the other ranks give does
    not count, but if it is a tensor, rank 0's comes to its device; otherwise to the CPU. Objects travel as MessagePack,
    because danaz never unpickles what comes over a network. Raises TypeError for anything else.
    """
    return between.broadcast(_session().group, value)


def barrier() -> None:
    """Return when every rank of this worker (under ssgd, of the cluster) has called this."""
    between.barrier(_session().group)


def mean(value: Value) -> Value:
    """Return the mean of ``value`` over the ranks of this worker; the same as ``allreduce(value)``."""
    return between.mean(_session().group, value)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank of this worker, as ``broadcast`` does. It may not be a tensor."""
    return between.broadcast_object(_session().group, value)


def evaluating(model: nn.Module, at: str = "view", together: bool = False) -> AbstractContextManager[None]:
    """Put what should be evaluated into ``model``, and give the training state back at the end of the block.

    Within ``with danaz.evaluating(model):`` the model is in eval mode, no gradients are recorded, and the batch-norm
    statistics (all floating-point buffers) are the mean over this worker's ranks. Afterwards the parameters, buffers
    and modes are what they were, to the bit, also after an error. Any rank may enter, alone or with others, such as
    within ``if danaz.is_main():``: the other ranks of its worker wait for it at their next step, and other workers go
    on. Ranks average their buffers with the last step of a loop over ``danaz.shard``. Within a loop, and in
    ``danaz.steps``, each rank has its own buffers, unless all ranks of the worker enter with ``together=True``, which
    averages them there.

    ``at`` says at which parameters: "view", those that this worker trains on; or "server", the newest that the server
    has. Under algorithms whose workers push displacements (dana), the server has the look-ahead only; θ itself is known
    when the run is over. Only the first rank of a worker can fetch them; with ``together=True`` all ranks get them.
    After the run, both are the trained model.

    Raises ValueError for a model that danaz does not train or another ``at``, and EvaluationError for "server" on a
    rank that cannot fetch, or if the server cannot answer; and from ``optimizer.step()`` within the block.
    """
    return _session().evaluating(model, at, together)


def save(path: str | os.PathLike[str], **extra: Any) -> None:
    """Write the model, the optimizer's state and the run's position into one file, which torch reads without danaz.

    The main process writes, and the others do nothing: any of them may call it. The file replaces what was at ``path``
    when it is complete. ``torch.load(path, weights_only=True)`` returns a dict: ``model`` and ``optimizer`` are what
    a script that trains with torch alone would have there, and can go on from; ``danaz`` says where the run was, and
    ``extra`` holds what you give: tensors, numbers, texts, and lists and dicts of them. Batch-norm statistics are those
    of ``evaluating``. Within ``evaluating(model, at="server")``, the parameters are the server's.

    With several workers, the state is that of worker 0. Under algorithms that keep it on a server elsewhere
    (nag-asgd, multi-asgd, dana-zero and their relatives) the file has no state. Raises TypeError for an ``extra`` that
    torch would not read, and OSError.
    """
    _session().save(Path(path), extra)


def load(path: str | os.PathLike[str]) -> Saved:
    """Begin a run with what ``save`` has written: the model, and the optimizer's state where the algorithm can take it.

    Call it after ``DistributedOptimizer`` and before the first batch, in every process; after the run, it loads the
    model alone. Where worker 0 cannot take the state over, momentum begins at zero, and a warning says so. Returns the
    position of the run that saved the file, and its ``extra``; this run counts from 0. A run that goes on after a
    failure, or by ``danaz launch --resume``, goes on from its own checkpoint instead. Raises SavedFileError, OSError,
    and LoopError in mid-run.
    """
    return _session().load(Path(path))


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
