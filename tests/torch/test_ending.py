"""Runs that a script ends early, or that a process enters late: over real sockets, and with real ranks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import live
import pytest
import torch
from sockets import PATIENCE_S
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import danaz.worker.link
from danaz.server.settings import ServerSettings
from danaz.torch.ending import UNFINISHED
from danaz.torch.optimizer import DistributedOptimizer
from danaz.torch.session import Session
from scripts import Counted, ScriptCluster, make_optimizer

BATCHES = 5  # number of batches in an epoch


class Script:
    """Does what a script does, on a thread that plays a worker."""

    def __init__(self, cluster: ScriptCluster, session: Session, number: int, with_schedule: bool = False):
        self.session = session
        self.model, self.optimizer = make_optimizer(session)
        self.loader = DataLoader(Counted(2 * BATCHES, number, cluster.fetched, lambda: None), batch_size=2)
        self.schedule = StepLR(self.optimizer, 1) if with_schedule else None
        self.epochs: list[int] = []

    def train(self, epoch: int) -> None:
        self.epochs.append(epoch)
        for x, y in self.session.run_batches(self.loader, epoch):
            step(self.model, self.optimizer, x, y)


def step(model: nn.Module, optimizer: DistributedOptimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    optimizer.step()


def test_a_worker_that_stops_ends_the_run_for_the_others() -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=3))
    models: dict[int, nn.Module] = {}

    def story(session: Session, number: int) -> None:
        script = Script(cluster, session, number)
        models[number] = script.model
        for epoch in session.run_epochs(10_000):
            script.train(epoch)
            if number == 1 and epoch == 2:
                session.stop("worker 1 has seen enough")

    for number in range(3):
        cluster.worker(number, story)
    cluster.run()
    summary = cluster.core.summary()
    assert (summary["stopped"], summary["complete"], summary["refusals"]) == ("worker 1 has seen enough", True, {})
    assert 2 <= summary["epochs"] < 10_000
    for model in models.values():
        theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.equal(theta, cluster.core.master.params)


def test_who_comes_late_begins_in_the_clusters_epoch() -> None:
    """A torch schedule that is stepped between epochs has also caught up."""
    cluster = ScriptCluster(ServerSettings("dana", workers=1))
    two_epochs, joined = threading.Event(), threading.Event()
    seen: dict[str, Any] = {}

    def first(session: Session, number: int) -> None:
        script = Script(cluster, session, number)
        for epoch in session.run_epochs(4):
            script.train(epoch)
            if epoch == 1:
                two_epochs.set()
                assert joined.wait(PATIENCE_S)

    def late(session: Session, number: int) -> None:
        assert two_epochs.wait(PATIENCE_S)
        script = Script(cluster, session, number, with_schedule=True)
        for epoch in session.run_epochs(4):
            next(session.run_batches(script.loader, epoch))
            assert script.schedule is not None
            seen.update({"epoch": epoch, "of the schedule": script.schedule.last_epoch})
            joined.set()
            break
        session.finish()

    cluster.worker(0, first)
    cluster.worker(1, late)
    cluster.run()
    assert seen == {"epoch": 2, "of the schedule": 2}
    assert cluster.counts().keys() == set(range(2 * BATCHES))
    assert cluster.core.leases.epoch == 4


# ---- workers that skip all their batches ----------------------------------------------------------------------------


def skip(script: Script, hold: Callable[[], object] = lambda: None) -> None:
    """Skip every batch that the worker gets in the epoch, as a script does whose loss is not finite."""
    for epoch in script.session.run_epochs(1):
        script.epochs.append(epoch)
        for _ in script.session.run_batches(script.loader, epoch):
            hold()


def test_a_worker_that_skips_its_only_batch_ends_with_the_model_that_the_others_trained() -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=2))
    others_done = threading.Event()
    models: dict[int, nn.Module] = {}

    def trains(session: Session, number: int) -> None:
        script = Script(cluster, session, number)
        models[number] = script.model
        for epoch in session.run_epochs(1):
            for count, (x, y) in enumerate(session.run_batches(script.loader, epoch), start=1):
                step(script.model, script.optimizer, x, y)
                if count == BATCHES - 1:
                    others_done.set()

    def skips(session: Session, number: int) -> None:
        script = Script(cluster, session, number)
        models[number] = script.model
        skip(script, hold=lambda: others_done.wait(PATIENCE_S))

    cluster.worker(0, trains)
    cluster.worker(1, skips)
    cluster.run()
    summary = cluster.core.summary()
    assert (summary["updates"], summary["skipped_batches"], summary["complete"]) == (BATCHES - 1, 1, True)
    assert cluster.batches_by_worker() == {0: BATCHES - 1}
    for model in models.values():
        theta = torch.cat([p.detach().flatten() for p in model.parameters()])
        assert torch.equal(theta, cluster.core.master.params)


@pytest.mark.parametrize("stops", [False, True])
def test_a_worker_that_skips_its_only_batch_may_leave_before_it_hears_of_an_update(stops: bool) -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=2))
    leaves = threading.Event()

    def trains(session: Session, number: int) -> None:
        script = Script(cluster, session, number)
        for epoch in session.run_epochs(1):
            for x, y in session.run_batches(script.loader, epoch):
                assert leaves.wait(PATIENCE_S)
                step(script.model, script.optimizer, x, y)

    def skips(session: Session, number: int) -> None:
        script = Script(cluster, session, number)
        for epoch in session.run_epochs(1):
            for count, _ in enumerate(session.run_batches(script.loader, epoch)):
                if count == 1:
                    break
            leaves.set()
            if stops:
                session.stop("the loss is not finite")
            session.finish()

    cluster.worker(0, trains)
    cluster.worker(1, skips)
    cluster.run()
    summary = cluster.core.summary()
    assert (summary["stopped"], summary["skipped_batches"]) == ("the loss is not finite" if stops else None, 1)


def test_workers_that_all_skip_their_batches_are_told_that_nothing_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(danaz.worker.link, "HEARTBEAT_S", 0.05)
    cluster = ScriptCluster(ServerSettings("dana", workers=2, worker_timeout_s=2.0))
    both_told = threading.Barrier(2, timeout=PATIENCE_S)
    told: list[int] = []

    def skips(session: Session, number: int) -> None:
        with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) was never called, so nothing was trained"):
            skip(Script(cluster, session, number))
        told.append(number)
        both_told.wait()

    cluster.worker(0, skips)
    cluster.worker(1, skips)
    cluster.run()
    assert sorted(told) == [0, 1]
    assert not cluster.updates


# ---- ranks ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import danaz.torch as danaz

manner, out = sys.argv[1:]
danaz.init()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
optimizer = danaz.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model)
loader = DataLoader(TensorDataset(torch.randn(85, 6), torch.randn(85, 2)), batch_size=8, shuffle=True)
is_last = danaz.worker_id() == danaz.num_workers() - 1 and danaz.rank() == danaz.size() - 1
steps = 0
for epoch in danaz.epochs(1000):
    for x, y in danaz.shard(loader, epoch):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        if is_last and steps == 3 and manner == "stop before a step":
            danaz.stop(manner)
            break
        optimizer.step(loss=loss)
        steps += 1
        if is_last and steps == 3 and manner == "stop after a step":
            danaz.stop(manner)
            break
        if is_last and steps == 3 and manner == "exit":
            sys.exit(0)
    if danaz.is_main() and epoch == 1 and manner == "stop by the main process":
        danaz.stop(manner)
        break
    if epoch == 1 and manner == "stop by all":
        danaz.stop(manner)
places = [danaz.is_main(), danaz.local_rank(), danaz.local_size()]
shared = danaz.broadcast_object({"from": danaz.rank(), "bytes": b"0", "list": [1.5, None, True]})
mean = danaz.mean(float(danaz.rank()))
state = {**model.state_dict(), "mean": danaz.mean(torch.full((2,), danaz.rank(), dtype=torch.float32))}
torch.save([state, places, shared, mean], f"{out}/{danaz.worker_id()}.{danaz.rank()}")
"""


