"""torch's schedulers under danaz: on every worker, rates follow the progress of the whole cluster."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import live
import pytest
import torch
from loops import BATCH, EPOCHS, adopt, alone, make_data, make_net, make_plain_sgd, usual_step
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils.data import DataLoader

from danaz.torch.schedulers import UnsupportedSchedulerError, follow

BATCHES = 3  # number of batches in an epoch of make_data
TOTAL = BATCHES * EPOCHS

SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "one cycle": lambda sgd: OneCycleLR(sgd, 0.5, total_steps=TOTAL, cycle_momentum=False),
    "cosine": lambda sgd: CosineAnnealingLR(sgd, T_max=TOTAL),
    "exponential": lambda sgd: ExponentialLR(sgd, 0.9),
    "lambda": lambda sgd: LambdaLR(sgd, lambda step: 1 / (1 + step)),
    "warm-up, then cosine": lambda sgd: SequentialLR(
        sgd, [LinearLR(sgd, 0.1, total_iters=3), CosineAnnealingLR(sgd, TOTAL - 3)], milestones=[3]
    ),
    "warm restarts": lambda sgd: CosineAnnealingWarmRestarts(sgd, T_0=4),
}


def course(make: Callable[[Optimizer], LRScheduler], steps: int) -> list[float]:
    """Return the rates of one worker that makes all steps: before each step, and after the last."""
    sgd = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler, rates = make(sgd), []
    for _ in range(steps):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    return [*rates, sgd.param_groups[0]["lr"]]


@dataclass
class Cluster:
    """A cluster whose progress a test sets."""

    completed: int = 0
    own_batches: int = 0
    in_loop: bool = True
    epochs_over: int = 0

    @property
    def epoch(self) -> float:
        return self.completed / BATCHES

    @property
    def ticks(self) -> float:
        return self.completed


def followed(
    make: Callable[[Optimizer], LRScheduler], cluster: Cluster, one_worker: bool = False
) -> tuple[SGD, LRScheduler]:
    sgd = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    scheduler = make(sgd)
    follow([sgd], cluster, one_worker=one_worker)
    sgd.step()
    return sgd, scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_worker_has_the_rate_of_the_clusters_steps_and_not_of_its_own(name: str) -> None:
    """The worker makes every third of the cluster's steps, and ends with the rate that one worker would end with."""
    expected = course(SCHEDULERS[name], TOTAL)
    cluster = Cluster()
    sgd, scheduler = followed(SCHEDULERS[name], cluster)
    for completed in (1, 4, 7, TOTAL):
        cluster.own_batches, cluster.completed = cluster.own_batches + 1, completed
        scheduler.step()
        assert sgd.param_groups[0]["lr"] == pytest.approx(expected[completed])


class Wrapper(Optimizer):
    """Another library's optimizer around one: it has the same parameter groups."""

    def __init__(self, inside: Optimizer):
        self.inside = inside

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inside.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inside.step(closure)


def test_a_scheduler_of_another_librarys_wrapper_follows_too() -> None:
    """Such as accelerate's. Otherwise, the rates of each worker would follow its own steps without a word."""
    sgd = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    wrapper = Wrapper(sgd)
    scheduler = CosineAnnealingLR(wrapper, T_max=TOTAL)
    follow([sgd], Cluster(own_batches=1, completed=4), one_worker=False)
    wrapper.step()
    scheduler.step()
    assert sgd.param_groups[0]["lr"] == pytest.approx(course(SCHEDULERS["cosine"], TOTAL)[4])


def test_a_scheduler_of_another_optimizer_does_not_follow() -> None:
    other = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = ExponentialLR(other, 0.5)
    followed(SCHEDULERS["cosine"], Cluster(own_batches=1, completed=4))
    other.step()
    scheduler.step()
    assert other.param_groups[0]["lr"] == pytest.approx(0.05)


def test_one_that_is_stepped_at_every_second_batch() -> None:
    cluster = Cluster()
    sgd, scheduler = followed(SCHEDULERS["exponential"], cluster)
    for batch in range(1, 9):
        cluster.own_batches, cluster.completed = batch, 2 * batch
        if batch % 2 == 0:
            scheduler.step()
    assert sgd.param_groups[0]["lr"] == pytest.approx(course(SCHEDULERS["exponential"], 8)[8])


def test_one_that_is_stepped_between_epochs_makes_a_step_an_epoch() -> None:
    cluster = Cluster(in_loop=False)
    sgd, scheduler = followed(lambda sgd: MultiStepLR(sgd, [1, 2], gamma=0.1), cluster)
    rates = []
    for epoch in range(3):
        cluster.completed = BATCHES * (epoch + 1)
        rates.append(sgd.param_groups[0]["lr"])
        scheduler.step()
    assert rates == pytest.approx([0.1, 0.01, 0.001])


def test_a_worker_that_comes_back_catches_up() -> None:
    cluster = Cluster(completed=2 * BATCHES, epochs_over=2, in_loop=False)
    sgd, _ = followed(lambda sgd: MultiStepLR(sgd, [1, 2], gamma=0.1), cluster)
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.001), "two epochs are over"
    cluster = Cluster(completed=5, epochs_over=1)
    sgd, scheduler = followed(SCHEDULERS["one cycle"], cluster)
    cluster.own_batches, cluster.completed = 1, 6
    scheduler.step()
    assert sgd.param_groups[0]["lr"] == pytest.approx(course(SCHEDULERS["one cycle"], TOTAL)[6])


