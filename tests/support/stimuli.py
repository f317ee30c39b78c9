"""Messages to a server core, written by hand, and its answers to them."""

from __future__ import annotations

from dataclasses import replace

import torch
from cluster import DIGEST, TIMEOUT_S, layout_of
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import (
    Join,
    Parameters,
    Plan,
    Push,
    Replies,
    Reply,
)
from danaz.server.core import ServerCore
from danaz.server.settings import ServerSettings

SIZE = 3
LAYOUT = layout_of(SIZE, buffers=2)
PLAN = Plan(batches_per_epoch=10, epochs=2)
JOIN = Join(0, 1, 1, DIGEST, SGD, LAYOUT, PLAN, 1, torch.ones(SIZE))
NAN, INF = float("nan"), float("inf")
GRADIENT = torch.tensor([1.0, -2.0, 3.0])


def make_core(algorithm: str = "dana-zero", workers: int = 1, **changes: object) -> ServerCore:
    changes = {"worker_timeout_s": TIMEOUT_S, "digest": DIGEST, **changes}
    return ServerCore(ServerSettings(algorithm=algorithm, workers=workers, **changes))  # type: ignore[arg-type]


def started(
    algorithm: str = "dana-zero", workers: int = 1, optimizers: Optimizers = SGD, **changes: object
) -> tuple[ServerCore, Parameters]:
    """Return a core whose workers are in the run, and the first view of worker 0."""
    core = make_core(algorithm, workers, **changes)
    for worker in range(workers):
        join = replace(JOIN, worker=worker, optimizers=optimizers, params=JOIN.params if worker == 0 else None)
        replies = core.handle(worker, join, 0.0)
    [view] = [reply for route, reply in replies if route == 0]
    assert isinstance(view, Parameters)
    return core, view


def push_on(view: Parameters, worker: int = 0, request: int = 2, grad: Tensor = GRADIENT, **changes: object) -> Push:
    push = Push(worker, 1, request, view.version, (0.1,), 4, 0.5, view.leases[0], grad.clone())
    return replace(push, **changes)  # type: ignore[arg-type]


def answer(replies: Replies, route: object = 0) -> Reply:
    [reply] = [reply for to, reply in replies if to == route]
    return reply


def parameters(replies: Replies, route: object = 0) -> Parameters:
    reply = answer(replies, route)
    assert isinstance(reply, Parameters)
    return reply


def arithmetic_of(core: ServerCore) -> list[object]:
    """Return all that an update changes, as plain numbers."""
    master = core.master
    vectors = {
        f"{m.worker}.{name}": vector.tolist() for m in core.members.values() for name, vector in m.vectors.items()
    }
    shared = {name: vector.tolist() for name, vector in master.shared.items()}
    counts = [(m.worker, m.counts, m.updates) for m in core.members.values()]
    return [
        master.params.tolist(),
        master.version,
        master.shared_counts,
        master.max_lr,
        vectors,
        shared,
        counts,
        master.shared_counts,
        core.totals.updates,
    ]
