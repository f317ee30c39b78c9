"""Every rule leaves alone what torch leaves alone: parameters without a gradient, batches without a step, edits."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from axis import AXIS, under
from cluster import Cluster
from torch import Tensor

from danaz.optimizers import Adam, NAdam, Optimizers, RMSprop, Sgd
from danaz.protocol.messages import Parameters, Plan
from danaz.rules.base import ALGORITHMS
from danaz.vectors.codecs import Compressor, push_codec
from danaz.vectors.cutting import common_spans, parts, present, spans_within

HERE, GONE = 5, 3  # number of parameters with a gradient, and without one
ELEMENTWISE = sorted(name for name, each in ALGORITHMS.items() if not each.rule().per_layer and each.rule().live)
WITH_SERVER_STATE = ["nag-asgd", "multi-asgd", "dana-zero", "dana"]


def draw(step: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(step))


def start(algorithm: str, size: int, workers: int = 3, **options: object) -> Cluster:
    return Cluster(algorithm, workers, torch.arange(1.0, size + 1), **options)  # type: ignore[arg-type]


@under(
    {
        algorithm: " ".join(name for name in ("sgd", "adamw") if not ALGORITHMS[algorithm].refusal(AXIS[name]))
        for algorithm in ELEMENTWISE
    }
)
def test_parameters_without_a_gradient_stay_and_the_others_never_notice(algorithm: str, optimizers: Optimizers) -> None:
    """Make two clusters. In one, some parameters never have a gradient, whatever the workers push for them."""
    workers = 1 if ALGORITHMS[algorithm].rule().max_workers == 1 else 3
    whole, small = (start(algorithm, size, workers, optimizers=optimizers) for size in (HERE + GONE, HERE))
    untouched = whole.params[HERE:].clone()
    averages = ALGORITHMS[algorithm].rule().pushes == "parameters"  # a mean of equal numbers is rounded
    same = torch.allclose if averages else torch.equal
    for step, worker in zip(range(12), cycle(range(workers)), strict=False):
        grads = [draw(100 * step + part, HERE) for part in range(whole.sync_period)]
        garbage = torch.full((GONE,), 7.0)
        whole.push(
            worker, [torch.cat([grad, garbage]) for grad in grads], 0.1, absent=((HERE, HERE + GONE),), loss=None
        )
        small.push(worker, grads, 0.1, loss=None)
        for number in small.views:
            assert torch.equal(whole.views[number][:HERE], small.views[number]), step
            assert same(whole.views[number][HERE:], untouched), step
    for worker in range(workers):
        whole.leave(worker)
        small.leave(worker)
    assert torch.equal(whole.final[0].params[:HERE], small.final[0].params)
    assert same(whole.final[0].params[HERE:], untouched)


@under({**dict.fromkeys(WITH_SERVER_STATE, "sgd adamw nadam rmsprop"), "asgd": "adamw", "ssgd": "adamw"})
def test_a_parameter_that_is_used_now_and_then_moves_as_if_the_other_steps_had_not_been(
    algorithm: str, optimizers: Optimizers
) -> None:
    both, alone = (start(algorithm, size, workers=1, optimizers=optimizers) for size in (2, 1))
    for step in range(10):
        grad, is_used = draw(step, 2), step % 3 != 1
        both.push(0, grad, 0.1, absent=() if is_used else ((0, 1),))
        if is_used:
            alone.push(0, grad[:1], 0.1)
        assert torch.equal(both.views[0][:1], alone.views[0])


OPTIMIZERS = [Optimizers([each]) for each in (Sgd(0.9), Adam(0.9, 0.99), NAdam(), RMSprop(momentum=0.5))]
LOOKING_AHEAD = [*WITH_SERVER_STATE, "dana-nadam", "ssgd", "sa", "dana-ga", "dana-dc"]


@pytest.mark.parametrize(
    ("algorithm", "optimizers"),
    [
        pytest.param(name, each, id=f"{name} {each[0].name}")
        for name in LOOKING_AHEAD
        for each in OPTIMIZERS
        if not ALGORITHMS[name].refusal(each)
    ],
)
def test_a_layer_that_is_frozen_stays_where_it_is_while_the_rate_decays(algorithm: str, optimizers: Optimizers) -> None:
    """Its momentum waits for it, and does not lead elsewhere because the others' rate changes."""
    cluster = start(algorithm, HERE + GONE, workers=2, optimizers=optimizers)
    for step in range(4):
        cluster.push(step % 2, draw(step, HERE + GONE), 0.1)
    for worker in (0, 1):
        cluster.pull(worker)
    before = {worker: view[HERE:].clone() for worker, view in cluster.views.items()}
    for step in range(12):
        cluster.push(step % 2, draw(step, HERE + GONE), 0.1 * 0.7**step, absent=((HERE, HERE + GONE),))
        if step == 7:
            cluster.lose(1)
            cluster.come_back(1)  # sums of all workers' momentum are made anew
        for worker, view in cluster.views.items():
            torch.testing.assert_close(view[HERE:], before[worker], rtol=1e-5, atol=1e-6)


