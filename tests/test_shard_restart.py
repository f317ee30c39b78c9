"""Several servers, each with a slice of the vector, are killed: all of them go on from one generation."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live import Running, read_updates, until
from torch import Tensor

from danaz.flat import Layout
from danaz.keeper import Keeper, SliceKeeper
from danaz.run_folder import RunFolder, read_summary
from danaz.server.checkpoint import folders_of, read_newest
from danaz.server.messages import Final, Leave, Parameters, Plan, Refusal, Reply
from danaz.server.settings import ServerSettings
from danaz.server.state import ResumeError
from danaz.worker.core import Request, Role, WorkerCore
from danaz.worker.sharded import ShardedLink

LAYOUT = Layout.from_lists([[["a", [40], [1]], ["b", [8, 6], [6, 1]], ["c", [40], [1]]], [], [128]])
PLAN = Plan(batches_per_epoch=12, epochs=1)
ALWAYS = 1e-9  # seconds between checkpoints: one an update


class Servers:
    """The shards of one run, as far as they outlive their processes."""

    def __init__(self, run: Path, algorithm: str = "dana-zero", shards: int = 2, checkpoint_s: float = ALWAYS):
        run.mkdir()
        self.run, self.shards = run, shards
        self._settings = [
            ServerSettings(algorithm, 1, recovery_s=0.0, checkpoint_s=checkpoint_s, shard=shard, shards=shards)
            for shard in range(shards)
        ]
        self.start()

    def start(self, resume: bool = False) -> None:
        first, *others = self._settings
        self.leader = Keeper(RunFolder(self.run, {}), first)
        self.keepers = [self.leader, *(SliceKeeper(self.run, settings) for settings in others)]
        if resume:
            for keeper in self.keepers:
                keeper.resume()
        self.cores = [keeper.core for keeper in self.keepers]

    def settle(self) -> None:
        """What is being written is written."""
        for thread in threading.enumerate():
            if thread.name == "danaz-checkpoint":
                thread.join()

    def kill(self) -> None:
        """All processes, and start them again."""
        self.settle()
        self.start(resume=True)

    @property
    def versions(self) -> list[int]:
        return [core.master.version for core in self.cores]

    @property
    def params(self) -> Tensor:
        return torch.cat([core.master.params for core in self.cores])


class Way:
    """A worker's way to one shard, whichever process that is."""

    def __init__(self, servers: Servers, shard: int):
        self._servers, self._shard = servers, shard
        self.answered = threading.Event()
        self.before: Callable[[Request], None] = lambda request: None

    def exchange(self, request: Request) -> Reply:
        self.before(request)
        replies = self._servers.cores[self._shard].handle(0, request, time.monotonic())
        [(_, reply)] = replies
        self.answered.set()
        return reply

    def receive_into(self, room: Tensor) -> None:
        """Nothing travels."""

    def close(self) -> None:
        """Nothing is held."""


class Trainer:
    """One worker, whose gradient is a function of the batch."""

    def __init__(self, servers: Servers):
        self.servers = servers
        self.ways = [Way(servers, shard) for shard in range(servers.shards)]
        self.link = ShardedLink(self.ways, LAYOUT)
        rule = servers.cores[0].settings.rule(0.9).worker_rule
        self.core = WorkerCore(Role(0, 1, "", 0.9, LAYOUT, PLAN), rule)
        self.reply: Any = self.say(lambda: self.core.join(torch.ones(LAYOUT.size)))

    def say(self, make: Callable[[], Request]) -> Reply:
        """As a worker's process does: who is refused joins again, and leaves again if it was about to leave."""
        request = make()
        reply = self.link.exchange(request)
        self.core.receive(reply)
        if isinstance(reply, Refusal):
            assert reply.rejoin
            reply = self.link.exchange(self.core.join())
            self.core.receive(reply)
            return self.say(make) if isinstance(request, Leave) else reply
        return reply

    def push(self) -> None:
        batch = self.reply.leases[0]
        grad = torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(batch))
        self.reply = self.say(lambda: self.core.push(grad, (0.1,), 4, 1.0, batch))
        assert isinstance(self.reply, Parameters)

    def train(self, pushes: int = 1000) -> None:
        for _ in range(pushes):
            if self.reply.done:
                return
            self.push()
            self.servers.settle()

    def leave(self) -> Tensor:
        final = self.say(lambda: self.core.leave(torch.empty(0)))
        assert isinstance(final, Final)
        return final.params

    def bye(self) -> None:
        self.core.receive(self.link.exchange(self.core.bye()))


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    trainers: list[Trainer] = []

    def make(name: str = "run", **settings: Any) -> Trainer:
        trainers.append(Trainer(Servers(tmp_path / name, **settings)))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.servers.settle()
        trainer.link.close()


@pytest.fixture
def undisturbed(begin: Callable[..., Trainer]) -> Tensor:
    """θ at the end of a run in which nothing fails."""
    trainer = begin("undisturbed", checkpoint_s=0.0)
    trainer.train()
    return trainer.leave()


def check_end(trainer: Trainer, undisturbed: Tensor, restarts: int = 1) -> None:
    """The same bits, every batch once, no version left out; and nothing is kept of the checkpoints."""
    trainer.train()
    assert torch.equal(trainer.leave(), undisturbed)
    trainer.bye()
    for keeper in trainer.servers.keepers:
        keeper.finish()
    updates, run = read_updates(trainer.servers.run), trainer.servers.run
    assert [update["version"] for update in updates] == list(range(1, 13))
    assert sorted(update["batch"] for update in updates) == list(range(12))
    summary = read_summary(run)
    assert (summary["complete"], summary["restarts"]) == (True, restarts)
    assert not any(folder.exists() for folder in folders_of(run, trainer.servers.shards))
    assert (run / "parameters.safetensors").exists()


