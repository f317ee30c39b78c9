"""Real runs of models of every kind: batch norm over ranks, types of parameters, sparse gradients, several optimizers.

Each script also runs alone, as torch has it, and the result must be the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import live
import pytest
import torch
from torch import Tensor

from danaz.serving.serve import replay_run

pytestmark = pytest.mark.timeout(300)
TWO_RANKS = ("--hosts", "localhost:2")
FOUR_RANKS = ("--hosts", "localhost:4", "--workers-per-host", "2")

HEAD = """
import sys, torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
import danaz.torch as danaz

danaz.init()
torch.manual_seed(0)
generator = torch.Generator().manual_seed(3)
def save(model):
    torch.save(model.state_dict(), f"{sys.argv[1]}/model.{danaz.worker_id()}.{danaz.rank()}")
"""

# 21 samples in batches of 5: the last batch has one, and one of two ranks gets none. A rank that has the largest value
# skips the batch after forward, while the other is about to need it in backward.
NORMED = """
x, y = torch.randn(21, 3, 4, 4, generator=generator), torch.randn(21, 2, generator=generator)
layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 5, 1)]
layers += [nn.BatchNorm2d(5, affine=False, momentum=None), nn.Tanh(), nn.Flatten(), nn.Linear(20, 2)]
model = nn.Sequential(*layers)
model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
optimizer = danaz.DistributedOptimizer(sgd, model)
for epoch in danaz.epochs(3):
    for a, b in danaz.shard(DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True), epoch):
        optimizer.zero_grad()
        loss = mse_loss(model(a), b)
        if (a == x.max()).any():
            continue
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step(loss=loss)
    if len(sys.argv) > 2 and danaz.rank() == 1:
        danaz.stop("enough")
        break
save(model)
torch.save(model, f"{sys.argv[1]}/whole")  # without danaz in it
"""

MIXED = """
x, y = torch.randint(0, 7, (21, 4), generator=generator), torch.randn(21, 2, generator=generator)
class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=True)
        self.middle = nn.Linear(4, 4, dtype=torch.float64)
        self.last = nn.Linear(4, 2, dtype=torch.bfloat16)
    def forward(self, x):
        return self.last(torch.tanh(self.middle(self.table(x).sum(1).double())).bfloat16()).float()
model = Words()
adam = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.0, 0.9), eps=1e-3)
optimizer = danaz.DistributedOptimizer(adam, model)
for epoch in danaz.epochs(3):
    for a, b in danaz.shard(DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True), epoch):
        optimizer.zero_grad()
        mse_loss(model(a), b).backward()
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
save(model)
"""

GAN = """
x = torch.randn(40, 4, generator=generator)
critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
maker = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4))
options = {"lr": 0.01, "betas": (0.5, 0.99)}
of_critic = danaz.DistributedOptimizer(torch.optim.Adam(critic.parameters(), **options), critic)
of_maker = danaz.DistributedOptimizer(torch.optim.Adam(maker.parameters(), **options), maker)
softplus = nn.functional.softplus
for epoch in danaz.epochs(3):
    for number, [real] in enumerate(danaz.shard(DataLoader(TensorDataset(x), batch_size=8, shuffle=True), epoch)):
        of_critic.zero_grad()
        fake = maker(real[:, :2])
        (softplus(-critic(real)) + softplus(critic(fake.detach()))).mean().backward()
        before = critic[0].weight.clone()
        of_critic.step()
        assert not torch.equal(critic[0].weight, before)
        if number % 2 == 0:
            of_maker.zero_grad()
            softplus(-critic(fake)).mean().backward()
            of_maker.step()
save(nn.ModuleList([critic, maker]))
"""


def states(folder: Path) -> list[dict[str, Tensor]]:
    return [torch.load(path) for path in sorted(folder.glob("model.*"))]


def run_alone(body: str, tmp_path: Path) -> dict[str, Tensor]:
    folder = tmp_path / "alone"
    folder.mkdir()
    script = tmp_path / "script.py"
    script.write_text(HEAD + body)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(live.ROOT)}
    ended = subprocess.run(
        [sys.executable, str(script), str(folder)], env=env, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    [state] = states(folder)
    return state


def run_launched(
    body: str, tmp_path: Path, *arguments: str, stop: str = ""
) -> tuple[live.Run, list[dict[str, Tensor]]]:
    script = tmp_path / "script.py"
    script.write_text(HEAD + body)
    run = live.launch(*arguments, out=tmp_path / "run", script=[str(script), str(tmp_path), *[stop] * bool(stop)])
    return run, states(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "collective"), [("ssgd", "torch"), ("dana", "horovod")])
def test_batch_norm_over_ranks_is_that_of_the_whole_batch(algorithm: str, collective: str, tmp_path: Path) -> None:
    alone = run_alone(NORMED, tmp_path)
    _, found = run_launched(NORMED, tmp_path, *TWO_RANKS, "--algorithm", algorithm, "--collective", collective)
    assert len(found) == 2
    for state in found:
        for name, value in alone.items():
            torch.testing.assert_close(
                state[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
    whole = torch.load(tmp_path / "whole", weights_only=False)
    assert type(whole[1]) is torch.nn.SyncBatchNorm


@pytest.mark.slow
@pytest.mark.parametrize("collective", ["torch", "horovod"])
def test_a_rank_may_end_the_run_while_another_is_in_batch_norm(collective: str, tmp_path: Path) -> None:
    run, found = run_launched(
        NORMED, tmp_path, *TWO_RANKS, "--collective", collective, "--algorithm", "ssgd", stop="yes"
    )
    assert run.summary["stopped"] == "enough"
    assert len(found) == 2
    counters = {name for name in found[0] if name.endswith("num_batches_tracked")}  # which each rank has for itself
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0].keys() - counters)


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "collective"), [("ssgd", "torch"), ("dana", "horovod")])
def test_types_and_sparse_gradients_on_two_ranks(algorithm: str, collective: str, tmp_path: Path) -> None:
    alone = run_alone(MIXED, tmp_path)
    run, found = run_launched(MIXED, tmp_path, *TWO_RANKS, "--algorithm", algorithm, "--collective", collective)
    assert run.output.count("danaz makes such gradients dense") == 1
    assert len(found) == 2
    for state in found:
        for name, value in alone.items():
            assert state[name].dtype == value.dtype
            torch.testing.assert_close(state[name], value, rtol=2e-2, atol=2e-2)
            assert torch.equal(state[name], found[0][name])


@pytest.mark.parametrize("algorithm", ["dana", pytest.param("dana-zero", marks=pytest.mark.slow)])
def test_a_gan_on_two_workers_of_two_ranks(algorithm: str, tmp_path: Path) -> None:
    body = GAN if algorithm == "dana" else GAN.replace("assert not torch.equal", "assert torch.equal")
    run, found = run_launched(body, tmp_path, *FOUR_RANKS, "--algorithm", algorithm, "--record")
    assert (run.summary["complete"], run.summary["workers"], run.summary["updates"]) == (True, 2, 15)
    assert sorted(update["batch"] for update in run.updates) == list(range(15))
    assert ("moves all their parameters together" in run.output) == (algorithm == "dana-zero")
    assert len(found) == 4
    for state in found:
        assert all(torch.equal(value, found[0][name]) and value.isfinite().all() for name, value in state.items())
    assert replay_run(run.folder) == (15, True)
