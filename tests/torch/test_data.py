"""Each sample is used once in an epoch: batches and their parts, loaders of leased batches, workers of all speeds."""

from __future__ import annotations

import atexit
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
import zmq
from hypothesis import given
from hypothesis import strategies as st
from sockets import PATIENCE_S
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, Sampler, SubsetRandomSampler, TensorDataset

import danaz.torch.samplers
import danaz.worker.link
from danaz.run.settings import RankInfo, Settings
from danaz.server.settings import ServerSettings
from danaz.serving.socket import BoundRouter
from danaz.torch.data import (
    Batching,
    LeaseSampler,
    Portion,
    Share,
    UnsupportedLoaderError,
    read_ahead,
    rebuild,
)
from danaz.torch.samplers import order_of
from danaz.torch.session import Session
from scripts import Counted, ScriptCluster, make_optimizer

# ---- batches and parts of them --------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 2**40))
def test_an_epoch_of_batches_is_every_sample_once(
    samples: int, batch_size: int, shuffle: bool, drop_last: bool, epoch: int, seed: int
) -> None:
    batching = Batching(samples, batch_size, shuffle, drop_last, seed)
    count = batching.batches_per_epoch
    batches = [batching.indices(epoch * count + number) for number in range(count)]
    used = np.concatenate([*batches, np.empty(0, np.int64)])
    assert len(np.unique(used)) == len(used) == (samples // batch_size * batch_size if drop_last else samples)
    assert {batching.epoch_of(epoch * count + number) for number in range(count)} <= {epoch}
    assert all(len(batch) == batch_size for batch in batches[:-1])
    if not shuffle:
        assert used.tolist() == list(range(len(used)))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {
        (seed, epoch): tuple(Batching(50, 50, seed=seed).indices(epoch)) for seed in range(3) for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    assert tuple(Batching(50, 50, seed=2).indices(1)) == orders[2, 1]


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 5))
def test_the_parts_of_a_batch_are_the_batch(size: int, workers: int, ranks: int) -> None:
    batch = np.arange(size)
    parts = [Share(w, workers, r, ranks).of(batch) for w in range(workers) for r in range(ranks)]
    assert np.concatenate(parts).tolist() == batch.tolist()
    for worker in range(workers):
        sizes = [len(part) for part in parts[worker * ranks : (worker + 1) * ranks]]
        assert max(sizes) - min(sizes) <= 1


def test_uneven_parts() -> None:
    assert [len(Share(rank=rank, ranks=3).of(np.arange(10))) for rank in range(3)] == [4, 3, 3]
    assert [Portion(0, 10, here).weight for here in (4, 3, 0)] == [0.4, 0.3, 0.0]


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 5))
def test_where_a_step_needs_two_samples_no_rank_gets_one(size: int, workers: int, ranks: int) -> None:
    batch = np.arange(size)
    parts = [Share(w, workers, r, ranks, least=2).of(batch) for w in range(workers) for r in range(ranks)]
    assert np.concatenate(parts).tolist() == batch.tolist()
    assert 1 not in [len(part) for part in parts] or size == 1
    plain = [Share(w, workers, r, ranks).of(batch) for w in range(workers) for r in range(ranks)]
    if min(map(len, plain)) > 1:
        assert [part.tolist() for part in parts] == [part.tolist() for part in plain]


def test_ranks_that_a_batch_leaves_idle() -> None:
    assert [Share(ranks=4, least=2).ranks_at_work(samples) for samples in (1, 2, 5, 8, 9)] == [1, 1, 2, 4, 4]
    assert Share(ranks=4).ranks_at_work(5) == 4


def test_a_rank_without_samples_computes_on_the_first_one_with_weight_zero() -> None:
    batches = deque([0, 1, 2, 3])
    batching = Batching(samples=5, batch_size=3, shuffle=False)  # batches of 3 and 2 samples
    take = lambda: batches.popleft() if batches else None  # noqa: E731
    sampler = LeaseSampler(batching, batching.plan(2), Share(rank=2, ranks=3), take)
    assert list(sampler) == [[2], [3], [2], [3]]
    parts = [(each.batch, each.samples, each.here) for each in sampler.portions]
    assert parts == [(0, 3, 1), (1, 2, 0), (2, 3, 1), (3, 2, 0)]
    assert sampler.portions[1].weight == 0


