"""Streams: each rank reads its own part, and no item is read twice in a pass."""

from __future__ import annotations

import atexit
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from loops import adopt, alone, assert_same, make_net, make_sgd
from sockets import PATIENCE_S
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from danaz.run.settings import RankInfo, Settings
from danaz.server.settings import ServerSettings
from danaz.torch.data import OrderError, Share, UnsupportedLoaderError
from danaz.torch.loop import LoopError
from danaz.torch.session import Session
from danaz.torch.stream import Part, Reader, StreamError, open_stream, stream_part
from scripts import ScriptCluster, make_optimizer, run_world


class Numbers(IterableDataset[int]):
    """A data set as one is written for a single process."""

    def __init__(self, size: int = 24):
        self.size = size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size))


class Shuffled(Numbers):
    """Draws its order anew in each pass, from Python's random numbers."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(self.size), self.size))


class SplitsByProcess(Numbers):
    """Splits itself over the loading processes, as torch's documentation shows."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        return iter(range(self.size)) if info is None else iter(range(info.id, self.size, info.num_workers))


class SplitsItself(Numbers):
    """Reads its own part only."""

    def __iter__(self) -> Iterator[int]:
        index, parts = stream_part()
        yield from range(index, self.size, parts)


class Examples(Numbers):
    """Items that a net can train on."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        for number in range(self.size):
            generator = torch.Generator().manual_seed(number)
            yield torch.randn(3, 5, 5, generator=generator), torch.randn(2, generator=generator)


KINDS = [Numbers, Shuffled, SplitsByProcess, SplitsItself]


def batches_of(
    source: Iterable[Any], workers: int, ranks: int, most: int, done: int = 0, seed: int = 1
) -> dict[tuple[int, int], list[Any]]:
    """Return the first batches of each rank of a cluster whose workers have a server."""
    found = {}
    for worker in range(workers):
        for rank in range(ranks):
            part = Part(worker, workers).split(rank, ranks)
            stream = open_stream(source, part, Share(rank=rank, ranks=ranks), seed, done, samples=1)
            found[worker, rank] = [delivery.content for delivery in islice(stream.batches, most)]
    return found


# ---- parts -----------------------------------------------------------------------------------------------------------


def test_parts_of_parts_are_all_items() -> None:
    parts = [
        Part(w, 3).split(r, ranks).split(p, 2)
        for w, ranks in enumerate((1, 2, 4))
        for r in range(ranks)
        for p in (0, 1)
    ]
    items = Counter(item for part in parts for item in range(part.index, 240, part.count))
    assert items == Counter(range(240))


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_item_is_read_once_in_a_pass(kind: type[Numbers], processes: int) -> None:
    loader = DataLoader(kind(32), batch_size=4, num_workers=processes)
    found = batches_of(loader, workers=2, ranks=2, most=4)
    assert {len(batch) for batches in found.values() for batch in batches} == {2}, "ranks share the batch size"
    items = Counter(int(item) for batches in found.values() for batch in batches for item in batch)
    assert items == Counter(range(32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_begins_again_and_batches_stay_whole(kind: type[Numbers]) -> None:
    loader = DataLoader(kind(6), batch_size=4)
    found = batches_of(loader, workers=1, ranks=1, most=6)[0, 0]
    items = [int(item) for batch in found for item in batch]
    assert [len(batch) for batch in found] == [4] * 6
    assert [sorted(items[start : start + 6]) for start in range(0, 24, 6)] == [list(range(6))] * 4
    assert (items[:6] == items[6:12]) == (kind is not Shuffled), "each pass has random numbers of its own"


def test_more_parts_than_items() -> None:
    loader = DataLoader(Numbers(3), batch_size=1)
    found = batches_of(loader, workers=5, ranks=1, most=3)
    assert Counter(int(batch) for batches in found.values() for batch in batches) == Counter({0: 5, 1: 5, 2: 5})


def test_items_of_a_plain_iterable_are_batches() -> None:
    found = batches_of([torch.full((2,), i) for i in range(8)], workers=2, ranks=2, most=2)
    assert [[int(batch[0]) for batch in batches] for batches in found.values()] == [[0, 4], [2, 6], [1, 5], [3, 7]]


def test_a_loader_whose_data_set_makes_batches() -> None:
    found = batches_of(DataLoader(Numbers(8), batch_size=None), workers=2, ranks=1, most=4)
    assert list(found.values()) == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_the_scripts_random_numbers_stay_as_they_were() -> None:
    random.seed(3)
    expected = [random.random() for _ in range(5)]
    random.seed(3)
    reader = iter(Reader(Shuffled(), Part(1, 2), seed=0))
    assert [(random.random(), next(reader))[0] for _ in range(5)] == expected


def test_set_epoch_gets_the_pass() -> None:
    class Epochs(Numbers):
        def set_epoch(self, epoch: int) -> None:
            self.size = epoch + 1

    assert list(islice(Reader(Epochs(), Part(), 0), 6)) == [0, 0, 1, 0, 1, 2]


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_who_comes_back_goes_on_behind_what_was_read(kind: type[Numbers], processes: int) -> None:
    loader = DataLoader(kind(), batch_size=2, num_workers=processes)
    whole = batches_of(loader, workers=2, ranks=1, most=6)
    rest = batches_of(loader, workers=2, ranks=1, most=4, done=2)
    for place, batches in whole.items():
        assert [batch.tolist() for batch in rest[place]] == [batch.tolist() for batch in batches[2:]]


# ---- what cannot be divided ------------------------------------------------------------------------------------------


def test_a_data_set_without_items() -> None:
    with pytest.raises(StreamError, match="it has no items in pass 0"):
        batches_of(DataLoader(Numbers(0), batch_size=1), 1, 1, most=1)
    with pytest.raises(StreamError, match="part 2 of 3 of the stream has no items"):
        batches_of(DataLoader(SplitsItself(2), batch_size=1), 3, 1, most=1)


def test_a_part_that_is_asked_for_too_late() -> None:
    class Late(Numbers):
        def __iter__(self) -> Iterator[int]:
            yield 1
            yield stream_part()[0]

    with pytest.raises(StreamError, match="must call it before its first item"):
        list(islice(Reader(Late(), Part(), 0), 2))


def test_a_worker_init_fn_that_splits_the_data_set_is_told() -> None:
    def split(number: int) -> None:
        get_worker_info().dataset.size = 7 + get_worker_info().dataset.size  # type: ignore[union-attr]

    loader = DataLoader(Numbers(), batch_size=1, num_workers=1, worker_init_fn=split)
    with pytest.raises(AttributeError, match=r"danaz\.stream divides the data set itself"):
        batches_of(loader, 1, 1, most=1)


def test_a_map_style_data_set_is_told_where_it_belongs() -> None:
    loader = DataLoader(TensorDataset(torch.zeros(4)), batch_size=1)
    with pytest.raises(UnsupportedLoaderError, match=r"\(TensorDataset\) has sample numbers. Iterate danaz.shard"):
        batches_of(loader, 1, 1, most=1)


def test_a_batch_size_that_leaves_ranks_without_a_sample() -> None:
    with pytest.raises(
        UnsupportedLoaderError, match=r"batch_size of 2 is shared by the 3 ranks .* raise it to 3 or more"
    ):
        batches_of(DataLoader(Numbers(), batch_size=2), 1, 3, most=1)


def test_part_outside_of_a_stream() -> None:
    assert stream_part() == (0, 1)
    loader = DataLoader(SplitsItself(), batch_size=None, num_workers=2)
    assert sorted(int(item) for item in loader) == list(range(24))


# ---- trained ---------------------------------------------------------------------------------------------------------


def train(
    session: Session,
    source: Iterable[Any],
    updates: int,
    most: int = 99,
    after: Callable[[int], object] = lambda step: None,
) -> list[list[float]]:
    """Train at most this number of steps, call ``after`` with the number of each, and return the batches."""
    model, optimizer = make_optimizer(session)
    seen = []
    for x in session.run_stream(source, updates, samples=2):
        x = x.float().reshape(-1, 1)
        optimizer.zero_grad()
        mse_loss(model(x), x).backward()
        optimizer.step()
        seen.append(x.flatten().tolist())
        after(len(seen))
        if len(seen) == most:
            break
    return seen


@pytest.mark.parametrize("algorithm", ["dana", "baseline", "ssgd"])
def test_one_worker_equals_torch(algorithm: str) -> None:
    ours, theirs = make_net(), make_net()
    loader = DataLoader(Examples(10), batch_size=5)
    with alone(algorithm) as session:
        optimizer = adopt(session, ours, make_sgd(ours))
        stream = session.run_stream(loader, 6, samples=1)
        assert len(stream) == 6
        for x, y in stream:
            optimizer.zero_grad()
            mse_loss(ours(x), y).backward()
            optimizer.step()
        assert session.finished
    sgd = make_sgd(theirs)
    for _ in range(3):
        for x, y in loader:
            sgd.zero_grad()
            mse_loss(theirs(x), y).backward()
            sgd.step()
    for p in theirs.parameters():  # from torch's variable, which looks ahead, to θ
        if "momentum_buffer" in sgd.state[p]:
            p.data.add_(sgd.state[p]["momentum_buffer"], alpha=0.1 * 0.9)
    assert_same(ours, theirs)


def test_all_ranks_of_ssgd_read_each_item_once() -> None:
    seen: list[list[float]] = []
    run_world("ssgd", 2, 2, lambda session, number: seen.extend(train(session, DataLoader(Shuffled(), 4), 3)))
    assert sorted(item for batch in seen for item in batch) == list(range(24))


def test_workers_read_what_others_do_not() -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=2))
    seen: dict[int, list[list[float]]] = {0: [], 1: []}
    for number in range(2):
        cluster.worker(number, lambda session, n: seen[n].extend(train(session, DataLoader(Numbers(1000), 4), 20)), 2)
    cluster.run()
    assert len(cluster.updates) == 20
    assert {update.samples for update in cluster.updates} == {4}
    items = [item for batches in seen.values() for batch in batches for item in batch]
    assert len(items) == len(set(items)) == 80
    assert {item % 2 for batch in seen[1] for item in batch} == {1}


def test_a_worker_that_comes_back_passes_over_what_each_has_read() -> None:
    cluster = ScriptCluster(ServerSettings("dana", workers=2))
    half_done, is_back = threading.Event(), threading.Event()

    def steady(session: Session, number: int) -> None:
        def wait(step: int) -> None:
            if step == 4:
                half_done.set()
                assert is_back.wait(PATIENCE_S)

        train(session, DataLoader(Numbers(1000), 4), 16, after=wait)

    def mortal(session: Session, number: int) -> None:
        first = train(session, DataLoader(Numbers(1000), 4), 16, most=4)
        assert half_done.wait(PATIENCE_S)
        again = Session(session.settings, RankInfo(worker=number, server=cluster.address, incarnation=2))
        atexit.unregister(again.close)
        second = train(again, DataLoader(Numbers(1000), 4), 16, after=lambda _: is_back.set())
        again.close()
        items = [item for batch in [*first, *second] for item in batch]
        assert items == [1 + 2 * number for number in range(len(items))]

    cluster.worker(0, steady)
    cluster.worker(1, mortal)
    cluster.run()
    assert len(cluster.updates) == 16


def test_an_iterator_that_ends_ends_the_run(servers: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with alone() as session:
        seen = train(session, iter([torch.ones(2)] * 5), 9)
        assert session.finished
        [server] = servers
        summary = server.summary()
    assert (len(seen), summary["updates"]) == (5, 5)
    assert summary["stopped"] == "the stream of worker 0 came to its end"


def test_an_iterator_that_ends_on_one_rank_ends_the_run_for_all() -> None:
    seen: list[list[float]] = []
    run_world("ssgd", 1, 2, lambda session, _: seen.extend(train(session, iter([torch.ones(2)] * 5), 9)))
    assert len(seen) in (4, 5), "two each, and a third batch of rank 0 that rank 1 has no partner for"


class From(Numbers):
    def __iter__(self) -> Iterator[int]:
        return iter(range(self.size, 99))


def test_ranks_that_read_different_streams_are_told() -> None:
    with pytest.raises(OrderError, match="were given different batches in epoch 0"):
        run_world("ssgd", 1, 2, lambda session, _: train(session, DataLoader(From(session.group.rank), 2), 5) and None)


def test_a_worker_that_joins_a_running_job_has_no_part() -> None:
    session = Session(Settings("baseline", workers=1), RankInfo(worker=1))
    with pytest.raises(UnsupportedLoaderError, match="divided among the 1 workers that the run began with"):
        train(session, DataLoader(Numbers(), 2), 4)
    session.close()


@pytest.mark.parametrize("updates", [0, -1, 2.0, None])
def test_a_number_of_updates_that_is_none(updates: Any) -> None:
    with alone() as session, pytest.raises(ValueError, match=r"danaz\.stream takes the number of steps"):
        session.run_stream(DataLoader(Numbers()), updates, samples=1)


def test_a_run_has_one_loop() -> None:
    with alone() as session:
        session.run_stream(DataLoader(Numbers()), 3, samples=1)
        with pytest.raises(LoopError, match="one loop over its"):
            session.run_epochs(3)
