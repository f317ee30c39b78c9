"""Samplers and streams in live runs of two workers of two ranks: each sample is used as often as it should be."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import live
import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from danaz.torch.samplers import order_of

HEAD = """
import random, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler
import danaz.torch as danaz

danaz.init()
torch.manual_seed(danaz.rank())
random.seed(danaz.worker_id())
model = nn.Linear(1, 1)
optimizer = danaz.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), model)
seen = open(f"{sys.argv[1]}/seen.{danaz.worker_id()}.{danaz.rank()}", "w")

def train(x):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(x.float().unsqueeze(1)), x.float().unsqueeze(1) / 48)
    loss.backward()
    optimizer.step(loss=loss)
    print(*x.tolist(), file=seen, flush=True)
"""

SAMPLER = """
sampler = WeightedRandomSampler([1.0, 3.0] * 24, 24)
for epoch in danaz.epochs(3):
    for x in danaz.shard(DataLoader(range(48), 4, sampler=sampler, num_workers=1), epoch):
        train(x)
"""

STREAM = """
class Shuffled(IterableDataset):
    def __iter__(self):
        return iter(random.sample(range(4000), 4000))

for x in danaz.stream(DataLoader(Shuffled(), 4, num_workers=1), 18):
    train(x)
"""

DISAGREEING = """
for epoch in danaz.epochs(1):
    for x in danaz.shard(DataLoader(range(48), 4, sampler=range(danaz.rank(), 40 + danaz.rank())), epoch):
        train(x)
"""


def run(script: str, algorithm: str, folder: Path, succeeds: bool = True) -> tuple[live.Run, Counter[int]]:
    path = folder / "script.py"
    path.write_text(HEAD + script)
    done = live.launch(
        *("--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", algorithm, "--seed", "5"),
        out=folder / "run",
        script=[str(path), str(folder)],
        succeeds=succeeds,
    )
    return done, Counter(int(item) for seen in folder.glob("seen.*") for item in seen.read_text().split())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
def test_each_sample_is_used_as_often_as_the_sampler_says(algorithm: str, tmp_path: Path) -> None:
    done, seen = run(SAMPLER, algorithm, tmp_path)
    loader = DataLoader(torch.arange(48), 4, sampler=WeightedRandomSampler([1.0, 3.0] * 24, 24))  # type: ignore[arg-type]
    order = order_of(loader, 1, seed=5)
    batches = [order.batch(epoch, number)[0] for epoch in range(3) for number in range(6)]
    assert seen == Counter(index for batch in batches for index in batch)
    assert (done.summary["complete"], done.summary["updates"]) == (True, 18 if algorithm == "dana" else 9)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
def test_no_item_of_a_stream_is_used_twice(algorithm: str, tmp_path: Path) -> None:
    done, seen = run(STREAM, algorithm, tmp_path)
    assert max(seen.values()) == 1
    assert sum(seen.values()) == 18 * (4 if algorithm == "dana" else 8)
    assert (done.summary["complete"], done.summary["updates"]) == (True, 18)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_that_disagree_end_the_run_with_the_reason(tmp_path: Path) -> None:
    done, _ = run(DISAGREEING, "ssgd", tmp_path, succeeds=False)
    assert "OrderError: the ranks of this worker were given different batches in epoch 0" in done.output
