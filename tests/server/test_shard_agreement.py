"""Workers tell restarted shards which checkpoint all go back to, at whatever moment the shards were killed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from axis import ADAMW
from mortal_shards import LAYOUT, Servers, Trainer, check_end, check_run, training, undisturbed_end
from torch import Tensor

from danaz.optimizers import SGD
from danaz.protocol.agreement import choose
from danaz.protocol.messages import GoBack, Heartbeat, Offer
from danaz.serving.checkpoint import complete_numbers
from danaz.worker.core import Request
from danaz.worker.link import GIVE_UP_S, ServerLostError


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    with training(tmp_path / "run", optimizers=ADAMW) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return undisturbed_end(tmp_path_factory.mktemp("undisturbed"), ADAMW)


@pytest.fixture(scope="module")
def undisturbed_sgd(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    return undisturbed_end(tmp_path_factory.mktemp("undisturbed"))


class Kill:
    """All shards die before this request, counted over both ways, has come, or after it was served but not answered."""

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
        is_now = next(self._heeded) == self._moment and self._when == "after"
        if is_now:
            self._strike()
        return is_now

    def _strike(self) -> None:
        with self._servers.busy:
            leader = self._servers.cores[0]
            self.training_was_over = leader.started and leader.leases.done
            self._servers.kill()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("moment", range(30))
def test_killed_at_any_moment(
    moment: int, when: str, tmp_path: Path, undisturbed: Tensor, undisturbed_sgd: Tensor
) -> None:
    """The shards are killed at every moment from the first join to the last good-bye.

    Both optimizers are killed in either half of an exchange.
    """
    optimizers = SGD if moment % 4 < 2 else ADAMW
    trainer = Trainer(Servers(tmp_path / "run", optimizers=optimizers))
    kill = Kill(trainer, moment, when)
    trainer.join()
    trainer.train()
    end = trainer.leave()
    trainer.bye()
    # Once shard 0 has saved that training is over, updates that the other shard has not saved are not made again.
    assert torch.equal(end, undisturbed_sgd if optimizers == SGD else undisturbed) or kill.training_was_over
    check_run(trainer.servers, trainer.servers.cores[0].totals.restarts)
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
    """The next worker makes the choice that this shard has been told."""
    first, second = both_joined(servers := Servers(tmp_path / "run", workers=2))
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


def test_a_shard_that_was_not_restarted_yet_is_waited_for(trainer: Trainer, undisturbed: Tensor) -> None:
    """This holds also for a shard that was restarted before and has gone on since: it no longer offers that choice."""
    servers = trainer.servers
    trainer.while_it_waits = lambda: servers.kill(0)
    for life in (1, 2):
        trainer.train(3)
        servers.kill(1)
        trainer.push()
        assert len(trainer.waits) == life
        assert len(set(servers.versions)) == 1
    check_end(trainer, undisturbed, restarts=2)


def test_a_shard_that_is_never_restarted_is_not_waited_for_forever(trainer: Trainer) -> None:
    trainer.train(3)
    trainer.servers.kill(1)
    with pytest.raises(ServerLostError, match="did not come back together"):
        trainer.push()
    assert sum(trainer.waits) > GIVE_UP_S
    assert len(trainer.waits) < GIVE_UP_S, "it waits between its requests"


def test_a_choice_that_is_late_or_none_is_not_heeded(trainer: Trainer, undisturbed: Tensor) -> None:
    trainer.train(8)
    trainer.servers.kill()
    [(_, offer)] = trainer.servers.handle(1, GoBack(0, 1, -1))
    assert isinstance(offer, Offer)
    first, newest = offer.generations[0], offer.newest
    late = (first, newest - 1)  # its sender had not heard of the newest one
    for choice in (late, (first, -1), (first, 1 << 60), (99, newest), (-1, newest), (1 << 60, newest)):
        assert trainer.servers.handle(1, GoBack(0, 1, -1, *choice)) == [(0, offer)]
    check_end(trainer, undisturbed)
    assert trainer.servers.versions == [12, 12]


def test_nothing_but_the_offer_comes_of_a_shard_that_does_not_know_where_to_go_on(trainer: Trainer) -> None:
    trainer.train(8)
    trainer.servers.kill()
    join = trainer.core.join(torch.ones(LAYOUT.size))
    [(_, offer)] = trainer.servers.handle(0, join)
    assert isinstance(offer, Offer)
    assert (offer.request, offer.told) == (join.request, False)
    assert trainer.servers.handle(0, Heartbeat(0, 1)) == []
    trainer.servers.tick(1e12)
    for keeper in trainer.servers.keepers:
        keeper.finish()
    assert not (trainer.servers.run / "summary.json").exists(), "another folder may hold a fuller one"
    assert all(complete_numbers(folder) for folder in trainer.servers.folders)


def test_what_all_have_is_kept_and_no_more_than_a_few(tmp_path: Path) -> None:
    with training(tmp_path / "run", shards=3) as trainer:
        trainer.train(11)
    kept = [complete_numbers(folder) for folder in trainer.servers.folders]
    assert len(set.intersection(*map(set, kept))) > 1
    assert max(map(len, kept)) < 6
    assert max(kept[0]) == 12, "a checkpoint for each update, and the beginning"


@pytest.mark.parametrize("garbage", [(1 << 40,), (-1, 0), (10, 11)])
def test_what_is_said_to_be_of_all_is_believed_of_what_is_there(
    garbage: tuple[int, ...], trainer: Trainer, undisturbed: Tensor
) -> None:
    trainer.train(5)
    for way in trainer.ways:
        way.common = garbage
    trainer.train(1)
    for way in trainer.ways:
        way.common = None
    trainer.train(2)
    trainer.servers.kill()
    check_end(trainer, undisturbed)


def test_shards_that_hear_nothing_of_each_other_do_not_fill_their_disks(trainer: Trainer) -> None:
    for way in trainer.ways:
        way.common = ()
    trainer.train(11)
    assert [complete_numbers(folder) for folder in trainer.servers.folders] == [[*range(5, 13)], [*range(4, 12)]]
