"""Several loaders in one script: those beside the one whose batches are leased, and the one that evaluates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from loops import alone
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, WeightedRandomSampler

from danaz.server.settings import ServerSettings
from danaz.torch.data import UnsupportedLoaderError
from danaz.torch.loop import LoopError
from danaz.torch.session import Session
from scripts import ScriptCluster, make_optimizer, run_world

LABELED, UNLABELED, BATCH = 12, 8, 4
Seen = list[tuple[list[float], list[float]]]


class Noted(Dataset[Tensor]):
    """A data set whose items are their numbers."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index)])


def labeled(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(float(LABELED)).unsqueeze(1)), BATCH, shuffle=True, **options)


def train(session: Session, *beside: DataLoader[Any], epochs: int = 4, **options: Any) -> Seen:
    """Train on pairs; return the samples of each batch. The run's seed is that of these calls."""
    session.choose_seed(6)
    model, optimizer = make_optimizer(session)
    seen: Seen = []
    loader = labeled(**options)
    for epoch in session.run_epochs(epochs):
        batches = session.run_batches(loader, epoch, *beside)
        assert len(batches) * session.settings.workers in (3, 4, 6)
        for each in batches:
            (x,), *others = each if beside else (each,)
            loss = mse_loss(model(x), x) + sum(mse_loss(model(u), u) for u in others)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append((x.flatten().tolist(), [i for u in others for i in u.flatten().tolist()]))
    return seen


@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 1, "persistent_workers": True}])
def test_each_batch_brings_one_of_the_loader_beside(options: dict[str, Any]) -> None:
    with alone() as session:
        pairs = train(session, DataLoader(Noted(UNLABELED), BATCH, shuffle=True), **options)
    with alone() as session:
        single = train(session)
    assert [first for first, _ in pairs] == [first for first, _ in single], "the first loader's batches stay the same"
    beside = [item for _, items in pairs for item in items]
    rounds = [beside[start : start + UNLABELED] for start in range(0, len(beside), UNLABELED)]
    assert len(rounds) == 6
    assert all(sorted(each) == list(range(UNLABELED)) for each in rounds), "each sample once a round"
    assert len({tuple(each) for each in rounds}) > 1, "in another order each time"


def test_loaders_of_one_size_have_orders_of_their_own() -> None:
    with alone() as session:
        pairs = train(session, DataLoader(Noted(LABELED), BATCH, shuffle=True))
    assert [first for first, _ in pairs] != [second for _, second in pairs]


def test_two_loaders_beside_one_with_a_sampler() -> None:
    weighted = DataLoader(Noted(3), 2, sampler=WeightedRandomSampler([0.0, 0.0, 1.0], 5))
    with alone() as session:
        pairs = train(session, DataLoader(Noted(UNLABELED), BATCH), weighted)
    assert [second[:BATCH] for _, second in pairs[:3]] == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    assert [second[BATCH:] for _, second in pairs[:4]] == [[2, 2], [2, 2], [2], [2, 2]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_has_samples_of_its_own(ranks: int) -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=2))
    seen: Seen = []
    unlabeled = DataLoader(Noted(UNLABELED), BATCH, shuffle=True)
    for number in range(2):
        cluster.worker(number, lambda session, _: seen.extend(train(session, unlabeled)), ranks)
    cluster.run()
    assert Counter(item for _, items in seen for item in items) == dict.fromkeys(range(UNLABELED), 6)
    assert Counter(item for items, _ in seen for item in items) == dict.fromkeys(range(LABELED), 4)


def test_all_machines_of_ssgd_have_samples_of_their_own() -> None:
    seen: Seen = []
    unlabeled = DataLoader(Noted(UNLABELED), BATCH, shuffle=True)
    run_world("ssgd", 2, 2, lambda session, _: seen.extend(train(session, unlabeled)))
    # Two machines need 8 samples for an update; the second update of an epoch of 12 has 4, and pairs with 8.
    assert Counter(item for _, items in seen for item in items) == dict.fromkeys(range(UNLABELED), 8)
    assert Counter(item for items, _ in seen for item in items) == dict.fromkeys(range(LABELED), 4)


def test_a_stream_beside_is_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

    with alone() as session, pytest.raises(UnsupportedLoaderError, match="cannot share out an IterableDataset"):
        train(session, DataLoader(Stream(), BATCH))


def test_a_second_loop_over_other_data_names_the_cure() -> None:
    with alone() as session:
        model, optimizer = make_optimizer(session)
        for epoch in session.run_epochs(1):
            for (x,) in session.run_batches(labeled(), epoch):
                mse_loss(model(x), x).backward()
                optimizer.step()
                with pytest.raises(LoopError, match=r"danaz\.shard\(loader, epoch, other\)"):
                    next(session.run_batches(DataLoader(Noted(4)), epoch))


def test_evaluation_between_batches_is_left_alone() -> None:
    with alone() as session:
        model, optimizer = make_optimizer(session)
        for epoch in session.run_epochs(2):
            for (x,) in session.run_batches(labeled(), epoch):
                mse_loss(model(x), x).backward()
                optimizer.step()
                with torch.no_grad():
                    assert sorted(
                        i for u in DataLoader(Noted(UNLABELED), 3, shuffle=True) for i in u.flatten()
                    ) == list(range(UNLABELED))
