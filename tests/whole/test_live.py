"""Whole runs, with the launcher's processes, Horovod inside each worker and a ROUTER server between the workers."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import live
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shipped import CONFIGS

from danaz.run.config import load_config
from danaz.serving.serve import replay_run
from danaz.torch.data import Batching
from danaz.workloads import build
from danaz.workloads.digits import DigitsNet
from danaz.workloads.evaluate import evaluate
from danaz.workloads.quadratic import DIMENSION

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SUMMARY = {
    "algorithm",
    "workers",
    "ranks_per_worker",
    "schedule",
    "seed",
    "updates",
    "epochs",
    "final_train_loss",
    "test_error_percent",
    "diverged",
    "mean_lag",
    "mean_gap",
    "wall_seconds",
    "updates_per_second",
    "images_per_second",
    "params_l2",
    "collective",
    "per_worker",
    "versions",
}
UPDATE = {"version", "worker", "lag", "lr", "gap", "gap_of", "loss", "batch", "seconds"}
TWO_WORKERS = ("--hosts", "localhost:2", "--workers-per-host", "2")
ENDLESS = (str(CONFIGS / "quadratic.yaml"), *TWO_WORKERS, "--set", "epochs=100000")

# ---- the run folder -------------------------------------------------------------------------------------------------


def test_the_hybrid_on_digits(tmp_path: Path) -> None:
    """Two workers of two Horovod ranks train: the run folder is complete, replays to the bit, and holds the model."""
    run = live.launch(
        *(str(CONFIGS / "digits.yaml"), "--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", "dana"),
        *("--set", "epochs=4", "--set", "lr_schedule.milestones=[3]", "--record"),
        out=tmp_path / "run",
    )
    summary, updates = run.summary, run.updates
    assert summary.keys() >= SUMMARY
    assert summary["collective"] == "horovod", "the tests, and CI, run on Horovod: `danaz horovod install`"
    facts = {"algorithm": "dana", "workers": 2, "ranks_per_worker": 2, "schedule": "live", "seed": 0}
    assert {key: summary[key] for key in facts} == facts
    total = Batching(samples=1433, batch_size=32).plan(4).batches
    assert (summary["updates"], summary["epochs"], summary["diverged"]) == (total, 4, False)
    assert all(update.keys() >= UPDATE for update in updates)
    assert [update["version"] for update in updates] == list(range(1, total + 1))
    assert sorted(update["batch"] for update in updates) == list(range(total))
    assert {update["worker"] for update in updates} == {0, 1}
    assert {update["gap_of"] for update in updates} == {"lookahead"}
    assert sorted(seconds := [update["seconds"] for update in updates]) == seconds
    assert 0 < seconds[0] < seconds[-1] == pytest.approx(summary["wall_seconds"], abs=1e-5)
    for worker, facts in summary["per_worker"].items():
        assert facts["updates"] == sum(update["worker"] == int(worker) for update in updates)
        assert (facts["ranks"], facts["device"], facts["host"]) == (2, "cpu", platform.node())
        assert 0 < facts["computing_seconds"] + facts["reading_seconds"] + facts["exchanging_seconds"] < 2 * seconds[-1]
    assert all(math.isfinite(update[key]) for update in updates for key in ("lag", "lr", "gap", "loss"))
    config = load_config(run.folder / "config.yaml")
    assert (config.epochs, config.workers, config.algorithm) == (4, 2, "dana")
    assert updates[0]["lr"] == pytest.approx(config.lr / 2)  # warm-up starts at lr/N
    assert min(update["lr"] for update in updates[-10:]) == pytest.approx(config.lr / 10)
    assert summary["mean_lag"] == pytest.approx(np.mean([update["lag"] for update in updates]))
    assert summary["mean_gap"] == pytest.approx(np.mean([update["gap"] for update in updates]))
    assert summary["updates_per_second"] == pytest.approx(total / summary["wall_seconds"])
    assert summary["test_error_percent"] < 10
    for rank in range(4):
        assert (run.folder / f"logs/localhost/rank.{rank}/stdout").exists()
    assert not list(run.folder.rglob("*.part*"))

    parameters = load_file(run.folder / "parameters.safetensors")
    model = DigitsNet()
    missing, unexpected = model.load_state_dict(parameters, strict=False)
    assert unexpected == []
    assert all(name.endswith("num_batches_tracked") for name in missing)
    vector = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    assert summary["params_l2"] == pytest.approx(vector.norm().item(), rel=1e-6)
    workload = build(config)
    assert workload.test is not None
    _, right = evaluate(model.eval(), workload, workload.test, config, torch.device("cpu"))
    assert 100 * (1 - right) == pytest.approx(summary["test_error_percent"], abs=1e-9)

    assert replay_run(run.folder) == (total, True)
    # and the comparison is one that can fail
    first = next(iter(parameters.values()))
    first.view(-1)[0] += 1e-6
    save_file(parameters, run.folder / "parameters.safetensors")
    assert replay_run(run.folder) == (total, False)


# ---- arithmetic -----------------------------------------------------------------------------------------------------

A = np.logspace(-2, 0, DIMENSION)


def replay_dana(updates: list[dict[str, Any]], momentum: float) -> np.ndarray[Any, Any]:
    """Return θ after all updates, from the formulas of Algorithm 4 with the exact term for a changing rate."""
    views = [np.zeros(DIMENSION)]  # Θ of each version
    velocity, rate = {}, {}
    for update in updates:
        worker, lr = update["worker"], update["lr"]
        v, last = velocity.get(worker, np.zeros(DIMENSION)), rate.get(worker, 0.0)
        g = A * (views[update["version"] - 1 - update["lag"]] - 1)
        new = momentum * v + g
        views.append(views[-1] - lr * (momentum * new + g) + momentum * (last - lr) * v)
        velocity[worker], rate[worker] = new, lr
    return views[-1] + momentum * sum(rate[worker] * velocity[worker] for worker in velocity)


def replay_dana_zero(updates: list[dict[str, Any]], momentum: float) -> np.ndarray[Any, Any]:
    """Return θ after all updates, from the formulas of Algorithm 3."""
    theta = np.zeros(DIMENSION)
    views = [theta]
    velocity, rate = {}, {}
    for update in updates:
        worker = update["worker"]
        g = A * (views[update["version"] - 1 - update["lag"]] - 1)
        velocity[worker] = momentum * velocity.get(worker, np.zeros(DIMENSION)) + g
        rate[worker] = update["lr"]
        theta = theta - update["lr"] * velocity[worker]
        views.append(theta - momentum * sum(rate[w] * velocity[w] for w in velocity))
    return theta


@pytest.mark.parametrize(
    ("algorithm", "replay", "options"),
    [
        ("dana", replay_dana, ["--set", "lr_schedule={milestones: [2, 3], factor: 0.5, warmup_epochs: 1}"]),
        ("dana-zero", replay_dana_zero, ["--collective", "torch"]),
    ],
)
def test_the_quadratic_replayed_with_numpy(
    algorithm: str, replay: Callable[..., np.ndarray[Any, Any]], options: list[str], tmp_path: Path
) -> None:
    run = live.launch(
        *(str(CONFIGS / "quadratic.yaml"), "--hosts", "localhost:3", "--workers-per-host", "3"),
        *("--algorithm", algorithm, *options),
        out=tmp_path / "run",
    )
    summary, updates = run.summary, run.updates
    assert (summary["updates"], summary["workers"], summary["ranks_per_worker"]) == (400, 3, 1)
    assert summary["collective"] == ("torch" if "torch" in options else "horovod")
    assert [update["version"] for update in updates] == list(range(1, 401))
    assert len({update["worker"] for update in updates}) > 1
    theta = replay(updates, momentum=0.9)
    assert summary["params_l2"] == pytest.approx(np.linalg.norm(theta), rel=1e-5)
    assert summary["final_train_loss"] == pytest.approx((A * (theta - 1) ** 2).sum() / 2, rel=1e-4)
    saved = load_file(run.folder / "parameters.safetensors")["theta"].double().numpy()
    np.testing.assert_allclose(saved, theta, rtol=1e-4, atol=1e-5)
    if algorithm == "dana":  # steps and warm-up reached the updates
        rates = [update["lr"] for update in updates]
        assert rates[0] == pytest.approx(0.05 / 3)
        assert min(rates[-20:]) == pytest.approx(0.05 / 4)


# ---- scripts of users -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "cluster", "workers"),
    [("ssgd", ["--hosts", "localhost:2"], 1), ("dana", [*TWO_WORKERS], 2)],
)
def test_the_example_under_the_launcher(algorithm: str, cluster: list[str], workers: int, tmp_path: Path) -> None:
    saved = tmp_path / "digits.pt"
    run = live.launch(
        *cluster,
        *("--algorithm", algorithm, "--warmup-epochs", "1"),
        out=tmp_path / "run",
        script=["examples/train_digits.py", "--epochs", "4", "--save", str(saved)],
    )
    summary = run.summary
    assert (summary["algorithm"], summary["workers"], summary["collective"]) == (algorithm, workers, "horovod")
    assert summary["test_error_percent"] < 6
    assert run.output.count("test accuracy") == 1
    assert f"test accuracy {100 - summary['test_error_percent']:.2f}%" in run.output
    model = torch.load(saved)
    parameters = load_file(run.folder / "parameters.safetensors")
    assert parameters.keys() == {name for name in model if not name.endswith("num_batches_tracked")}
    assert all(torch.equal(model[name], tensor) for name, tensor in parameters.items())


def test_ssgd_equals_one_rank_with_all_the_batches_and_n_times_the_rate(tmp_path: Path) -> None:
    """Two workers of two ranks have batches of 2·8; the last has 2 samples for 4 ranks. η is 2·0.05."""
    run, states = live.launch_fifty_samples(
        tmp_path,
        "torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)",
        *("--hosts", "localhost:4", "--workers-per-host", "2", "--algorithm", "ssgd", "--warmup-epochs", "0"),
    )
    assert run.summary["workers"] == 2
    assert [update["lr"] for update in run.updates] == [pytest.approx(0.1)] * 16
    assert len(states) == 4
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())

    alone = live.fifty_samples_in_one_process(
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    )
    assert [update["loss"] for update in run.updates] == pytest.approx(alone.losses, rel=1e-4)
    for name, p in alone.model.named_parameters():
        theta = p.detach() + 0.1 * 0.9 * alone.optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(states[0][name], theta, rtol=1e-4, atol=1e-5)


COUNTED = """
import os, sys, time
from pathlib import Path
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import danaz.torch as danaz

