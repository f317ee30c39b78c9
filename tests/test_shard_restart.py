"""Several servers, each with a slice of the vector, are killed: all of them go on from one generation."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from live import Running, read_updates, until
from torch import Tensor

from danaz.flat import Layout
from danaz.keeper import Keeper, SliceKeeper
from danaz.run_folder import RunFolder, read_summary
from danaz.server.answers import whole
from danaz.server.checkpoint import complete_numbers, folder_of, read_newest
from danaz.server.core import ServerCore
from danaz.server.messages import Final, GoBack, Leave, Offer, Parameters, Plan, Push, Refusal, Reply
from danaz.server.offering import Offering, choose
from danaz.server.settings import ServerSettings
from danaz.server.state import ResumeError
from danaz.worker.core import Request, Role, WorkerCore, answers
from danaz.worker.link import GIVE_UP_S, ServerLostError
from danaz.worker.sharded import ShardedLink

LAYOUT = Layout.from_lists([[["a", [40], [1]], ["b", [8, 6], [6, 1]], ["c", [40], [1]]], [], [128]])
PLAN = Plan(batches_per_epoch=12, epochs=1)
ALWAYS = 1e-9  # seconds between checkpoints: one an update


class Servers:
    """The shards of one run, each on a machine of its own, as far as they outlive their processes."""

    def __init__(
        self,
        run: Path,
        algorithm: str = "dana-zero",
        shards: int = 2,
        checkpoint_s: float = ALWAYS,
        workers: int = 1,
    ):
        self.run, self.shards = run / "0", shards
        self._settings = [
            ServerSettings(algorithm, workers, recovery_s=0.0, checkpoint_s=checkpoint_s, shard=shard, shards=shards)
            for shard in range(shards)
        ]
        self.folders = [folder_of(run / str(shard), shard) for shard in range(shards)]
        self.keepers: list[Keeper | SliceKeeper] = []
        self._served: list[ServerCore | Offering] = []
        self.busy = threading.RLock()
        self.mail: defaultdict[tuple[int, int], Queue[Reply]] = defaultdict(Queue)  # by shard and worker
        for shard, settings in enumerate(self._settings):
            (run / str(shard)).mkdir(parents=True)
            self.keepers.append(self._keeper(settings))
            self._served.append(self.keepers[-1].begin())

    def _keeper(self, settings: ServerSettings) -> Keeper | SliceKeeper:
        folder = self.folders[settings.shard].parent
        return SliceKeeper(folder, settings) if settings.shard else Keeper(RunFolder(folder, {}), settings)

    def handle(self, shard: int, request: Request | GoBack, route: int = 0) -> list[tuple[Any, Reply]]:
        with self.busy:
            return whole(self._served[shard].stream(route, request, time.monotonic()))

    def tick(self, now: float) -> None:
        for served in self._served:
            served.stream_tick(now)

    @property
    def cores(self) -> list[ServerCore]:
        return [keeper.core for keeper in self.keepers]

    def settle(self) -> None:
        """What is being written is written."""
        for thread in threading.enumerate():
            if thread.name == "danaz-checkpoint":
                thread.join()

    def kill(self, *shards: int) -> None:
        """These processes, all by default, and start them again."""
        with self.busy:
            self.settle()
            for shard in shards or range(self.shards):
                self.keepers[shard] = self._keeper(self._settings[shard])
                self._served[shard] = self.keepers[shard].resume()

    @property
    def versions(self) -> list[int]:
        return [core.master.version for core in self.cores]

    @property
    def params(self) -> Tensor:
        return torch.cat([core.master.params for core in self.cores])


class Way:
    """A worker's way to one shard, whichever process that is."""

    def __init__(self, servers: Servers, shard: int, worker: int = 0):
        self._servers, self._shard, self._worker = servers, shard, worker
        self.answered = threading.Event()
        self.before: Callable[[Request], None] = lambda request: None
        self.is_lost: Callable[[], bool] = lambda: False  # the answer; the request is said again
        self.common: tuple[int, ...] | None = None  # what it makes of the push's

    def exchange(self, request: Request) -> Reply:
        self.before(request)
        if isinstance(request, Push) and self.common is not None:
            request = replace(request, common=self.common)
        replies = self._servers.handle(self._shard, request, self._worker)
        if self.is_lost():
            return self.exchange(request)
        for worker, reply in replies:
            self._servers.mail[self._shard, worker].put(reply)
        reply = self._servers.mail[self._shard, self._worker].get(timeout=60.0)
        assert answers(reply, request)
        self.answered.set()
        return reply

    def receive_into(self, room: Tensor) -> None:
        """Nothing travels."""

    def close(self) -> None:
        """Nothing is held."""


