"""Record what the SGD rules send, bit for bit: `PYTHONPATH=.:tests/support python tests/support/recordings.py`.

The recordings in tests/fixtures/sgd_recordings.npz were made before optimizers became a concept of their own. Make them
anew only for an algorithm that has changed on purpose.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from cluster import Cluster
from numpy.typing import NDArray

from danaz.optimizers import Optimizers, Sgd
from danaz.rules import ALGORITHMS

FILE = Path(__file__).parents[1] / "fixtures" / "sgd_recordings.npz"
GROUPS = (32, 32)  # whole vectors of the processor, so that the bits do not depend on how wide they are
WORKERS = 3
TURNS = 16
RATES = ((0.1, 0.05), (0.1, 0.05), (0.03, 0.05), (0.01, 0.002))
MOMENTA = (0.9, 0.0)


def names() -> list[str]:
    """Return the algorithms of SGD."""
    return sorted(set(ALGORITHMS) - {"dana-nadam"})


def record(name: str, momentum: float) -> NDArray[np.float32]:
    """Return the views f32[turns, P] of a run with a changing learning rate, and the parameters at the end."""
    draws = torch.Generator().manual_seed(1)
    size, workers = sum(GROUPS), min(WORKERS, ALGORITHMS[name].rule().max_workers or WORKERS)
    first, optimizers = torch.randn(size, generator=draws), Optimizers([Sgd(momentum)])
    cluster = Cluster(name, workers, first, groups=GROUPS, optimizers=optimizers, weight_decay=(0.1, 0.0))
    sent = []
    for turn in range(TURNS):
        worker = turn % workers if turn % 4 else 0  # worker 0 has more turns than the others
        if worker not in cluster.views:
            worker = next(iter(cluster.views))  # the others wait for their round
        grads = torch.randn(cluster.sync_period, size, generator=draws)
        cluster.push(worker, list(grads), RATES[turn % len(RATES)])
        sent.append(cluster.views.get(worker, torch.zeros(size)))
    for worker in sorted(cluster.views):
        cluster.leave(worker)
    return torch.stack([*sent, cluster.server.master.params]).numpy()


if __name__ == "__main__":
    recordings = {f"{name} {momentum}": record(name, momentum) for name in names() for momentum in MOMENTA}
    np.savez_compressed(FILE, **recordings)  # type: ignore[arg-type]
    print(f"{FILE} has {len(recordings)} recordings, {FILE.stat().st_size} bytes")