out = Path(sys.argv[1])
danaz.init()


class Noted(Dataset):
    def __len__(self):
        return 75

    def __getitem__(self, index):
        with open(out / f"fetched.{danaz.worker_id()}.{danaz.rank()}", "a") as file:
            file.write(f"{index}\\n")
        deadline = time.monotonic() + 60
        # Worker 1 is slow: it waits within its first batches until worker 0 has done two epochs' worth of batches.
        while danaz.worker_id() == 1 and not (out / "go").exists():
            assert time.monotonic() < deadline, "worker 0 does not get on without worker 1"
            time.sleep(0.01)
        return torch.tensor([index / 75]), torch.ones(1)


model = nn.Linear(1, 1)
optimizer = danaz.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model)
loader = DataLoader(Noted(), batch_size=8, shuffle=True, num_workers=2)
steps = 0
for epoch in danaz.epochs(4):
    for x, y in danaz.shard(loader, epoch):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        steps += 1
        if steps == 20 and danaz.worker_id() == 0:
            (out / "go").touch()
"""


def test_loading_processes_and_a_slow_worker_use_every_sample_once(tmp_path: Path) -> None:
    """Worker 0 has 3 ranks, which share batches of 8 unevenly, and the last batch of 3 as 1/1/1; worker 1 has two."""
    script = tmp_path / "script.py"
    script.write_text(COUNTED)
    run = live.launch(
        *("--hosts", "localhost:5", "--workers-per-host", "2", "--algorithm", "dana"),
        out=tmp_path / "run",
        script=[str(script), str(tmp_path)],
    )
    assert sorted(update["batch"] for update in run.updates) == list(range(40))
    by_worker = Counter(update["worker"] for update in run.updates)
    assert by_worker[0] >= 20
    assert by_worker[1] >= 1
    fetched = Counter(line for file in tmp_path.glob("fetched.*") for line in file.read_text().split())
    assert fetched == {str(sample): 4 for sample in range(75)}


STRANGER = """
import torch
from torch.utils.data import DataLoader, TensorDataset
import danaz.torch as danaz

