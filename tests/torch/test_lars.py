"""LARS in the user's loop. A layer is a parameter of the model; the optimizer's groups give the weight decay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import live
import pytest
import torch
from cluster import Cluster
from loops import BATCH, EPOCHS, SAMPLES, assert_same, make_data, make_net, make_sgd, make_sgd_of_groups, train
from torch import nn
from torch.nn.functional import mse_loss

from danaz.torch.data import Batching
from danaz.vectors.cutting import SLICE_FLOATS

TRUST = 0.001


def train_with_lars(
    model: nn.Module, make: Callable[[nn.Module], torch.optim.SGD], batch_size: int, scale: int
) -> None:
    """Train as in You et al., algorithm 1, in double precision; a layer that is zero takes the rate as it is."""
    model.double()
    groups, data, batching = make(model).param_groups, make_data(), Batching(SAMPLES, batch_size)
    velocity = {p: torch.zeros_like(p) for p in model.parameters()}
    for batch in range(batching.plan(EPOCHS).batches):
        x, y = data[batching.indices(batch)]
        model.zero_grad()
        mse_loss(model(x.double()), y.double()).backward()
        for group in groups:
            decay = group["weight_decay"]
            for w in group["params"]:
                g = torch.zeros_like(w) if w.grad is None else w.grad
                below = g.norm() + decay * w.norm()
                ratio = TRUST * w.norm() / below if w.norm() > 0 and below > 0 else 1.0
                velocity[w] = group["momentum"] * velocity[w] + group["lr"] * scale * ratio * (g + decay * w.data)
                w.data -= velocity[w]
    model.float()


def zero_biases(model: nn.Module) -> nn.Module:
    for layer in (model.convolution, model.last):
        nn.init.zeros_(layer.bias)
    return model


@pytest.mark.parametrize("make", [make_sgd, make_sgd_of_groups])
@pytest.mark.parametrize("prepare", [lambda model: model, zero_biases], ids=["", "biases from zero"])
def test_it_is_the_papers(make, prepare):
    ours, theirs, before = prepare(make_net()), prepare(make_net()), prepare(make_net())
    train(ours, make, algorithm="ssgd-lars")
    train_with_lars(theirs, make, BATCH, scale=1)
    assert_same(ours, theirs, 1e-6)
    assert all(not torch.equal(p, q) for p, q in zip(ours.last.parameters(), before.last.parameters(), strict=True))


def test_a_layer_longer_than_a_slice_is_not_cut():
    long, size = SLICE_FLOATS + 5, SLICE_FLOATS + 12
    params, grad = torch.linspace(1, 2, size), torch.linspace(-1, 1, size)
    cluster = Cluster("ssgd-lars", 2, params, groups=(long, 7), weight_decay=(0.1, 0.0))
    for worker in (0, 1):
        cluster.push(worker, grad.clone(), 0.1)
    # γ = 0.9, v = 0 before: the step is ηκ‖w‖/(‖g‖ + β‖w‖) · (g + βw), in the first layer β = 0.1
    w, pushed = params[:long].double(), grad[:long].double()
    rate = 0.1 * TRUST * w.norm() / ((pushed - 0.1 * w).norm() + 0.1 * w.norm())
    torch.testing.assert_close(cluster.server.master.params[:long].double(), w - rate * pushed, rtol=1e-6, atol=0)


SCRIPT = """
import sys
import torch
from loops import EPOCHS, make_data, make_net, make_sgd_of_groups
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader
import danaz.torch as danaz

danaz.init()
model = make_net()
optimizer = danaz.DistributedOptimizer(make_sgd_of_groups(model), model)
for epoch in danaz.epochs(EPOCHS):
    for x, y in danaz.shard(DataLoader(make_data(), batch_size=5, shuffle=True), epoch):
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step(loss=loss)
torch.save(model.state_dict(), f"{sys.argv[1]}.{danaz.rank()}")
"""


def test_live_two_workers_are_one_with_both_batches_and_twice_the_rate(tmp_path: Path, monkeypatch) -> None:
    """In a world of two processes, the norms are those of the mean gradient."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(live.ROOT / "tests/support"))
    where = ("--hosts", "localhost:2", "--workers-per-host", "2", "--algorithm", "ssgd-lars", "--warmup-epochs", "0")
    live.launch(*where, out=tmp_path / "run", script=[str(tmp_path / "script.py"), str(tmp_path / "model")])
    theirs = make_net()
    train_with_lars(theirs, make_sgd_of_groups, batch_size=10, scale=2)
    for rank in (0, 1):
        ours = make_net()
        ours.load_state_dict(torch.load(tmp_path / f"model.{rank}"))
        assert_same(ours, theirs, 1e-6)