@pytest.mark.parametrize("shards", [2, 3])
def test_all_go_back_to_one_generation(
    shards: int, begin: Callable[..., Trainer], undisturbed: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = begin(shards=shards)
    servers = trainer.servers
    for _ in range(2):
        trainer.train(4)
        servers.kill()
        lead, *others = servers.versions
        assert others == [lead] * (shards - 1)
    trainer.push()
    assert "it goes on at version 3, 1 updates are lost" in capsys.readouterr().err
    check_end(trainer, undisturbed, restarts=2)


def test_what_a_shard_has_not_heard_of_is_not_gone_back_to(begin: Callable[..., Trainer], undisturbed: Tensor) -> None:
    """Shard 0 has a checkpoint of its last update, of which a worker would have told the others with its next push."""
    trainer = begin()
    trainer.train(5)
    servers = trainer.servers
    newest = [read_newest(folder) for folder in folders_of(servers.run, 2)]
    assert [found and found[0].version for found in newest] == [5, 4]
    servers.kill()
    assert servers.versions == [4, 4]
    check_end(trainer, undisturbed)


@pytest.mark.parametrize("torn", [0, 1])
def test_a_torn_checkpoint_of_one_shard_sends_all_to_the_generation_before(
    torn: int, begin: Callable[..., Trainer], undisturbed: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = begin()
    trainer.train(6)
    servers = trainer.servers
    newest = max(folders_of(servers.run, 2)[1].glob("*.safetensors")).name  # shard 0 has one more
    path = folders_of(servers.run, 2)[torn] / newest
    path.write_bytes(path.read_bytes()[:-10])
    servers.kill()
    assert servers.versions == [4, 4]
    folder = "checkpoints.1" if torn else "checkpoints"
    assert f"checkpoint {int(path.stem)} is damaged: in {folder} its checksum is another" in capsys.readouterr().err
    check_end(trainer, undisturbed)


def test_a_restart_counts_though_a_second_one_goes_back_behind_it(
    begin: Callable[..., Trainer], undisturbed: Tensor
) -> None:
    trainer = begin()
    trainer.train(5)
    for _ in range(2):
        trainer.servers.kill()
        trainer.push()  # refused: it joins again, and has nothing to tell the others yet
    assert trainer.servers.versions == [4, 4]
    assert trainer.servers.cores[0].figures.lost_updates == 1
    check_end(trainer, undisturbed, restarts=2)


def test_a_generation_that_shard_0_cannot_have_begun_is_not_believed(
    begin: Callable[..., Trainer], undisturbed: Tensor
) -> None:
    trainer = begin()
    trainer.train(3)
    trainer.link._generation = 1 << 40
    trainer.train(3)
    trainer.servers.kill()
    assert trainer.servers.versions == [5, 5]
    check_end(trainer, undisturbed)


def test_killed_before_all_have_kept_the_beginning_they_begin_again(
    begin: Callable[..., Trainer], undisturbed: Tensor
) -> None:
    trainer = begin(checkpoint_s=3600.0)
    trainer.servers.kill()
    assert not any(core.started for core in trainer.servers.cores)
    check_end(trainer, undisturbed, restarts=0)


def test_without_a_generation_of_all_nothing_is_made_up(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    trainer.train(3)
    for path in folders_of(trainer.servers.run, 2)[1].iterdir():
        path.unlink()
    with pytest.raises(ResumeError, match="of all 2 shards"):
        trainer.servers.kill()


def test_another_number_of_shards_is_refused(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    trainer.train(3)
    alone = Keeper(RunFolder(trainer.servers.run, {}), ServerSettings("dana-zero", 1))
    with pytest.raises(ResumeError, match="shards 2, this server has 1"):
        alone.resume()
    more = SliceKeeper(trainer.servers.run, ServerSettings("dana-zero", 1, shard=1, shards=3))
    with pytest.raises(ResumeError, match="of all 3 shards"):
        more.resume()


@pytest.mark.parametrize("algorithm", ["dana", "dana-zero"])
def test_a_shard_that_has_let_a_worker_go_stays_at_the_end(algorithm: str, begin: Callable[..., Trainer]) -> None:
    """Killed when it has told the end of its slice, and shard 0 has not: the worker gives back its share once."""
    ends = []
    for name, is_killed in (("quiet", False), ("killed", True)):
        trainer = begin(name, algorithm=algorithm)
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
        assert torch.equal(trainer.servers.params, ends[-1])
    assert torch.equal(*ends)


def test_what_workers_brought_of_the_end_outlives_shard_0(begin: Callable[..., Trainer], undisturbed: Tensor) -> None:
    """Killed between the last good-bye and the end of the process."""
    trainer = begin()
    trainer.train()
    trainer.leave()
    trainer.bye()
    trainer.servers.kill()
    trainer.leave = lambda: undisturbed  # type: ignore[method-assign]
    trainer.bye = lambda: None  # type: ignore[method-assign]
    trainer.servers.cores[0].tick(time.monotonic() + 1000.0)
    check_end(trainer, undisturbed)


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
@pytest.mark.parametrize("shard", [0, 1])
def test_digits_outlives_the_death_of_a_shard(shard: int, tmp_path: Path) -> None:
    run = Running(tmp_path / "run", "configs/digits.yaml", *ARGUMENTS, *OFTEN)
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
