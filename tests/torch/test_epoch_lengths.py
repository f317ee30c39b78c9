"""Epochs of different lengths: data that grow, a batch size that changes, and plans that do not fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loops import adopt, alone, assert_same, make_data, make_net, make_plain_sgd, usual_step
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Sampler, Subset, TensorDataset

from danaz.protocol.messages import Plan
from danaz.server.leases import Leases
from danaz.server.settings import ServerSettings
from danaz.torch.data import Batching, OrderError
from danaz.torch.session import Session
from scripts import Counted, ScriptCluster, make_optimizer, run_world

SIZES = [4, 9, 14]  # samples in each epoch
LENGTHS = [2, 3, 4]  # batches of four of them: 4 would be 1 batch, so the first epoch has batches of two
BATCH_SIZES = [2, 4, 4]


# ---- plans -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_plan_places_each_batch(lengths: list[int]) -> None:
    plan = Plan.of(lengths)
    places = [(epoch, number) for epoch, length in enumerate(lengths) for number in range(length)]
    assert plan.batches == len(places)
    assert [plan.place_of(batch) for batch in range(plan.batches)] == places
    assert [plan.count(epoch) for epoch in range(len(lengths))] == lengths
    for batches, (epoch, number) in enumerate(places):
        assert plan.epoch_after(batches) == pytest.approx(epoch + number / lengths[epoch])
        assert plan.batches_until(plan.epoch_after(batches)) == pytest.approx(batches)
    assert plan.epoch_after(plan.batches) == len(lengths)
    assert plan.batches_until(len(lengths)) == plan.batches


def test_epochs_that_are_alike_make_the_plan_that_they_always_made() -> None:
    assert Plan.of([7, 7, 7]) == Plan(7, 3)
    assert Plan(7, 3).lengths == ()


def test_leases_tell_the_epoch_of_the_cluster() -> None:
    leases = Leases(Plan.of([2, 4]))
    epochs = []
    while held := leases.lease_up_to(0, 1):
        leases.complete(0, held[0])
        epochs.append(leases.epoch)
    assert epochs == [0.5, 1.0, 1.25, 1.5, 1.75, 2.0]
    assert leases.done
    assert msgpack.unpackb(msgpack.packb(asdict(leases.plan)))["lengths"] == [2, 4]


# ---- loops -----------------------------------------------------------------------------------------------------------


def growing(data: Any) -> Callable[[int], DataLoader[Any]]:
    return lambda epoch: DataLoader(Subset(data, range(SIZES[epoch])), BATCH_SIZES[epoch], shuffle=True)


def train(session: Session, loader: Callable[[int], DataLoader[Any]], batches: Any = LENGTHS) -> list[int]:
    """Train, and return the epoch of each batch."""
    model, optimizer = make_optimizer(session)
    seen = []
    for epoch in session.run_epochs(len(SIZES), batches):
        for x, y in session.run_batches(loader(epoch), epoch):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
            seen.append(epoch)
    return seen


@pytest.mark.parametrize("algorithm", ["baseline", "ssgd"])
@pytest.mark.parametrize("batches", [LENGTHS, lambda epoch: LENGTHS[epoch]])
def test_one_worker_equals_torch(algorithm: str, batches: Any) -> None:
    data, ours, theirs = make_data(), make_net(), make_net()
    with alone(algorithm) as session:
        session.choose_seed(2)
        optimizer = adopt(session, ours, make_plain_sgd(ours))
        for epoch in session.run_epochs(3, batches):
            loop = session.run_batches(growing(data)(epoch), epoch)
            assert len(loop) == LENGTHS[epoch]
            for x, y in loop:
                usual_step(ours, optimizer, x, y)
    sgd = make_plain_sgd(theirs)
    for epoch in range(3):
        batching = Batching(SIZES[epoch], BATCH_SIZES[epoch], seed=2)
        for number in range(LENGTHS[epoch]):
            usual_step(theirs, sgd, *data[batching.batch(epoch, number)[0]])
    assert_same(ours, theirs)


def test_a_data_set_that_grows_in_place(servers: list[Any]) -> None:
    data = TensorDataset(torch.zeros(2, 1), torch.zeros(2, 1))
    loader = DataLoader(data, 1)

    def grown(epoch: int) -> DataLoader[Any]:
        data.tensors = (torch.zeros(2 + epoch, 1), torch.zeros(2 + epoch, 1))
        return loader

    with alone() as session:
        assert train(session, grown, [2, 3, 4]) == [0, 0, 1, 1, 1, 2, 2, 2, 2]
        [server] = servers
        assert server.summary()["epochs"] == 3.0


class Growing(Sampler[int]):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZES[self.epoch]))


def test_a_sampler_that_gives_more_in_each_epoch() -> None:
    data = TensorDataset(torch.zeros(14, 1), torch.zeros(14, 1))
    with alone() as session:
        seen = train(session, lambda _: DataLoader(data, 2, sampler=Growing()), [2, 5, 7])
    assert Counter(seen) == {0: 2, 1: 5, 2: 7}


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_share_epochs_of_all_lengths(ranks: int) -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=2))

    def story(session: Session, number: int) -> None:
        train(session, growing(Counted(SIZES[-1], number, cluster.fetched, lambda: None)))

    for number in range(2):
        cluster.worker(number, story, ranks)
    cluster.run()
    assert sorted(update.batch for update in cluster.updates) == list(range(sum(LENGTHS)))
    assert cluster.core.leases.epoch == 3
    expected = Counter(index for size in SIZES for index in range(size))
    # An epoch of 9 ends with a batch of one sample, on which a second rank computes as well, with weight zero.
    assert sum((cluster.counts() - expected).values()) == ranks - 1
    assert not expected - cluster.counts()


def test_machines_of_ssgd_join_batches_in_epochs_of_all_lengths() -> None:
    fetched: list[tuple[int, int]] = []
    updates: list[list[int]] = []
    story = lambda session, number: updates.append(  # noqa: E731
        train(session, growing(Counted(SIZES[-1], number, fetched, lambda: None)))
    )
    run_world("ssgd", 2, 1, story)
    assert updates == [[0, 1, 1, 2, 2]] * 2
    assert not Counter(index for size in SIZES for index in range(size)) - Counter(sample for _, sample in fetched)


def test_batches_that_an_epoch_leaves_are_read_from_its_own_loader() -> None:
    values = [TensorDataset(torch.full((4 + epoch, 1), float(epoch)), torch.zeros(4 + epoch, 1)) for epoch in range(3)]
    seen = []
    with alone() as session:
        model, optimizer = make_optimizer(session)
        for epoch in session.run_epochs(3, [4, 5, 6]):
            for x, y in session.run_batches(DataLoader(values[epoch], 1), epoch):
                mse_loss(model(x), y).backward()
                optimizer.step()
                seen.append((epoch, int(x)))
                if epoch < 2 and len(seen) % 3 == 0:
                    break
    assert Counter(value for _, value in seen) == {0: 4, 1: 5, 2: 6}
    assert (1, 0) in seen, "what epoch 0 left came first in epoch 1"


@pytest.mark.parametrize("lengths", [[4, 4], [4, 5]])
def test_epochs_have_loaders_of_their_own_also_if_they_are_as_long(lengths: list[int]) -> None:
    data = [
        TensorDataset(torch.full((2 * n - e, 1), float(e)), torch.zeros(2 * n - e, 1)) for e, n in enumerate(lengths)
    ]
    seen = []
    with alone() as session:
        model, optimizer = make_optimizer(session)
        for epoch in session.run_epochs(2, lengths):
            for x, y in session.run_batches(DataLoader(data[epoch], 2), epoch):
                mse_loss(model(x), y).backward()
                optimizer.step()
                seen += x.flatten().tolist()
                if epoch == 0 and len(seen) == 4:
                    break
    assert Counter(seen) == {0.0: 2 * lengths[0], 1.0: 2 * lengths[1] - 1}


def test_a_batch_of_an_epoch_whose_loader_nobody_here_has_is_left_out(
    servers: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This process came in epoch 1, and is leased what a lost one held of epoch 0."""
    monkeypatch.setattr("danaz.torch.session.current_epoch", lambda place, group: 1)
    with alone() as session:
        assert train(session, growing(make_data_of_numbers())) == [1] * LENGTHS[1] + [2] * LENGTHS[2]
        [server] = servers
        assert server.summary()["skipped_batches"] == LENGTHS[0]
        assert server.summary()["epochs"] == 3.0
    assert "batch 0 of an epoch whose loader this process does not have is left out" in capsys.readouterr().err


