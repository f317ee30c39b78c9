"""Seeds for parts of a run: two parts never share a seed, and every process derives the same seeds."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import torch

from danaz.files.seeds import derive_seed


def test_no_two_ranks_of_any_two_runs_share_a_seed() -> None:
    grid = list(product(range(20), range(40), range(16)))
    assert len({derive_seed(seed, worker, rank) for seed, worker, rank in grid}) == len(grid)


def test_a_longer_path_is_another_path() -> None:
    paths: list[tuple[int, ...]] = [(), (0,), (0, 0), (1,), (1, 0), (0, 1)]
    assert len({derive_seed(seed, *path) for seed in (0, 1, 2**32, 2**32 + 1) for path in paths}) == 4 * len(paths)


def test_every_process_derives_the_same_seed() -> None:
    program = "from danaz.files.seeds import derive_seed; print(derive_seed(3, 10, 2))"
    elsewhere = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert int(elsewhere.stdout) == derive_seed(3, 10, 2)


def test_torch_takes_every_seed() -> None:
    for worker in range(50):
        seed = derive_seed(0, worker, 0)
        assert torch.Generator().manual_seed(seed).initial_seed() == seed