danaz.init(digest="of a config that nobody else runs")
model = torch.nn.Linear(1, 1)
danaz.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
for epoch in danaz.epochs(1):
    for batch in danaz.shard(DataLoader(TensorDataset(torch.ones(4, 1))), epoch):
        raise AssertionError("it was let in")
"""


def test_a_worker_with_another_configuration_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(STRANGER)
    run = live.launch(*TWO_WORKERS, out=tmp_path / "run", script=[str(script)], succeeds=False)
    assert "the server refused this worker's join: worker and server run different configurations" in run.output
    assert "rank 0 on localhost ended with exit code 1" in run.output or "rank 1 on localhost" in run.output
    assert run.updates == []


# ---- kills ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[[str], live.Running]]:
    runs: list[live.Running] = []

    def start(name: str) -> live.Running:
        runs.append(live.Running(tmp_path / name, *ENDLESS, "--on-worker-failure", "stop"))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def test_with_stop_whoever_is_killed_the_whole_run_ends_and_no_other(begin: Callable[[str], live.Running]) -> None:
    runs = {who: begin(who) for who in ("rank", "server", "launcher")}
    for who, run in runs.items():
        live.until(lambda run=run: run.trains or run.launcher.poll() is not None, f"the run for the {who} trains")
    ended = {"rank": "rank 1 on localhost was killed by SIGKILL", "server": "server on localhost was killed by SIGKILL"}
    while runs:
        who, run = next(iter(runs.items()))
        del runs[who]
        there = {name: other.processes.keys() for name, other in runs.items()}
        os.kill(run.pid(who), signal.SIGKILL)
        live.until(lambda run=run: not run.processes, f"all processes end after the {who}", deadline_s=30)
        output, _ = run.launcher.communicate()
        assert run.launcher.returncode == (137 if who in ended else -signal.SIGKILL)
        assert ended.get(who, "") in output
        assert_whole(run.folder)
        assert there == {name: other.processes.keys() for name, other in runs.items()}
        for name, other in runs.items():
            before = len(live.read_updates(other.folder))
            live.until(
                lambda other=other, before=before: len(live.read_updates(other.folder)) > before, f"{name} trains on"
            )


def assert_whole(folder: Path) -> None:
    """Check that every line and file of JSON is whole, whatever happened to the process that wrote it."""
    updates = live.read_updates(folder)
    assert [update["version"] for update in updates] == list(range(1, len(updates) + 1))
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["updates"] == len(updates)