def test_schedulers_follow_epochs_of_all_lengths() -> None:
    model, rates = make_net(), []
    total = sum(LENGTHS)
    with alone() as session:
        optimizer = adopt(session, model, make_plain_sgd(model))
        scheduler = OneCycleLR(optimizer, 0.1, total_steps=total, cycle_momentum=False)
        for epoch in session.run_epochs(3, LENGTHS):
            for x, y in session.run_batches(growing(make_data())(epoch), epoch):
                rates.append(optimizer.param_groups[0]["lr"])
                usual_step(model, optimizer, x, y)
                if len(rates) < total:
                    scheduler.step()
    sgd = make_plain_sgd(make_net())
    theirs = OneCycleLR(sgd, 0.1, total_steps=total, cycle_momentum=False)
    expected = []
    for step in range(total):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        if step < total - 1:
            theirs.step()
    assert rates == pytest.approx(expected)


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_a_loader_that_is_not_as_long_as_was_said() -> None:
    with alone() as session, pytest.raises(OrderError, match="has 3 batches in epoch 1, and the run was planned for 5"):
        train(session, growing(make_data_of_numbers()), [2, 5, 4])


def make_data_of_numbers() -> TensorDataset:
    return TensorDataset(torch.zeros(14, 1), torch.zeros(14, 1))


@pytest.mark.parametrize("batches", [[1, 2], [1, 2, 0], [1, 2, True], [1, 2, 2.0], lambda epoch: -epoch])
def test_lengths_that_are_none(batches: Sequence[int] | Callable[[int], int]) -> None:
    with alone() as session, pytest.raises(ValueError, match="takes 3 whole numbers from 1 up"):
        session.run_epochs(3, batches)
