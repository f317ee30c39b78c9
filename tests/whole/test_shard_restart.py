"""Several servers, each with a slice of the vector, are killed. All of them go on from one generation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from axis import ADAMW, under
from live import Running, read_updates, until
from mortal_shards import Servers, Trainer, Way, check_end, check_run, training, undisturbed_end
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import GoBack, Push, Refusal, Reply
from danaz.run.folder import read_summary
from danaz.server.settings import ServerSettings
from danaz.server.snapshot import ResumeError
from danaz.serving.checkpoint import read_newest
from danaz.serving.journal import RunWriter
from danaz.serving.keeper import RunKeeper, ShardKeeper
from danaz.worker.core import Request


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    with ExitStack() as stack:
        yield lambda name="run", **settings: stack.enter_context(
            training(tmp_path / name, **{"optimizers": ADAMW, **settings})
        )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return undisturbed_end(tmp_path_factory.mktemp("undisturbed"), ADAMW)


@pytest.mark.parametrize(("shards", "optimizers"), [(2, SGD), (3, ADAMW)], ids=["sgd", "adamw"])
def test_all_go_back_to_one_generation(
    shards: int,
    optimizers: Optimizers,
    begin: Callable[..., Trainer],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    undisturbed = undisturbed_end(tmp_path / "undisturbed", optimizers)
    trainer = begin(shards=shards, optimizers=optimizers)
    servers = trainer.servers
    for _ in range(2):
        trainer.train(4)
        servers.kill()
        trainer.push()  # refused: it joins again
        lead, *others = servers.versions
        assert others == [lead] * (shards - 1)
    assert "it goes on at version 3, 1 updates are lost" in capsys.readouterr().err
    check_end(trainer, undisturbed, restarts=2)


def test_what_a_shard_has_not_heard_of_is_not_gone_back_to(begin: Callable[..., Trainer], undisturbed: Tensor) -> None:
    """Shard 0 has a checkpoint of its last update. The others have not heard of it: the next push would tell them."""
    trainer = begin()
    trainer.train(5)
    servers = trainer.servers
    newest = [read_newest(folder) for folder in servers.folders]
    assert [found and found[0].version for found in newest] == [5, 4]
    servers.kill()
    trainer.push()
    assert servers.versions == [4, 4]
    check_end(trainer, undisturbed)


@pytest.mark.parametrize("torn", [0, 1])
def test_a_torn_checkpoint_of_one_shard_sends_all_to_the_generation_before(
    torn: int, begin: Callable[..., Trainer], undisturbed: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = begin()
    trainer.train(6)
    servers = trainer.servers
    newest = max(servers.folders[1].glob("*.safetensors")).name  # shard 0 has one more
    path = servers.folders[torn] / newest
    path.write_bytes(path.read_bytes()[:-10])
    servers.kill()
    trainer.push()
    assert servers.versions == [4, 4]
    assert f"checkpoint {int(path.stem)} is damaged: its checksum is another" in capsys.readouterr().err
    check_end(trainer, undisturbed)


def test_a_restart_counts_though_a_second_one_goes_back_behind_it(
    begin: Callable[..., Trainer], undisturbed: Tensor
) -> None:
    trainer = begin()
    trainer.train(5)
    for _ in range(2):
        trainer.servers.kill()
        trainer.push()  # it has nothing to tell the others yet
    assert trainer.servers.versions == [4, 4]
    assert trainer.servers.cores[0].totals.lost_updates == 1
    check_end(trainer, undisturbed, restarts=2)


def test_a_generation_that_shard_0_cannot_have_begun_is_not_believed(
    begin: Callable[..., Trainer], undisturbed: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = begin()
    trainer.train(3)
    honest = trainer.ways[1].exchange

    def lie(request: Request) -> Reply:
        return honest(replace(request, generation=1 << 40) if isinstance(request, Push) else request)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.ways[1], "exchange", lie)
        trainer.train(1)
    trainer.train(2)
    trainer.servers.kill()
    trainer.push()
    assert trainer.servers.versions == [5, 5]
    check_end(trainer, undisturbed)


def test_killed_before_all_have_kept_the_beginning_they_begin_again(
    begin: Callable[..., Trainer], undisturbed: Tensor
) -> None:
    trainer = begin(checkpoint_s=3600.0)
    trainer.servers.kill()
    assert not any(core.started for core in trainer.servers.cores)
    trainer.push()
    assert [core.life for core in trainer.servers.cores] == [0, 0]
    check_end(trainer, undisturbed, restarts=1)


def test_without_a_generation_of_all_nothing_is_made_up(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    trainer.train(8)
    for path in trainer.servers.folders[1].iterdir():
        path.unlink()
    trainer.servers.kill()
    refusal = trainer.link.exchange(trainer.core.pull())
    assert isinstance(refusal, Refusal)
    assert "the 2 shards have no sound checkpoint in common: shard 0 has " in refusal.reason
    assert refusal.reason.endswith("shard 1 has 0")
    assert not refusal.rejoin, "to ask again is of no use"
    assert not any(core.started for core in trainer.servers.cores)


def test_another_number_of_shards_is_refused(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    trainer.train(3)
    alone = RunKeeper(RunWriter(trainer.servers.run, {}), ServerSettings("dana-zero", 1))
    with pytest.raises(ResumeError, match="shards 2, this server has 1"):
        alone.resume()
    more = ShardKeeper(trainer.servers.folders[1].parent, ServerSettings("dana-zero", 1, shard=1, shards=3)).resume()
    with pytest.raises(ResumeError, match="shards 2, this server has 3"):
        more.stream(0, GoBack(0, 1, -1, generation=2, newest=9), 0.0)


@under({"dana": "sgd adamw", "dana-zero": "adamw"})
def test_a_shard_that_has_let_a_worker_go_stays_at_the_end(
    algorithm: str, optimizers: Optimizers, begin: Callable[..., Trainer]
) -> None:
    """It is killed after it has announced its end and before shard 0 has: the worker gives back its share only once."""
    ends = []
    for name, is_killed in (("quiet", False), ("killed", True)):
        trainer = begin(name, algorithm=algorithm, optimizers=optimizers)
        trainer.train()
        first, second = trainer.ways
        second.answered.clear()

        def kill_once(request: Request, servers: Servers = trainer.servers, other: Way = second) -> None:
            other.answered.wait()
            first.before = lambda request: None  # noqa: B023
            servers.kill()

        if is_killed:
            first.before = kill_once
        ends.append(trainer.leave())
        trainer.bye()
        assert torch.equal(trainer.servers.params, ends[-1])
    assert torch.equal(*ends)


def test_what_workers_brought_of_the_end_outlives_shard_0(begin: Callable[..., Trainer]) -> None:
    """It is killed between the last good-bye and the end of its process, when nobody is left to tell the shards."""
    trainer = begin()
    trainer.train()
    trainer.leave()
    trainer.bye()
    trainer.servers.kill()
    trainer.servers.tick(time.monotonic() + 1000.0)
    check_run(trainer.servers, restarts=1)


ARGUMENTS = ("--hosts", "localhost:2", "--workers-per-host", "2", "--collective", "torch", "--server-shards", "2")
OFTEN = ("--checkpoint-seconds", "0.5")


def check_digits(folder: Path) -> None:
    summary, updates = read_summary(folder), read_updates(folder)
    assert (summary["complete"], summary["restarts"]) == (True, 1)
    assert summary["test_error_percent"] < 5
    assert [update["version"] for update in updates] == list(range(1, 901))
    assert sorted(update["batch"] for update in updates) == list(range(900))
    assert (folder / "parameters.safetensors").exists()
    assert not [*folder.glob("checkpoints*")]


def shard_process(run: Running, shard: int) -> int:
    for pid in run.processes:
        words = Path("/proc", str(pid), "cmdline").read_bytes().decode().split("\0")
        if "serve" in words and ("--shard" in words) == bool(shard):
            return pid
    raise AssertionError(f"no shard {shard}")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("shard", "more"), [(0, ()), (1, ()), (1, ("--pipeline", "--wire", "onebit"))])
def test_digits_outlives_the_death_of_a_shard(shard: int, more: tuple[str, ...], tmp_path: Path) -> None:
    run = Running(tmp_path / "run", "configs/digits.yaml", *ARGUMENTS, *OFTEN, *more)
    try:
        until(lambda: len(read_updates(run.folder)) > 100, "training is under way")
        os.kill(shard_process(run, shard), signal.SIGKILL)
        output, _ = run.launcher.communicate(timeout=300)
        assert run.launcher.returncode == 0, output
        assert f"{'server.1' if shard else 'server'} was killed by SIGKILL; restart 1 of 3" in output
        check_digits(run.folder)
    finally:
        run.end()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_was_interrupted_is_resumed_with_its_shards(tmp_path: Path) -> None:
    run = Running(tmp_path / "run", "configs/digits.yaml", *ARGUMENTS, *OFTEN)
    try:
        until(lambda: len(read_updates(run.folder)) > 100, "training is under way")
        run.launcher.send_signal(signal.SIGINT)
        output, _ = run.launcher.communicate(timeout=100)
        assert f"to go on from its last checkpoint: danaz launch --resume {run.folder}" in output
    finally:
        run.end()
    resumed = [sys.executable, "-m", "danaz", "launch", "--resume", str(run.folder)]
    said = subprocess.run(resumed, timeout=300, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    check_digits(run.folder)
