"""Several servers, each with a slice of the vector, and workers that exchange with them while they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from axis import under
from line import PLAN, Line, make_worker, train
from live import launch
from sharded import LAYOUT, compressor_of, gradients, linked, make_cores, say
from torch import Tensor

from danaz.optimizers import Optimizers
from danaz.protocol.messages import Pull, Push
from danaz.server.records import Update
from danaz.torch.alone import LocalLink
from danaz.worker.core import Request, Step


def computed_on(
    algorithm: str, optimizers: Optimizers, shards: int, wire: str
) -> tuple[list[Tensor], Tensor, list[Update]]:
    """Let two workers take unequal turns. Return what each gradient is computed on, the final model and the journal."""
    cores, points, journal, grads = make_cores(algorithm, shards), [], [], gradients()
    cores[0].on_update = journal.append
    one, other = (linked(cores, worker, compressor_of(wire, 2), 2, optimizers) for worker in range(2))
    with one as first, other as second:
        for core, link, _ in (first, second):
            say(core, link, core.join(next(grads)))
        fetched = [say(core, link, core.pull(ahead=True)) for core, link, _ in (first, second)]
        for number in range(11):
            core, link, _ = (second, first)[min(number % 3, 1)]
            batch = fetched[core.role.worker].leases[0]
            params = torch.empty(LAYOUT.size)
            core.compute_on(params)
            say(core, link, core.push(Step(batch, (0.1, 0.2, 0.05), 4, 1.0), next(grads), params, wants_view=False))
            points.append(torch.empty(LAYOUT.size))
            core.compute_on(points[-1])
            fetched[core.role.worker] = say(core, link, core.pull(ahead=True))
        return points, torch.cat([each.master.params for each in cores]), journal


@under({"asgd": "sgd adamw", "dana": "sgd adamw", "dana-zero": "sgd adamw", "dana-ga": "adamw"})
@pytest.mark.parametrize("wire", ["fp32", "onebit"])
def test_slices_hold_the_same_bits_as_the_whole(algorithm: str, optimizers: Optimizers, wire: str) -> None:
    points, params, journal = computed_on(algorithm, optimizers, 2, wire)
    whole_points, whole_params, whole_journal = computed_on(algorithm, optimizers, 1, wire)
    assert all(torch.equal(point, other) for point, other in zip(points, whole_points, strict=True))
    assert torch.equal(params, whole_params)
    lags = [update.lag for update in journal]
    assert lags == [update.lag for update in whole_journal]
    assert max(lags) > 1
    for worker in (0, 1):
        known, expected = ([u.gap for u in each if u.worker == worker] for each in (journal, whole_journal))
        assert known[1:] == pytest.approx(expected[:-1], rel=1e-6), "each answer brings the gap of the push before"


def answer_is_lost(line: Line, request: Request) -> None:
    LocalLink.exchange(line, request)


def answer_is_lost_and_the_worker_given_up(line: Line, push: Request) -> None:
    answer_is_lost(line, push)
    line.gives_up()


FAULTS: dict[str, tuple[type[Request], Callable[[Line, Request], object]]] = {
    "none": (Push, lambda line, push: None),
    "given up before the push": (Push, lambda line, push: line.gives_up()),
    "given up before the fetch": (Pull, lambda line, pull: line.gives_up()),
    "an answer lost, and given up": (Push, answer_is_lost_and_the_worker_given_up),
    "an answer lost": (Push, answer_is_lost),
    "a view lost": (Pull, answer_is_lost),
}


@under({"dana": "sgd adamw", "dana-zero": "adamw"})
@pytest.mark.parametrize("where", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_goes_on_to_its_end(algorithm: str, optimizers: Optimizers, where: tuple[int, ...], fault: str) -> None:
    lines = [Line(algorithm, shard, shards=2) for shard in (0, 1)]
    kind, happens = FAULTS[fault]
    seen: list[list[Request]] = [[], []]

    def before_exchange(shard: int, request: Request) -> None:
        seen[shard].extend([request] * isinstance(request, kind))
        if isinstance(request, kind) and len(seen[shard]) in (5, 17, 18):
            happens(lines[shard], request)

    for shard in where:
        lines[shard].before_exchange = lambda request, shard=shard: before_exchange(shard, request)
    worker = make_worker(*lines, size=64, optimizers=optimizers)
    train(worker)
    assert all(len(seen[shard]) > 18 for shard in where)
    assert [update.version for update in lines[0].updates] == list(range(1, PLAN.batches + 1))
    assert sorted(update.batch for update in lines[0].updates) == list(range(PLAN.batches))
    assert all(line.core.finished for line in lines)
    assert torch.equal(worker.flat.params, torch.cat([line.core.master.params for line in lines]))
    assert torch.allclose(worker.flat.params, torch.ones(64), atol=0.35), "it has trained: it began within ±1 / √3"


@pytest.mark.slow
def test_digits(tmp_path: Path) -> None:
    live = ("--hosts", "localhost:2", "--workers-per-host", "2", "--collective", "torch")
    run = launch("configs/digits.yaml", *live, "--server-shards", "2", "--pipeline", out=tmp_path / "run")
    assert run.summary["complete"]
    assert run.summary["test_error_percent"] < 5
    assert [update["version"] for update in run.updates] == list(range(1, 901))
    assert run.summary["mean_lag"] > 1.5
    assert run.summary["mean_gap"] > 0
