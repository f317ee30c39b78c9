"""Seeds for the random numbers of each part of a run, derived from the run's one seed."""

from __future__ import annotations

import numpy as np


def derive_seed(seed: int, *path: int) -> int:
    """Return a seed of 64 bits for the part of a run that ``path`` names, for example (worker, rank).

    The same arguments give the same seed in every process. Different ones give unrelated seeds, because numpy's
    ``SeedSequence`` mixes them: arithmetic such as ``1000 * seed + 100 * worker`` would give one seed to two parts.

    Args:
        seed: of the run, 0 or more.
        path: numbers from 0 up. Paths that begin alike, such as (1,) and (1, 0), are different paths.
    """
    return int(np.random.SeedSequence(seed, spawn_key=path).generate_state(1, np.uint64)[0])