def test_a_codec_neither_moves_them_nor_forgets_what_it_keeps_for_them() -> None:
    compressor = Compressor(push_codec("onebit"), [(0, 8)])
    compressor.compress(draw(0, 8), epoch=0.0)
    compressor.settle(applied=True)
    kept = compressor.residual.clone()
    assert kept[5:].any()
    push = draw(1, 8)
    compressor.compress(push, 0.0, absent=((5, 8),))
    compressor.settle(applied=True)
    assert torch.equal(compressor.residual[5:], kept[5:])
    assert not torch.equal(compressor.residual[:5], kept[:5])
    assert not push[5:].any()


def test_spans_that_are_none_are_refused_and_nothing_changes() -> None:
    for absent in [((3, 2),), ((0, 2), (1, 3)), ((5, 9),), ((-1, 2),)]:
        cluster = start("asgd", 8, workers=1)
        before = cluster.views[0].clone()
        reply = cluster.push(0, torch.ones(8), 0.1, absent=absent)
        assert isinstance(reply, Parameters)
        assert "spans" in reply.refused
        assert torch.equal(cluster.views[0], before)


# ---- batches without a step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ELEMENTWISE)
def test_a_skipped_batch_counts_as_used_and_leaves_everything_as_it_is(algorithm: str) -> None:
    workers = 1 if ALGORITHMS[algorithm].rule().max_workers == 1 else 2
    cluster = start(algorithm, 4, workers, plan=Plan(6, 1))
    before = cluster.views[0].clone()
    skipped = cluster.leases(0)[0]
    cluster.skip(0)
    assert torch.equal(cluster.views[0], before)
    assert skipped not in cluster.leases(0)
    figures = cluster.server.summary()
    assert (figures["updates"], figures["skipped_batches"], figures["epochs"]) == (0, 1, pytest.approx(1 / 6))


def test_a_run_whose_last_batches_are_skipped_ends() -> None:
    cluster = start("dana", 4, workers=2, plan=Plan(4, 1))
    for worker in (0, 1, 0, 1):
        cluster.skip(worker)
    for worker in (0, 1):
        cluster.leave(worker)
    for worker in (0, 1):
        cluster.bye(worker)
    assert cluster.server.finished
    assert cluster.server.summary()["skipped_batches"] == 4


def test_a_copy_of_the_message_does_not_count_again() -> None:
    cluster = start("dana", 4, workers=1, plan=Plan(6, 1))
    pull = cluster.workers[0].pull(skipped=cluster.leases(0)[:1])
    for _ in range(3):
        cluster.server.handle(0, pull, cluster.now)
    assert cluster.server.summary()["skipped_batches"] == 1


# ---- edits ----------------------------------------------------------------------------------------------------------


def test_a_displacement_takes_an_edit_along() -> None:
    edited, plain = start("dana", 4, workers=2), start("dana", 4, workers=2)
    edit = torch.tensor([0.0, 1.0, 0.0, -2.0])
    edited.push(0, torch.ones(4), 0.1, edit=edit)
    plain.push(0, torch.ones(4), 0.1)
    assert torch.allclose(edited.views[0], plain.views[0] + edit)
    edited.push(1, torch.ones(4), 0.1)
    plain.push(1, torch.ones(4), 0.1)
    assert torch.allclose(edited.views[1], plain.views[1] + edit)


# ---- spans ----------------------------------------------------------------------------------------------------------


def test_spans() -> None:
    absent = ((2, 4), (6, 9))
    assert list(parts(0, 10, absent)) == [
        (0, 2, False),
        (2, 4, True),
        (4, 6, False),
        (6, 9, True),
        (9, 10, False),
    ]
    assert list(present(3, 8, absent)) == [(4, 6)]
    assert list(present(0, 3, ())) == [(0, 3)]
    assert spans_within(absent, 3, 7) == ((0, 1), (3, 4))
    assert common_spans([absent, ((3, 8),)]) == ((3, 4), (6, 8))
    assert common_spans([absent, ()]) == ()