class Trainer:
    """One worker, whose gradient is a function of the batch."""

    def __init__(self, servers: Servers, worker: int = 0):
        self.servers = servers
        self.ways = [Way(servers, shard, worker) for shard in range(servers.shards)]
        self.waits: list[float] = []
        self.link = ShardedLink(self.ways, LAYOUT, pause=self.waits.append)
        rule = servers.cores[0].settings.rule(0.9).worker_rule
        self.core = WorkerCore(Role(worker, 1, "", 0.9, LAYOUT, PLAN), rule)
        self.reply: Any = None

    def join(self) -> None:
        self.reply = self.say(lambda: self.core.join(torch.ones(LAYOUT.size)))

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
        trainers[-1].join()
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.servers.settle()
        trainer.link.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """θ at the end of a run in which nothing fails."""
    trainer = Trainer(Servers(tmp_path_factory.mktemp("undisturbed"), checkpoint_s=0.0))
    trainer.join()
    trainer.train()
    end = trainer.leave()
    trainer.link.close()
    return end


def check_end(trainer: Trainer, undisturbed: Tensor, restarts: int = 1) -> None:
    """The same bits, every batch once, no version left out; and nothing is kept of the checkpoints."""
    trainer.train()
    assert torch.equal(trainer.leave(), undisturbed)
    trainer.bye()
    check_run(trainer.servers, restarts)
    assert not any(folder.exists() for folder in trainer.servers.folders)


def check_run(servers: Servers, restarts: int) -> None:
    for keeper in servers.keepers:
        keeper.finish()
    updates, run = read_updates(servers.run), servers.run
    assert [update["version"] for update in updates] == list(range(1, 13))
    assert sorted(update["batch"] for update in updates) == list(range(12))
    summary = read_summary(run)
    assert (summary["complete"], summary["restarts"]) == (True, restarts)
    assert not servers.folders[0].exists()
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
        trainer.push()  # refused: it joins again
        lead, *others = servers.versions
        assert others == [lead] * (shards - 1)
    assert "it goes on at version 3, 1 updates are lost" in capsys.readouterr().err
    check_end(trainer, undisturbed, restarts=2)


def test_what_a_shard_has_not_heard_of_is_not_gone_back_to(begin: Callable[..., Trainer], undisturbed: Tensor) -> None:
    """Shard 0 has a checkpoint of its last update, of which a worker would have told the others with its next push."""
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
    check_end(trainer, undisturbed, restarts=0)