@pytest.mark.parametrize("own_batches", [0, 1])
def test_torchs_warning_of_a_missing_step_spares_a_worker_that_got_no_batch(own_batches: int) -> None:
    """Such a worker cannot step its optimizer; a script that has a batch and does not step is still warned."""
    sgd = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = MultiStepLR(sgd, [1], gamma=0.1)
    follow([sgd], Cluster(completed=BATCHES, own_batches=own_batches, in_loop=False), one_worker=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scheduler.step()
    assert ["lr_scheduler.step()` before `optimizer.step()" in str(each.message) for each in caught] == (
        [True] * own_batches
    )
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.01)


def test_an_epoch_that_the_script_works_out_itself() -> None:
    cluster = Cluster()
    sgd, scheduler = followed(SCHEDULERS["warm restarts"], cluster)
    cluster.own_batches, cluster.completed = 1, 4
    scheduler.step(1 / BATCHES)  # computed from its own batches
    expected, by_progress = followed(SCHEDULERS["warm restarts"], Cluster(completed=4))
    by_progress.step(4 / BATCHES)
    assert sgd.param_groups[0]["lr"] == pytest.approx(expected.param_groups[0]["lr"])
    with pytest.raises(UnsupportedSchedulerError, match=r"danaz\.progress\(\)"):
        scheduler.step(3)


@pytest.mark.parametrize(
    "make",
    [
        lambda sgd: OneCycleLR(sgd, 0.5, total_steps=TOTAL),
        lambda sgd: CyclicLR(sgd, 0.01, 0.1, cycle_momentum=True),
    ],
)
def test_a_momentum_that_cycles_is_refused(make: Callable[[Optimizer], LRScheduler]) -> None:
    with pytest.raises(UnsupportedSchedulerError, match="cycle_momentum=False"):
        followed(make, Cluster())


def test_a_plateau_is_each_workers_own() -> None:
    with pytest.raises(UnsupportedSchedulerError, match="ReduceLROnPlateau would see another figure on each worker"):
        followed(ReduceLROnPlateau, Cluster())
    sgd, scheduler = followed(lambda sgd: ReduceLROnPlateau(sgd, patience=0), Cluster(), one_worker=True)
    for figure in (1.0, 2.0, 2.0):
        scheduler.step(figure)
    assert sgd.param_groups[0]["lr"] < 0.1


def test_what_a_script_saves_of_its_scheduler_is_as_ever() -> None:
    _, scheduler = followed(SCHEDULERS["cosine"], Cluster())
    sgd = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    untouched = SCHEDULERS["cosine"](sgd)
    assert scheduler.state_dict().keys() == untouched.state_dict().keys()
    json.dumps(scheduler.state_dict())
    assert isinstance(scheduler, CosineAnnealingLR)
    assert repr(type(scheduler)) == repr(CosineAnnealingLR)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("of_the_wrapped_one", [True, False])
def test_a_script_alone_has_torchs_rates_step_by_step(name: str, of_the_wrapped_one: bool) -> None:
    model, rates = make_net(), []
    with alone() as session:
        sgd = make_plain_sgd(model)
        scheduler = SCHEDULERS[name](sgd) if of_the_wrapped_one else None
        optimizer = adopt(session, model, sgd)
        scheduler = scheduler or SCHEDULERS[name](optimizer)
        session.epochs = EPOCHS
        for epoch in range(EPOCHS):
            for x, y in session.shard(DataLoader(make_data(), batch_size=BATCH), epoch):
                rates.append(optimizer.param_groups[0]["lr"])
                usual_step(model, optimizer, x, y)
                scheduler.step()
        session.finish()
    assert rates == pytest.approx(course(SCHEDULERS[name], TOTAL)[:-1])


SCRIPT = """
import time
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
import danaz.torch as danaz

danaz.init()
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = danaz.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
loader = DataLoader(TensorDataset(torch.randn(120, 3), torch.randn(120, 1)), batch_size=10, shuffle=True)
scheduler = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, 0.1, epochs=3, steps_per_epoch=len(loader), cycle_momentum=False
)
for epoch in danaz.epochs(3):
    for x, y in danaz.shard(loader, epoch):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
        scheduler.step()
        if danaz.worker_id() == 1:
            time.sleep(0.05)  # an unequal machine
"""


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "hosts"), [("dana", ["localhost:2", "--workers-per-host", "2"])])
def test_one_cycle_over_unequal_workers_has_the_rates_of_one(algorithm: str, hosts: list[str], tmp_path: Path) -> None:
    """Each update has the rate that one worker had at the version whose view it was computed on."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = live.launch("--hosts", *hosts, "-a", algorithm, out=tmp_path / "run", script=[str(script)])
    steps = 36
    expected = course(lambda sgd: OneCycleLR(sgd, 0.1, total_steps=steps, cycle_momentum=False), steps)
    updates = run.updates
    assert len(updates) == steps
    shares = [sum(update["worker"] == worker for update in updates) for worker in (0, 1)]
    assert shares[0] > shares[1] > 0, "the workers were equally fast: nothing was tried"
    for update in updates:
        seen = update["version"] - 1 - update["lag"]
        assert update["lr"] == pytest.approx(expected[seen], rel=1e-6), update


@pytest.mark.slow
def test_one_cycle_over_an_all_reduce_world_ends_where_it_should(tmp_path: Path) -> None:
    """Each update takes the batches of two machines, so there are half as many. The rates' course is the same."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    run = live.launch(
        *("--hosts", "localhost:2", "--workers-per-host", "2", "-a", "ssgd"), out=tmp_path / "run", script=[str(script)]
    )
    expected = course(lambda sgd: OneCycleLR(sgd, 0.1, total_steps=36, cycle_momentum=False), 36)
    assert [update["lr"] / 2 for update in run.updates] == pytest.approx(expected[:-1:2], rel=1e-6)