def launch(manner: str, tmp_path: Path, *arguments: str, succeeds: bool = True) -> tuple[live.Run, list[Any]]:
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    out.mkdir()
    options = ("--hosts", "localhost:4", "--workers-per-host", "2", *arguments)
    run = live.launch(*options, out=tmp_path / "run", succeeds=succeeds, script=[str(script), manner, str(out)])
    return run, [torch.load(path) for path in sorted(out.iterdir())]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("manner", "algorithm", "options"),
    [
        ("stop before a step", "ssgd", ["--collective", "horovod"]),
        ("stop after a step", "ssgd", ["--collective", "torch"]),
        ("stop by the main process", "ssgd", ["--collective", "horovod"]),
        ("stop by all", "ssgd", ["--collective", "torch"]),
        ("stop before a step", "dana", ["--collective", "torch"]),
        ("stop after a step", "dana", ["--server-shards", "2"]),
        ("stop by the main process", "dana", ["--pipeline"]),
        ("stop by all", "dana", ["--collective", "horovod"]),
    ],
)
def test_any_rank_ends_the_run_for_all(manner: str, algorithm: str, options: list[str], tmp_path: Path) -> None:
    run, saved = launch(manner, tmp_path, "--algorithm", algorithm, *options)
    assert (run.summary["stopped"], run.summary["complete"]) == (manner, True)
    assert run.summary["updates"] < 11_000
    states = [state for state, *_ in saved]
    assert len(states) == 4
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items() if "num_batches" not in name)
    ranks = 4 if algorithm == "ssgd" else 2
    assert sorted(places for _, places, *_ in saved) == sorted([number == 0, number, 4] for number in range(4)), (
        "one main process, and all are on one machine"
    )
    for state, _, shared, mean in saved:
        assert shared == {"from": 0, "bytes": b"0", "list": [1.5, None, True]}
        assert mean == (ranks - 1) / 2
        assert state["mean"].tolist() == [(ranks - 1) / 2] * 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_exits_in_mid_run_is_the_one_that_is_named(tmp_path: Path) -> None:
    run, saved = launch("exit", tmp_path, "--algorithm", "ssgd", succeeds=False)
    assert run.exit_code == UNFINISHED
    assert "[localhost:3] danaz: the script left its loop in epoch 0 of 1000 and ended before the run" in run.output
    assert f"rank 3 on localhost ended with exit code {UNFINISHED}" in run.output
    assert run.summary["stopped"] == "the script left its loop in epoch 0 of 1000"
    assert len(saved) <= 3
