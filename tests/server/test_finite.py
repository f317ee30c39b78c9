"""Huge but finite numbers ruin no run: every update leaves finite values, and no worker alone ends the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from axis import AXIS, under
from chunked import SIZE as LONG
from cluster import Cluster
from stimuli import GRADIENT, NAN, SIZE, arithmetic_of, parameters, push_on, started
from torch import Tensor

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import Leave, Parameters
from danaz.protocol.refusals import OVERFLOW
from danaz.rules import ALGORITHMS
from danaz.rules.asgd import Asgd
from danaz.rules.base import Context, Vectors
from danaz.server.core import ServerCore
from danaz.server.records import DIVERGED_LOSS_RATIO, RunTotals

HUGE = 3e38
SERVED = [name for name, each in ALGORITHMS.items() if each.rule().live]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine, the threads of a small computation wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def vectors_of(core: ServerCore) -> list[Tensor]:
    members = [vector for member in core.members.values() for vector in member.vectors.values()]
    return [core.master.params, *core.master.shared.values(), *members]


def views(core: ServerCore) -> list[Tensor]:
    return [torch.cat([*core.master.take_view(member, keep=False)]) for member in core.members.values()]


@pytest.mark.parametrize("lr", [0.1, 1.0, 1e30])
@pytest.mark.parametrize(
    ("algorithm", "size"), [*((each, SIZE) for each in SERVED), ("dana", LONG), ("dana-zero", LONG), ("dana-ga", LONG)]
)
def test_pushes_near_the_end_of_float32_leave_everything_finite(algorithm, size, lr):
    check_that_all_stays_finite(algorithm, size, lr, SGD)


@pytest.mark.parametrize("lr", [0.1, 1e30])
@pytest.mark.parametrize("name", ["adamw", "nadam", "rmsprop", "adagrad"])
@pytest.mark.parametrize("algorithm", ["nag-asgd", "dana-zero", "dana", "asgd", "ssgd", "dana-ga", "bmuf"])
def test_so_they_do_with_other_optimizers(algorithm, name, lr):
    """The square of such a gradient is infinite. In a state, it would make a step of 0 of every later gradient."""
    if not ALGORITHMS[algorithm].refusal(AXIS[name]):
        check_that_all_stays_finite(algorithm, SIZE, lr, AXIS[name])


def check_that_all_stays_finite(algorithm: str, size: int, lr: float, optimizers: Optimizers) -> None:
    """Let one worker of two push the same again and again, whether it is applied or refused."""
    cluster = Cluster(algorithm, 2, torch.ones(size), optimizers=optimizers)
    refused = []
    for turn in range(6):
        for worker in (0, 1):
            if worker not in cluster.views or not cluster.leases(worker):
                continue
            huge = worker == 1
            grad = torch.full((size,), HUGE * (-1) ** (turn // 3) if huge else 1.0)
            reply = cluster.push(worker, [grad] * cluster.sync_period, lr if huge else 0.1)
            refused += [reply.refused] if isinstance(reply, Parameters) else []
        states = [vector for core in cluster.workers.values() for vector in core.vectors.values()]
        vectors = [*vectors_of(cluster.server), *views(cluster.server), *states]
        assert all(vector.isfinite().all() for vector in vectors), f"turn {turn}"
    assert len(refused) > 2


def test_two_pushes_of_which_each_is_fine():
    core, view = started("dana", workers=2)
    view = parameters(core.handle(0, push_on(view, grad=torch.full((SIZE,), 1.3e36)), 1.0))
    assert view.applied
    before = arithmetic_of(core)
    view = parameters(core.handle(0, push_on(view, request=3, grad=torch.full((SIZE,), 3.4e38)), 1.0))
    assert (view.applied, view.refused) == (False, OVERFLOW)
    assert arithmetic_of(core) == before
    assert core.leases.completed == 2, "the batch counts as used: computed again, it would be as large"
    assert core.summary()["sick_workers"]["0"]["not_finite"] == 1


@under(
    {
        **dict.fromkeys(("asgd", "sa", "dc-asgd"), "sgd"),
        **dict.fromkeys(("nag-asgd", "multi-asgd", "dana-zero", "dana-ga"), "sgd adamw"),
    }
)
def test_what_is_refused_is_taken_back_to_the_bit(algorithm, optimizers):
    """This holds also if only the last slice overflows, after all others were written."""
    generator = torch.Generator().manual_seed(5)
    cluster = Cluster(algorithm, 2, torch.randn(LONG, generator=generator), optimizers=optimizers)
    for turn in range(4):
        cluster.push(turn % 2, torch.randn(LONG, generator=generator), 0.1)
    master = cluster.server.master
    before = [vector.clone() for vector in vectors_of(cluster.server)]
    counts = [master.shared_counts, *(member.counts for member in cluster.server.members.values())]
    figures = (master.version, master.max_lr)
    grad = torch.randn(LONG, generator=generator)
    grad[-1] = HUGE
    reply = cluster.push(0, grad, 10.0)
    assert isinstance(reply, Parameters)
    assert reply.refused == OVERFLOW
    assert all(torch.equal(one, other) for one, other in zip(vectors_of(cluster.server), before, strict=True))
    assert (master.version, master.max_lr) == figures
    assert [master.shared_counts, *(member.counts for member in cluster.server.members.values())] == counts


@under({"asgd": "sgd", "dana": "sgd", "dana-zero": "sgd adamw", "dana-ga": "adamw", "nag-asgd": "nadam"})
def test_an_update_on_trial_is_the_same_to_the_bit(algorithm, optimizers):
    """A worker with large numbers changes how updates are made, but not their results."""
    ends = []
    for tame in (1e9, 0.0):
        generator = torch.Generator().manual_seed(6)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("danaz.server.master.TAME", tame)
            cluster = Cluster(algorithm, 2, torch.ones(LONG), optimizers=optimizers)
            for turn in range(6):
                cluster.push(turn % 2, torch.randn(LONG, generator=generator), 0.1)
            ends.append([*vectors_of(cluster.server), *views(cluster.server)])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_in_a_round_the_others_make_the_update():
    cluster = Cluster("model-averaging", 3, torch.ones(SIZE))
    steps = cluster.sync_period
    for worker in (0, 1):
        assert cluster.push(worker, [GRADIENT] * steps, 0.1) is None
    cluster.push(2, [torch.full((SIZE,), HUGE / 1e3)] * steps, 1.0)
    replies = [cluster.replies[worker] for worker in (0, 1, 2)]
    applied = [isinstance(reply, Parameters) and reply.applied for reply in replies]
    assert applied == [True, True, False]
    assert cluster.server.master.version == 1
    assert cluster.updates[0].round is not None
    assert [worker for worker, _ in cluster.updates[0].round] == [0, 1]


def test_what_is_given_back_leaves_the_parameters_finite():
    core, _ = started("dana", workers=3)
    for worker in (0, 1):
        core.handle(worker, Leave(worker, 1, 2, torch.full((SIZE,), HUGE), torch.zeros(2)), 1.0)
    assert torch.equal(core.master.params, torch.ones(SIZE))
    assert core.totals.refusals == {
        "parameters would leave the range of float32 with what a leaving worker gives back": 2
    }


class Reckless(Asgd):
    """A rule that writes NaN, whatever it is given."""

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        params.mul_(NAN)


def test_a_rule_of_ones_own_that_leaves_nan_ends_the_run():
    core, view = started("test_finite:Reckless")
    parameters(core.handle(0, push_on(view), 1.0))
    assert not core.master.is_finite
    assert core.diverged == ""
    view = parameters(core.handle(0, push_on(view, request=3, view_version=1, batch=1), 1.0))
    assert not view.applied
    assert view.done
    assert "not finite" in core.diverged


# ---- divergence ------------------------------------------------------------------------------------------------------


def judged(first: list[float], latest: list[float]) -> bool:
    figures = RunTotals()
    for losses in (first, latest):
        for worker, loss in enumerate(losses):
            figures.hear_loss(worker, loss)
    return bool(figures.divergence(range(len(first))))


@pytest.mark.parametrize(
    ("first", "latest", "diverged"),
    [
        ([2.3], [2.4e3], True),
        ([2.3], [2.2e3], False),
        ([2.3, 2.3], [1e300, 0.5], False),  # one of two
        ([1e-300, 2.3], [0.5, 0.5], False),
        ([2.3, 2.3, 2.3], [1e300, 0.5, 0.4], False),
        ([1e-300, 2.3, 2.2], [0.5, 0.5, 0.5], False),
        ([2.3, 2.3], [3e3, 3e3], True),
        ([2.3, 2.3, 2.2], [3e3, 3e3, 0.5], True),
        ([0.0, 0.0], [1e6, 1e6], False),  # no measure
        ([0.0, 2.3], [1e6, 3e3], True),
        ([-2.3], [3e3], True),
    ],
)
def test_divergence_is_judged_over_workers(first, latest, diverged):
    assert judged(first, latest) == diverged


@pytest.mark.parametrize("loss", [1e300, 1e-300])
@pytest.mark.parametrize("when", ["first", "later"])
def test_one_loss_ends_no_run(loss, when):
    cluster = Cluster("dana", 2, torch.ones(SIZE))
    losses = [loss, 0.5] if when == "first" else [0.5, loss]
    for each in losses:
        cluster.push(0, GRADIENT, 0.01, loss=each)
        cluster.push(1, GRADIENT, 0.01, loss=0.5)
    assert cluster.server.diverged == ""
    cluster.lose(0)
    cluster.push(1, GRADIENT, 0.01, loss=0.4)
    assert cluster.server.diverged == ""


def test_the_losses_of_those_who_are_gone_do_not_count():
    cluster = Cluster("dana", 3, torch.ones(SIZE))
    for worker in (0, 1, 2):
        cluster.push(worker, GRADIENT, 0.01, loss=2.0)
    cluster.lose(1, 2)
    cluster.push(0, GRADIENT, 0.01, loss=2.1 * DIVERGED_LOSS_RATIO)
    assert cluster.server.diverged == "the loss rose to 2100, over 1000 times the first"
