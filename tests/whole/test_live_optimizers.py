"""Real runs with Adam: workers of two Horovod ranks each, under a server and under all-reduce."""

from __future__ import annotations

from pathlib import Path

import live
import pytest
import torch
from shipped import CONFIGS
from torch import nn

from danaz.serving.serve import replay_run
from danaz.torch.data import Batching

pytestmark = pytest.mark.timeout(300)
ADAMW = (
    str(CONFIGS / "digits-adam.yaml"),
    *("--set", "optimizer=adamw", "--set", "weight_decay=0.01", "--set", "epochs=3"),
    *("--set", "optimizer_options.betas=[0.9, 0.99]", "--collective", "horovod"),
    *("--hosts", "localhost:4", "--workers-per-host", "2"),
)


@pytest.mark.parametrize("algorithm", ["dana", pytest.param("dana-zero", marks=pytest.mark.slow)])
def test_two_workers_of_two_ranks_learn_under_a_server(algorithm: str, tmp_path: Path) -> None:
    run = live.launch(*ADAMW, "--algorithm", algorithm, "--record", out=tmp_path / "run")
    assert (run.summary["complete"], run.summary["workers"], run.summary["updates"]) == (True, 2, 135)
    assert sorted(update["batch"] for update in run.updates) == list(range(135))
    assert run.summary["test_error_percent"] < 20, "an untrained model errs on 90 %"
    assert replay_run(run.folder) == (135, True)


OWN = """
import sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import danaz.torch as danaz

danaz.init()
generator = torch.Generator().manual_seed(3)
x, y = torch.randn(50, 6, generator=generator), torch.randn(50, 2, generator=generator)
torch.manual_seed(danaz.rank())  # rank 0's parameters are everyone's
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
optimizer = danaz.DistributedOptimizer(torch.optim.Adadelta(model.parameters(), lr=1.0), model)
for epoch in danaz.epochs(4):
    for a, b in danaz.shard(DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True), epoch):
        loss = nn.functional.mse_loss(model(a), b)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
torch.save(model.state_dict(), f"{sys.argv[1]}/model.{danaz.worker_id()}.{danaz.rank()}")
"""


@pytest.mark.slow
def test_a_class_that_danaz_does_not_know_makes_the_steps_of_ssgd(tmp_path: Path) -> None:
    """Two workers of two ranks, each batch 2·8: all replicas equal one process that has all the batches."""
    script = tmp_path / "script.py"
    script.write_text(OWN)
    live.launch(
        *("--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", "ssgd", "--lr-scaling", "none"),
        out=tmp_path / "run",
        script=[str(script), str(tmp_path)],
    )
    states = [torch.load(path) for path in sorted(tmp_path.glob("model.*"))]
    assert len(states) == 4
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(50, 6, generator=generator), torch.randn(50, 2, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    for batch in range(16):
        indices = Batching(50, 16).indices(batch)
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[indices]), y[indices]).backward()
        optimizer.step()
    for state in states:
        for name, p in model.named_parameters():
            assert torch.equal(state[name], states[0][name])
            torch.testing.assert_close(state[name], p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_class_that_danaz_does_not_know_makes_local_steps(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(OWN)
    run = live.launch(
        *("--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", "easgd", "--sync-period", "2"),
        out=tmp_path / "run",
        script=[str(script), str(tmp_path)],
    )
    assert run.summary["complete"]
    states = [torch.load(path) for path in sorted(tmp_path.glob("model.*"))]
    torch.manual_seed(0)
    first = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).state_dict()
    assert len(states) == 4
    for name, values in first.items():
        assert all(torch.equal(state[name], states[0][name]) for state in states), "all ranks end with the centre"
        assert states[0][name].isfinite().all()
        assert not torch.equal(states[0][name], values), "which has moved"


@pytest.mark.slow
def test_ssgd_takes_the_root_of_the_number_of_workers(tmp_path: Path) -> None:
    run = live.launch(*ADAMW, "--algorithm", "ssgd", out=tmp_path / "run")
    assert run.summary["complete"]
    assert run.summary["test_error_percent"] < 20
    [lr] = {update["lr"] for update in run.updates}
    assert lr == pytest.approx(1e-3 * 2**0.5)
