"""The loops of a training script: danaz refuses loops that it cannot train with, and names the cure."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import danaz.torch as danaz
from danaz.server.core import ServerCore
from danaz.torch.data import Batching
from danaz.torch.ending import UNFINISHED
from danaz.torch.loop import LoopError
from danaz.torch.session import NotInitializedError

ROOT = Path(__file__).parents[2]
SAMPLES = 12
DATA = TensorDataset(torch.linspace(-1, 1, SAMPLES).unsqueeze(1), torch.linspace(-1, 3, SAMPLES).unsqueeze(1))


@pytest.fixture(autouse=True)
def _initialized(alone: None) -> None:
    danaz.init()


@pytest.fixture
def script(servers: list[ServerCore]) -> Script:
    return Script(servers)


def loader(batch_size: int = 4, data: TensorDataset = DATA, **options: object) -> DataLoader[tuple[torch.Tensor, ...]]:
    return DataLoader(data, batch_size=batch_size, shuffle=True, **options)  # type: ignore[arg-type]


class Script:
    """The usual script without its loops, which the tests supply."""

    def __init__(self, servers: list[ServerCore]) -> None:
        self._servers = servers
        self.model = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1))
        sgd = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        self.optimizer = danaz.DistributedOptimizer(sgd, self.model)
        self.seen: list[int] = []  # the epoch of each batch

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        mse_loss(self.model(x), y).backward()
        self.optimizer.step()

    def train(self, epoch: int, batches: DataLoader[tuple[torch.Tensor, ...]] | None = None, most: int = 99) -> None:
        for number, (x, y) in enumerate(danaz.shard(batches or loader(), epoch), start=1):
            self.step(x, y)
            self.seen.append(epoch)
            if number == most:
                break

    @property
    def theta(self) -> torch.Tensor:
        [server] = self._servers
        return server.master.params

    @property
    def is_trained(self) -> bool:
        """Whether the model holds θ."""
        return torch.equal(torch.cat([p.detach().flatten() for p in self.model.parameters()]), self.theta)

    @property
    def summary(self) -> dict[str, object]:
        [server] = self._servers
        return server.summary()


# ---- loops that cannot be -------------------------------------------------------------------------------------------


def test_epochs_of_range_in_place_of_danaz_epochs(script: Script) -> None:
    with pytest.raises(LoopError, match=r"outside of a loop over danaz\.epochs.*for epoch in danaz\.epochs\(N\)"):
        script.train(0)


def test_range_after_danaz_epochs(script: Script) -> None:
    for epoch in danaz.epochs(1):
        script.train(epoch)
    with pytest.raises(LoopError, match="outside of a loop"):
        script.train(1)


@pytest.mark.parametrize("wrong", [lambda epoch: epoch + 1, lambda epoch: epoch + 10, lambda epoch: -1])
def test_numbers_that_are_not_those_of_danaz_epochs(script: Script, wrong: Callable[[int], int]) -> None:
    def loops() -> None:
        for epoch in danaz.epochs(2):
            script.train(wrong(epoch))

    with pytest.raises(LoopError, match=r"give it the number that danaz\.epochs gives"):
        loops()


def test_epochs_numbered_anew_by_enumerate(script: Script) -> None:
    def loops() -> None:
        for number, _ in enumerate(danaz.epochs(2), start=1):
            script.train(number)

    with pytest.raises(LoopError, match=r"shard\(loader, 1\) was iterated in epoch 0"):
        loops()


@pytest.mark.parametrize("nested", [True, False])
def test_two_loops_over_epochs(script: Script, nested: bool) -> None:
    def loops() -> None:
        for epoch in danaz.epochs(1):
            script.train(epoch)
            if nested:
                danaz.epochs(3)
        danaz.epochs(3)

    with pytest.raises(LoopError, match=r"danaz\.epochs\(3\) is called although danaz\.epochs\(1\) was called before"):
        loops()


@pytest.mark.parametrize("count", [0, -1, 2.0, "5", True, None])
def test_a_number_of_epochs_that_is_none(count: object) -> None:
    with pytest.raises(ValueError, match="a whole number from 1 up"):
        danaz.epochs(count)  # type: ignore[arg-type]


def test_a_second_pass_over_an_epoch(script: Script) -> None:
    def loops() -> None:
        for epoch in danaz.epochs(2):
            script.train(epoch)
            script.train(epoch)

    with pytest.raises(LoopError, match="its batches were all trained"):
        loops()
    assert script.seen == [0, 0, 0]


def test_a_loop_that_reads_a_batch_ahead(script: Script) -> None:
    """As the loaders of some libraries do, to know which batch is the last."""

    def train() -> None:
        for epoch in danaz.epochs(2):
            ahead = []
            for batch in danaz.shard(loader(), epoch):
                ahead.append(batch)
                if len(ahead) > 1:
                    script.step(*ahead.pop(0))
            script.step(*ahead.pop())

    with pytest.raises(RuntimeError, match="before the next one is taken"):
        train()


def test_two_loaders_at_once(script: Script) -> None:
    def loops() -> None:
        for epoch in danaz.epochs(1):
            for (x, y), _ in zip(danaz.shard(loader(), epoch), danaz.shard(loader(), epoch), strict=True):
                script.step(x, y)

    with pytest.raises(LoopError, match="another loop over it is under way"):
        loops()


def test_two_data_sets_of_one_size_in_an_epoch(script: Script) -> None:
    def loops() -> None:
        for epoch in danaz.epochs(1):
            script.train(epoch, most=1)
            script.train(epoch, loader(data=TensorDataset(*DATA.tensors)))

    with pytest.raises(LoopError, match="another data set than before in epoch 0"):
        loops()


def test_a_data_set_made_anew_for_each_epoch_is_fine(script: Script) -> None:
    for epoch in danaz.epochs(2):
        script.train(epoch, loader(data=TensorDataset(*DATA.tensors)))
    assert script.seen == [0, 0, 0, 1, 1, 1]


def test_an_epoch_without_shard() -> None:
    epochs = danaz.epochs(3)
    next(epochs)
    with pytest.raises(LoopError, match=r"epoch 0 of danaz\.epochs\(3\) ended, and nothing was trained in it"):
        next(epochs)


def test_evaluation_by_shard(script: Script) -> None:
    for epoch in danaz.epochs(1):
        with torch.no_grad(), pytest.raises(RuntimeError, match="to evaluate, iterate the loader itself"):
            script.train(epoch)
        script.train(epoch)
    assert script.seen == [0, 0, 0]


# ---- loops that are left --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "prefetch_factor": 2}])
def test_batches_that_a_loop_leaves_come_first_in_the_next(script: Script, options: dict[str, int]) -> None:
    torch.manual_seed(5)
    trained = []
    for epoch in danaz.epochs(3):
        for x, y in danaz.shard(loader(**options), epoch):
            script.step(x, y)
            script.seen.append(epoch)
            trained.append(x)
            if epoch == 0:
                break
    assert script.seen == [0, 1, 1, 1, 1, 1, 2, 2, 2]
    batching = Batching(SAMPLES, 4, seed=5)
    assert all(torch.equal(x, DATA[batching.indices(number)][0]) for number, x in enumerate(trained))
    assert script.is_trained
    assert script.summary["stopped"] is None


def test_batches_that_nobody_trains_are_said(script: Script) -> None:
    for epoch in danaz.epochs(3):
        script.train(epoch, most=1)
    assert script.seen == [0, 1, 2]
    assert script.is_trained
    assert (script.summary["epochs"], script.summary["stopped"]) == (1.0, "every worker left before the last batch")


def test_stop_ends_the_loops_by_itself(script: Script) -> None:
    for epoch in danaz.epochs(9):
        for x, y in danaz.shard(loader(), epoch):
            script.step(x, y)
            script.seen.append(epoch)
            if len(script.seen) == 4:
                danaz.stop("four are enough")
                danaz.stop("a second word changes nothing")
    assert script.seen == [0, 0, 0, 1]
    assert script.is_trained
    assert script.summary["stopped"] == "four are enough"


def test_a_step_after_stop_is_refused(script: Script) -> None:
    for epoch in danaz.epochs(1):
        for _ in danaz.shard(loader(), epoch):
            danaz.stop("")
            with pytest.raises(RuntimeError, match="after the end of the run"):
                script.optimizer.step()
    assert script.summary["stopped"] == "the script asked for it"
    assert script.summary["updates"] == 0


def test_stop_before_anything_began() -> None:
    with pytest.raises(NotInitializedError, match=r"the first batch of danaz\.shard"):
        danaz.stop("too early")


@pytest.mark.parametrize(
    "use",
    [
        lambda script: script.model(torch.zeros(1, 1)),
        lambda script: script.model[0].state_dict(),
        lambda script: danaz.report(accuracy=1.0),
    ],
)
def test_who_breaks_and_uses_the_model_gets_the_trained_one(
    script: Script, use: Callable[[Script], object], capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in danaz.epochs(5):
        script.train(epoch)
        if epoch == 1:
            break
    assert not script.is_trained
    use(script)
    assert script.is_trained
    assert script.summary["stopped"] == "the script left its loop in epoch 1 of 5"
    assert "danaz: the script left its loop in epoch 1 of 5; the run ends here" in capsys.readouterr().err
    use(script)


def test_an_exception_leaves_the_run_as_it_is_while_it_is_handled(script: Script) -> None:
    """A script that saves its model in an emergency must not have to talk to a cluster that may be broken."""
    try:
        for epoch in danaz.epochs(5):
            script.train(epoch)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        script.model.state_dict()
        assert script.summary["stopped"] is None
    script.model.state_dict()
    assert script.summary["stopped"] == "the script left its loop in epoch 0 of 5"


# ---- what the loops say of themselves -------------------------------------------------------------------------------


def test_loops_have_lengths(script: Script) -> None:
    batches = danaz.shard(loader(batch_size=5), 0)
    assert len(batches) == 3  # type: ignore[arg-type]
    epochs = danaz.epochs(7)
    assert len(epochs) == 7  # type: ignore[arg-type]
    for epoch in epochs:
        assert len(danaz.shard(loader(), epoch)) == 3  # type: ignore[arg-type]
        script.train(epoch)


# ---- samples --------------------------------------------------------------------------------------------------------


def order(script: Script, batches: DataLoader[tuple[torch.Tensor, ...]] | None = None) -> list[float]:
    seen: list[float] = []
    for epoch in danaz.epochs(1):
        for x, y in danaz.shard(batches or loader(), epoch):
            script.step(x, y)
            seen += x.flatten().tolist()
    return seen


def expected_order(seed: int) -> list[float]:
    batching = Batching(SAMPLES, 4, seed=seed)
    return [x for number in range(3) for x in DATA[batching.indices(number)][0].flatten().tolist()]


@pytest.mark.parametrize("seed", [1, 2])
def test_torchs_seed_decides_the_order(script: Script, seed: int) -> None:
    torch.manual_seed(seed)
    assert order(script) == expected_order(seed)


def test_the_seed_of_a_loaders_generator_comes_first(script: Script) -> None:
    torch.manual_seed(1)
    assert order(script, loader(generator=torch.Generator().manual_seed(2))) == expected_order(2)


def test_the_seed_of_init_comes_before_all_others(script: Script) -> None:
    danaz.init(seed=3)
    torch.manual_seed(1)
    assert order(script, loader(generator=torch.Generator().manual_seed(2))) == expected_order(3)


@pytest.mark.parametrize("seed", [-1, 1.5, "1"])
def test_a_seed_that_is_none(seed: object) -> None:
    with pytest.raises(ValueError, match="a whole number from 0 up"):
        danaz.init(seed=seed)  # type: ignore[arg-type]


class Persistent(TensorDataset):
    """Notes which process fetched a sample."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        x, y = super().__getitem__(index)
        return x, y, torch.tensor(os.getpid())


