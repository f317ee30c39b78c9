"""A script that counts steps, and draws the batch of each one itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import live
import pytest
import torch
from loops import adopt, alone, assert_same, make_net, make_sgd
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR

from danaz.files.seeds import derive_seed
from danaz.torch.loop import LoopError
from danaz.torch.session import NotInitializedError, Session

STEPS = 12


def draw(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 5, 5, generator=generator), torch.randn(4, 2, generator=generator)


def train(session: Session, model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[int]:
    optimizer, numbers = adopt(session, model, make(model)), []
    for step in session.run_steps(STEPS, samples=4):
        x, y = draw(session.seed_for(step))
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        numbers.append(step)
    return numbers


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 0.01, betas=(0.0, 0.9))


@pytest.mark.parametrize("algorithm", ["dana", "baseline", "ssgd"])
def test_one_worker_equals_torch(algorithm):
    ours, theirs = make_net(), make_net()
    with alone(algorithm) as session:
        session.choose_seed(7)
        assert train(session, ours, adam) == list(range(STEPS))
        assert session.finished
    optimizer = adam(theirs)
    for step in range(STEPS):
        x, y = draw(derive_seed(7, step, 0))
        optimizer.zero_grad()
        mse_loss(theirs(x), y).backward()
        optimizer.step()
    assert_same(ours, theirs)


def test_the_records_count_updates_and_samples(servers):
    with alone() as session:
        train(session, make_net(), make_sgd)
        [server] = servers
        summary = server.summary()
    assert (summary["updates"], summary["epochs"], server.totals.samples) == (STEPS, 1.0, 4 * STEPS)


def test_a_step_can_be_skipped_and_counts_as_used(servers):
    model = make_net()
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        for step in session.run_steps(STEPS, samples=4):
            x, y = draw(step)
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            if step % 3:
                optimizer.step()
        [server] = servers
        assert server.summary()["updates"] == STEPS * 2 // 3
        assert server.summary()["skipped_batches"] == STEPS // 3


def test_schedulers_follow_the_steps():
    model = make_net()
    rates = []
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        scheduler = OneCycleLR(optimizer, 0.1, total_steps=STEPS, cycle_momentum=False)
        for step in session.run_steps(STEPS, samples=4):
            x, y = draw(step)
            mse_loss(model(x), y).backward()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    sgd = make_sgd(copy.deepcopy(model))
    theirs = OneCycleLR(sgd, 0.1, total_steps=STEPS, cycle_momentum=False)
    expected = []
    for _ in range(STEPS):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        theirs.step()
    assert rates == pytest.approx(expected)


def test_the_length_is_the_workers_part_of_the_steps():
    with alone() as session:
        assert len(session.run_steps(STEPS, samples=1)) == STEPS


def test_leaving_the_loop_early_and_finishing_keeps_what_was_trained(servers):
    model = make_net()
    with alone() as session:
        optimizer = adopt(session, model, make_sgd(model))
        for step in session.run_steps(STEPS, samples=4):
            if step == 5:
                break
            x, y = draw(step)
            mse_loss(model(x), y).backward()
            optimizer.step()
        session.finish()
        [server] = servers
        assert server.summary()["updates"] == 5


@pytest.mark.parametrize("count", [0, -1, 2.0, True, None])
def test_a_number_of_steps_that_is_none_is_refused(count):
    with alone() as session, pytest.raises(ValueError, match="number of steps, a whole number from 1 up, not"):
        session.run_steps(count, samples=1)
    with alone() as session, pytest.raises(ValueError, match="number of samples, a whole number from 1 up, not"):
        session.run_steps(1, samples=count)


def test_a_run_has_one_loop():
    with alone() as session:
        session.run_steps(3, samples=1)
        with pytest.raises(LoopError, match="one loop over its"):
            session.run_epochs(3)


def test_a_step_has_no_seed_before_the_run():
    with alone() as session, pytest.raises(NotInitializedError, match="nothing is known of the run yet"):
        session.seed_for(0)


SCRIPT = """
import sys, torch
from torch import nn
import danaz.torch as danaz

danaz.init()
torch.manual_seed(0)
model = nn.Linear(6, 2)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
optimizer = danaz.DistributedOptimizer(optimizer, model)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40, cycle_momentum=False)
with open(f"{sys.argv[1]}/seeds.{danaz.worker_id()}.{danaz.rank()}", "w") as seeds:
    for step in danaz.steps(40, samples=8):
        seed = danaz.seed_for(step)
        print(step, seed, file=seeds, flush=True)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 6, generator=generator)
        loss = nn.functional.mse_loss(model(x), x[:, :2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        scheduler.step()
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("algorithm", ["dana", "ssgd"])
def test_two_workers_of_two_ranks_share_the_steps(algorithm: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = live.launch(
        *("--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", algorithm, "--seed", "5"),
        out=tmp_path / "run",
        script=[str(script), str(tmp_path)],
    )
    assert (run.summary["complete"], run.summary["updates"]) == (True, 40)
    seeds = [
        [tuple(map(int, line.split())) for line in path.read_text().splitlines()] for path in tmp_path.glob("seeds.*")
    ]
    assert len(seeds) == 4
    every = [pair for each in seeds for pair in each]
    assert len({seed for _, seed in every}) == len(every), "no two ranks draw the same batch"
    rates = [update["lr"] for update in run.updates]
    assert min(rates[-5:]) < max(rates) / 20, "the schedule follows the cluster to its end"
    if algorithm == "ssgd":
        assert rates.index(max(rates)) in (11, 12), "and no further"
        assert all([step for step, _ in each] == list(range(40)) for each in seeds)
    else:
        assert sorted(step for step, _ in every) == sorted([*range(40), *range(40)]), "each step is one worker's"
        losses = [update["loss"] for update in run.updates]
        assert sum(losses[-10:]) < sum(losses[:10]), "it learns, and one loss alone is of 8 samples"