# ---- loaders --------------------------------------------------------------------------------------------------------

DATA = TensorDataset(torch.arange(10.0).unsqueeze(1), torch.arange(10.0).unsqueeze(1))


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(3.0))


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.repeat(0)


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (DataLoader(Stream(), batch_size=2), "IterableDataset: .* danaz.stream\\(loader, updates\\)"),
        (DataLoader(DATA, batch_size=None), "its SequentialSampler gives 0 in place of a list of samples"),
        (DataLoader(DATA, batch_size=11, drop_last=True), "10 samples do not fill one batch of 11"),
        (DataLoader(DATA, batch_sampler=[]), "list gives 0 batches in epoch 0"),
        (DataLoader(DATA, 5, drop_last=True, sampler=SubsetRandomSampler(range(4))), "SubsetRandomSampler gives 0"),
        (DataLoader(DATA, batch_size=10, sampler=Endless()), "Endless has given 100 samples and come to no end"),
    ],
)
def test_loaders_that_cannot_be_shared_out_are_refused_with_the_reason(
    loader: DataLoader[Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(danaz.torch.samplers, "MOST_SAMPLES", 50)
    with pytest.raises(UnsupportedLoaderError, match=reason):
        order_of(loader, 1, seed=0).count(0)


def test_a_loader_says_how_it_batches() -> None:
    assert order_of(DataLoader(DATA, batch_size=3, shuffle=True), 2, seed=5) == Batching(10, 6, True, False, 5)
    assert order_of(DataLoader(DATA, batch_size=3, drop_last=True), 1, seed=0) == Batching(10, 3, False, True, 0)


def test_a_rebuilt_loader_keeps_what_the_user_chose() -> None:
    loader = DataLoader(
        DATA, batch_size=4, num_workers=2, prefetch_factor=3, timeout=7, collate_fn=len, persistent_workers=True
    )
    assert read_ahead(loader) == 2 + 2 * 3
    sampler = LeaseSampler(Batching(10, 4), Batching(10, 4).plan(1), Share(), lambda: None)
    rebuilt = rebuild(loader, sampler)
    kept = ("dataset", "num_workers", "prefetch_factor", "timeout", "collate_fn", "pin_memory", "persistent_workers")
    for name in kept:
        assert getattr(rebuilt, name) == getattr(loader, name)
    assert rebuilt.batch_sampler is sampler
    assert read_ahead(DataLoader(DATA)) == 1


# ---- workers --------------------------------------------------------------------------------------------------------


def train(
    cluster: ScriptCluster,
    session: Session,
    number: int,
    samples: int,
    epochs: int,
    hold: Callable[[], object] = lambda: None,
    after_step: Callable[[], object] = lambda: None,
    **loader: Any,
) -> None:
    """Run the usual training loop; ``hold`` runs as each sample is fetched, ``after_step`` after each step."""
    model, optimizer = make_optimizer(session)
    session.epochs = epochs
    data = Counted(samples, number, cluster.fetched, hold)
    for epoch in range(epochs):
        for x, y in session.shard(DataLoader(data, shuffle=True, **loader), epoch):
            optimizer.zero_grad()
            mse_loss(model(x), y).backward()
            optimizer.step()
            after_step()
    session.finish()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("algorithm", ["dana", "dana-zero"])
def test_a_slow_worker_takes_nothing_away(algorithm: str, drop_last: bool) -> None:
    """Worker 1 is held up in its first batch until worker 0 has done all the others."""
    samples, batch_size, epochs = 22, 4, 3
    total = Batching(samples, batch_size, drop_last=drop_last).plan(epochs).batches
    cluster = ScriptCluster(ServerSettings(algorithm, workers=2))
    others_done, steps = threading.Event(), Counter[int]()

    def count() -> None:
        steps[0] += 1
        if steps[0] == total - 1:
            others_done.set()

    def fast(session: Session, number: int) -> None:
        train(cluster, session, number, samples, epochs, after_step=count, batch_size=batch_size, drop_last=drop_last)

    def slow(session: Session, number: int) -> None:
        hold = lambda: others_done.wait(PATIENCE_S)  # noqa: E731
        train(cluster, session, number, samples, epochs, hold, batch_size=batch_size, drop_last=drop_last)

    cluster.worker(0, fast)
    cluster.worker(1, slow)
    cluster.run()
    assert sorted(update.batch for update in cluster.updates) == list(range(total))
    assert cluster.batches_by_worker() == {0: total - 1, 1: 1}
    assert cluster.updates[-1].lag == total - 1
    if drop_last:
        assert sum(cluster.counts().values()) == epochs * (samples // batch_size * batch_size)
        assert max(cluster.counts().values()) <= epochs
    else:
        assert cluster.counts() == dict.fromkeys(range(samples), epochs)


@pytest.mark.parametrize(("samples", "batch_size", "epochs"), [(22, 4, 2), (3, 2, 1), (1, 5, 4)])
def test_data_that_runs_out_unevenly(samples: int, batch_size: int, epochs: int) -> None:
    """With more workers than batches, or a short batch, nothing hangs, all workers end, and each sample is used."""
    cluster = ScriptCluster(ServerSettings("dana", workers=3))
    for number in range(3):
        cluster.worker(number, lambda session, n: train(cluster, session, n, samples, epochs, batch_size=batch_size))
    cluster.run()
    assert cluster.counts() == dict.fromkeys(range(samples), epochs)
    assert cluster.core.leases.epoch == epochs
    assert [update.version for update in cluster.updates] == list(range(1, len(cluster.updates) + 1))


def test_batches_of_a_lost_worker_are_given_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(danaz.worker.link, "RETRY_FIRST_S", 2 * PATIENCE_S)  # the late answer must arrive at once
    samples, batch_size, epochs = 20, 4, 2
    cluster = ScriptCluster(ServerSettings("dana-zero", workers=2))

    def survivor(session: Session, number: int) -> None:
        train(cluster, session, number, samples, epochs, batch_size=batch_size)

    def victim(session: Session, number: int) -> None:
        make_optimizer(session)
        session.epochs = epochs
        data = Counted(samples, number, [], lambda: None)
        next(session.shard(DataLoader(data, shuffle=True, batch_size=batch_size), 0))
        cluster.core.members[number].heard_at = -inf  # it falls silent in its first batch, and has been so for long

    cluster.worker(0, survivor)
    cluster.worker(1, victim)
    cluster.run()
    assert cluster.batches_by_worker() == {0: 10}
    assert sorted(update.batch for update in cluster.updates) == list(range(10))
    assert cluster.counts() == dict.fromkeys(range(samples), epochs)
    assert not cluster.core.members[1].alive


def test_a_loop_that_is_left_early_ends_the_run() -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=2), end_s=2.0)

    def impatient(session: Session, number: int) -> None:
        model, optimizer = make_optimizer(session)
        session.epochs = 3
        loader = DataLoader(Counted(20, number, cluster.fetched, lambda: None), batch_size=2)
        for step, (x, y) in enumerate(session.shard(loader, 0)):
            mse_loss(model(x), y).backward()
            optimizer.step()
            if step == 2:
                break
        session.finish()

    cluster.worker(0, impatient)
    cluster.worker(1, impatient)
    cluster.run()
    assert len(cluster.updates) == 6


def test_another_loader_in_the_midst_of_a_run_is_refused() -> None:
    session = Session(Settings("dana"), RankInfo())
    atexit.unregister(session.close)
    make_optimizer(session)
    batches = session.shard(DataLoader(DATA, batch_size=5), 0)
    next(batches)
    with pytest.raises(ValueError, match="another size, batch size or order than the run began with"):
        next(session.shard(DataLoader(DATA, batch_size=2), 0))
    session.close()


def test_the_server_socket_is_a_router() -> None:
    bound = BoundRouter("tcp://127.0.0.1:*")
    assert bound.socket.type == zmq.ROUTER
    assert bound.address.startswith("tcp://127.0.0.1:")
    bound.close(linger_ms=0)