def test_without_a_generation_of_all_nothing_is_made_up(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    trainer.train(8)
    for path in trainer.servers.folders[1].iterdir():
        path.unlink()
    trainer.servers.kill()
    refusal = trainer.link.exchange(trainer.core.pull())
    assert isinstance(refusal, Refusal)
    assert "no checkpoint is there, and sound, of all 2 shards: shard 0 has " in refusal.reason
    assert refusal.reason.endswith("shard 1 has 0")
    assert not refusal.rejoin, "to ask again is of no use"
    assert not any(core.started for core in trainer.servers.cores)


def test_another_number_of_shards_is_refused(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    trainer.train(3)
    alone = Keeper(RunFolder(trainer.servers.run, {}), ServerSettings("dana-zero", 1))
    with pytest.raises(ResumeError, match="shards 2, this server has 1"):
        alone.resume()
    more = SliceKeeper(trainer.servers.folders[1].parent, ServerSettings("dana-zero", 1, shard=1, shards=3)).resume()
    with pytest.raises(ResumeError, match="shards 2, this server has 3"):
        more.stream(0, GoBack(0, 1, -1, generation=2, newest=9), 0.0)


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
        trainer.bye()
        assert torch.equal(trainer.servers.params, ends[-1])
    assert torch.equal(*ends)


def test_what_workers_brought_of_the_end_outlives_shard_0(begin: Callable[..., Trainer]) -> None:
    """Killed between the last good-bye and the end of the process: nobody is left to tell the shards anything."""
    trainer = begin()
    trainer.train()
    trainer.leave()
    trainer.bye()
    trainer.servers.kill()
    trainer.servers.tick(time.monotonic() + 1000.0)
    check_run(trainer.servers, restarts=1)


class Kill:
    """All shards die when this request, counted over both ways, has not come yet, or was heeded and not answered."""

    def __init__(self, trainer: Trainer, moment: int, when: str):
        self._servers, self._moment, self._when = trainer.servers, moment, when
        self._coming, self._heeded = itertools.count(), itertools.count()
        self.training_was_over = False
        for way in trainer.ways:
            way.before, way.is_lost = self._before, self._is_lost

    def _before(self, request: Request) -> None:
        if next(self._coming) == self._moment and self._when == "before":
            self._strike()

    def _is_lost(self) -> bool:
        is_now = next(self._heeded) == self._moment and self._when == "behind"
        if is_now:
            self._strike()
        return is_now

    def _strike(self) -> None:
        with self._servers.busy:
            leader = self._servers.cores[0]
            self.training_was_over = leader.started and leader.leases.done
            self._servers.kill()


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("moment", range(30))
def test_killed_at_any_moment(moment: int, when: str, tmp_path: Path, undisturbed: Tensor) -> None:
    """From the first join to the last good-bye."""
    trainer = Trainer(Servers(tmp_path / "run"))
    kill = Kill(trainer, moment, when)
    trainer.join()
    trainer.train()
    end = trainer.leave()
    trainer.bye()
    # Once shard 0 has kept that training is over, nothing is trained again of what the other has not kept.
    assert torch.equal(end, undisturbed) or kill.training_was_over
    check_run(trainer.servers, trainer.servers.cores[0].figures.restarts)
    assert not any(folder.exists() for folder in trainer.servers.folders)
    trainer.link.close()


def both_joined(servers: Servers) -> tuple[Trainer, Trainer]:
    first, second = Trainer(servers), Trainer(servers, worker=1)
    threads = ThreadPoolExecutor(1)
    joining = threads.submit(first.join)
    second.join()
    joining.result()
    threads.shutdown()
    return first, second


@pytest.mark.parametrize("told", [0, 1])
def test_a_worker_dies_when_it_has_told_one_shard(told: int, tmp_path: Path) -> None:
    """What that one went back to is the choice of the next worker, too."""
    servers = Servers(tmp_path / "run", workers=2)
    first, second = both_joined(servers)
    first.train(3)
    second.train(3)
    servers.kill()
    offers = [servers.handle(shard, GoBack(0, 1, -100))[0][1] for shard in (0, 1)]
    assert all(isinstance(offer, Offer) and not offer.told and len(offer.generations) > 1 for offer in offers)
    [generation, _] = choose(offers)  # type: ignore[arg-type]
    newest = max(offer.newest for offer in offers if isinstance(offer, Offer))
    [(_, offer)] = servers.handle(told, GoBack(0, 1, -101, generation, newest))
    assert offer == Offer(-101, (generation,), offers[told].newest, False, told=True)  # type: ignore[union-attr]
    second.push()
    assert servers.versions == [5, 5]
    for trainer in (first, second):
        trainer.link.close()


def test_a_shard_that_was_not_restarted_yet_is_waited_for(begin: Callable[..., Trainer], undisturbed: Tensor) -> None:
    """Also one that was restarted once, and has gone on since: what it went back to then is no offer now."""
    trainer = begin()
    servers = trainer.servers
    for life in (1, 2):
        trainer.train(3)
        servers.kill(1)
        trainer.link._pause = lambda wait_s: (trainer.waits.append(wait_s), servers.kill(0))  # type: ignore[arg-type, func-returns-value]
        trainer.push()
        assert len(trainer.waits) == life
        assert len(set(servers.versions)) == 1
    check_end(trainer, undisturbed, restarts=2)


def test_a_shard_that_is_never_restarted_is_not_waited_for_forever(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    trainer.train(3)
    trainer.servers.kill(1)
    with pytest.raises(ServerLostError, match="did not come back together"):
        trainer.push()
    assert sum(trainer.waits) > GIVE_UP_S
    assert len(trainer.waits) < GIVE_UP_S, "it does not ask all the time"


@pytest.mark.parametrize(
    ("generation", "newest"), [(3, 99), (3, -1), (3, 1 << 60), (99, None), (-1, None), (1 << 60, None)]
)
def test_a_choice_that_is_late_or_none_is_not_heeded(
    generation: int, newest: int | None, begin: Callable[..., Trainer], undisturbed: Tensor
) -> None:
    trainer = begin()
    trainer.train(8)
    trainer.servers.kill()
    [(_, offer)] = trainer.servers.handle(1, GoBack(0, 1, -100))
    assert isinstance(offer, Offer)
    is_late = newest == 99
    if is_late:  # by a worker that had heard of all but the newest
        newest = offer.newest - 1
    ask = GoBack(0, 1, -101, generation, offer.newest if newest is None else newest)
    assert trainer.servers.handle(1, ask) == [(0, replace(offer, request=-101))]
    check_end(trainer, undisturbed)


def test_what_all_have_is_kept_and_no_more_than_a_few(begin: Callable[..., Trainer]) -> None:
    trainer = begin(shards=3)
    trainer.train(11)
    kept = [complete_numbers(folder) for folder in trainer.servers.folders]
    assert kept == [list(core.kept) for core in trainer.servers.cores]
    assert len(set.intersection(*map(set, kept))) > 1
    assert max(map(len, kept)) < 6
    assert max(kept[0]) == 12, "an update each, and the beginning"


@pytest.mark.parametrize("garbage", [(1 << 40,), (-1, 0), (10, 11)])
def test_what_is_said_to_be_of_all_is_believed_of_what_is_there(
    garbage: tuple[int, ...], begin: Callable[..., Trainer], undisturbed: Tensor
) -> None:
    trainer = begin()
    trainer.train(5)
    for way in trainer.ways:
        way.common = garbage
    trainer.train(1)
    for way in trainer.ways:
        way.common = None
    trainer.train(2)
    trainer.servers.kill()
    check_end(trainer, undisturbed)


def test_shards_that_hear_nothing_of_each_other_do_not_fill_their_disks(begin: Callable[..., Trainer]) -> None:
    trainer = begin()
    for way in trainer.ways:
        way.common = ()
    trainer.train(11)
    assert complete_numbers(trainer.servers.folders[0]) == [1, 2, 3, 4]


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