@pytest.mark.parametrize("persistent", [True, False])
def test_persistent_workers_persist(script: Script, persistent: bool) -> None:
    pids = []
    batches = loader(data=Persistent(*DATA.tensors), num_workers=1, persistent_workers=persistent)
    for epoch in danaz.epochs(3):
        of_epoch = set()
        for x, y, fetchers in danaz.shard(batches, epoch):
            script.step(x, y)
            of_epoch |= set(fetchers.tolist())
            if epoch == 0:
                break
        pids.append(of_epoch)
    assert (len(set.union(*pids)) == 1) == persistent


# ---- models ---------------------------------------------------------------------------------------------------------


def saved_size(what: object) -> int:
    file = BytesIO()
    torch.save(what, file)
    return len(file.getvalue())


def test_saving_a_part_of_the_model_saves_that_part() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(500, 500))
    copy = deepcopy(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    danaz.DistributedOptimizer(sgd, model)
    assert saved_size(model[0].state_dict()) == saved_size(copy[0].state_dict())
    assert saved_size(model.state_dict()) == saved_size(copy.state_dict())
    assert len(pickle.dumps(model)) < 1.01 * len(pickle.dumps(copy))


# ---- the end of the process -----------------------------------------------------------------------------------------

HEAD = """
import os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import danaz.torch as danaz

danaz.init()
model = nn.Linear(1, 1)
data = TensorDataset(torch.zeros(12, 1), torch.zeros(12, 1))
def train(epoch):
    for x, y in danaz.shard(DataLoader(data, batch_size=4), epoch):
        optimizer.zero_grad(); nn.functional.mse_loss(model(x), y).backward(); optimizer.step()
"""
WRAP = "optimizer = danaz.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)\n"
LEFT = "danaz: the script left its loop in epoch 1 of 3 and ended before the run was over. To end a run early, call"
UNTRAINED = "danaz: the script ended without training: it calls danaz.init(), but never came to "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "launched", "code", "said"),
    [
        (WRAP + "for e in danaz.epochs(3):\n train(e)", True, 0, ""),
        (WRAP + "for e in danaz.epochs(3):\n train(e)\n if e == 1: danaz.stop('enough'); sys.exit()", True, 0, ""),
        (WRAP + "for e in danaz.epochs(3):\n train(e)\n if e == 1: sys.exit(0)", True, UNFINISHED, LEFT),
        (WRAP + "for e in danaz.epochs(3):\n train(e)\n if e == 1: sys.exit(0)", False, UNFINISHED, LEFT),
        (WRAP + "for e in danaz.epochs(3):\n train(e)\n if e == 1: break", True, UNFINISHED, LEFT),
        (WRAP + "for e in danaz.epochs(3):\n train(e)\n if e == 1: break\ndanaz.finish()", True, 0, ""),
        (WRAP + "for e in danaz.epochs(3):\n train(e)\n if e == 1: raise OSError('own')", True, 1, "OSError: own"),
        (WRAP, True, UNFINISHED, UNTRAINED + "danaz.epochs(N), danaz.shard(loader, epoch)"),
        ("", True, UNFINISHED, UNTRAINED + "danaz.DistributedOptimizer(optimizer, model)"),
        ("", False, 0, ""),
        ("sys.exit('no data here')", True, UNFINISHED, "no data here"),
        (WRAP + "for e in danaz.epochs(3):\n train(e)\n if os.fork() == 0: sys.exit(0)\nos.wait()", True, 0, ""),
    ],
)
def test_a_process_that_has_not_finished_does_not_look_like_a_success(
    body: str, launched: bool, code: int, said: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(HEAD + body + "\n")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if launched:
        env["DANAZ_SETTINGS"] = "{}"
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    if not said:
        assert done.stderr == ""
    assert ("Traceback" in done.stderr) == (code == 1)
