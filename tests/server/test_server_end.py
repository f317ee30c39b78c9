"""How a run ends, with time as a number: what leaving workers bring, whom the server waits for, and what is final."""

from __future__ import annotations

import pytest
import torch
from axis import of
from cluster import Cluster
from stimuli import GRADIENT, INF, NAN, SIZE, answer, arithmetic_of, make_core, started

from danaz.optimizers import SGD, Optimizers
from danaz.protocol.messages import (
    MAX_REASON,
    MAX_REPORTED,
    Bye,
    Final,
    Inquire,
    Leave,
    Noted,
    Parameters,
    Plan,
    Progress,
    Pull,
    Push,
    Refusal,
)
from danaz.server.core import ServerCore
from danaz.vectors.cutting import announced


def run_out(algorithm: str, workers: int = 3, optimizers: Optimizers = SGD) -> Cluster:
    """Train until every batch is done."""
    generator = torch.Generator().manual_seed(3)
    cluster = Cluster(algorithm, workers, torch.ones(SIZE), plan=Plan(5, 2), buffers=2, optimizers=optimizers)
    while not cluster.server.leases.done:
        for worker in range(workers):
            if worker in cluster.views and cluster.leases(worker):
                cluster.push(worker, torch.randn(SIZE, generator=generator), 0.1)
            elif worker in cluster.views:
                cluster.pull(worker)
    return cluster


def test_each_batch_once_and_versions_without_holes():
    cluster = run_out("asgd")
    assert sorted(update.batch for update in cluster.updates) == list(range(10))
    assert [update.version for update in cluster.updates] == list(range(1, 11))
    assert cluster.server.leases.epoch == 2.0


def test_all_leave_with_the_mean_of_the_buffers_by_updates():
    cluster = run_out("asgd")
    assert [cluster.server.members[worker].updates for worker in range(3)] == [4, 3, 3]
    for worker in range(3):
        assert cluster.leave(worker, torch.tensor([float(worker), 6.0])) is None or worker == 2
    for final in cluster.final.values():
        assert final.buffers.tolist() == pytest.approx([0.9, 6.0])
        assert torch.equal(final.params, cluster.server.master.params)
        assert (final.version, final.diverged) == (10, False)
    assert cluster.final.keys() == {0, 1, 2}


def test_who_left_before_the_end_does_not_count_in_the_buffers():
    """A worker that left after a quarter of the run has statistics of an old model."""
    cluster = Cluster("dana", 2, torch.ones(SIZE), plan=Plan(8, 1), buffers=2)
    for worker in (0, 1):
        cluster.push(worker, GRADIENT, 0.1)
    cluster.leave(1, torch.tensor([100.0, 100.0]))
    while not cluster.server.leases.done:
        cluster.push(0, GRADIENT, 0.1)
    cluster.leave(0, torch.tensor([1.0, 2.0]))
    assert cluster.final[0].buffers.tolist() == [1.0, 2.0]


def test_if_nobody_is_there_at_the_end_the_last_that_left_counts():
    """Its statistics are old, but better than zeros."""
    cluster = Cluster("dana", 3, torch.ones(SIZE), buffers=2)
    for worker in (0, 1, 2):
        cluster.push(worker, GRADIENT, 0.1)
    cluster.leave(1, torch.tensor([5.0, 6.0]))
    cluster.leave(2, torch.tensor([7.0, 8.0]))
    cluster.lose(0)
    assert cluster.server.mean_buffers().tolist() == [7.0, 8.0]


@of("sgd adamw")
def test_nothing_is_kept_of_who_left(optimizers):
    """A checkpoint holds the vectors of the workers that take part, however many come and go."""
    sizes = []
    for guests in (1, 100):
        cluster = Cluster("dana-zero", 1, torch.ones(SIZE), buffers=2, optimizers=optimizers)
        for guest in range(1, 1 + guests):
            cluster.join(guest)
            cluster.push(guest, GRADIENT, 0.1)
            cluster.leave(guest, torch.full((2,), float(guest)))
        sizes.append(sum(tensor.nbytes for tensor in cluster.server.snapshot().tensors.values()))
        assert all(
            not member.vectors and member.view is None for member in cluster.server.members.values() if member.left
        )
    assert sizes[0] == sizes[1]


def test_the_parameters_are_final_when_the_last_has_left():
    cluster = run_out("dana")
    assert cluster.leave(0) is None
    assert cluster.leave(1) is None
    cluster.leave(2)
    assert torch.equal(cluster.final[0].params, cluster.final[2].params)


@of("sgd adamw nadam rmsprop")
def test_dana_ends_at_dana_zeros_parameters(optimizers):
    ends = []
    for algorithm in ("dana", "dana-zero"):
        cluster = run_out(algorithm, optimizers=optimizers)
        for worker in range(3):
            cluster.leave(worker)
        ends.append(cluster.final[0].params)
    assert torch.allclose(*ends, atol=1e-6)


@of("sgd adamw")
def test_a_crashed_worker_forfeits_its_share(optimizers):
    """In that case the survivors' sum defines θ."""
    cluster = Cluster("dana", 2, torch.zeros(SIZE), plan=Plan(2, 1), optimizers=optimizers)
    for worker in (0, 1):
        cluster.push(worker, torch.full((SIZE,), 1.0 + worker), 0.1)
    cluster.lose(1)
    lookahead = cluster.server.master.params.clone()
    cluster.leave(0)
    # Of AdamW, a mean of gradients 0.1 · 1, and a denominator of 1.
    share = 0.9 * 0.1 * (1.0 if optimizers == SGD else 0.1 / (1 - 0.9**2))
    assert torch.allclose(cluster.final[0].params, lookahead + share)


def test_who_comes_back_after_the_end_changes_nothing():
    """The others have the trained model already."""
    cluster = Cluster("dana", 2, torch.zeros(SIZE), plan=Plan(2, 1), buffers=1)
    for worker in (0, 1):
        cluster.push(worker, torch.full((SIZE,), 1.0 + worker), 0.1)
    cluster.lose(1)
    cluster.leave(0, torch.tensor([5.0]))
    cluster.come_back(1)
    cluster.leave(1, torch.tensor([7.0]))
    assert torch.equal(cluster.final[0].params, cluster.final[1].params)
    assert torch.equal(cluster.final[0].params, cluster.server.master.params)
    assert cluster.final[1].buffers.tolist() == [5.0]


def test_a_repeated_leave_gives_back_once():
    cluster = Cluster("dana", 1, torch.ones(SIZE), plan=Plan(1, 1))
    cluster.push(0, GRADIENT, 0.1)
    leave = cluster.workers[0].leave(torch.zeros(0))
    first = answer(cluster.server.handle(0, leave, 1.0))
    again = answer(cluster.server.handle(0, leave, 2.0))
    assert isinstance(first, Final)
    assert isinstance(again, Final)
    assert torch.equal(first.params, again.params)


def test_giving_back_takes_no_version():
    cluster = run_out("dana")
    for worker in range(3):
        cluster.leave(worker)
    assert cluster.final[0].version == 10 == len(cluster.updates)


def test_the_dead_are_not_waited_for_at_the_end():
    cluster = run_out("asgd")
    cluster.leave(0)
    cluster.leave(1)
    assert not cluster.final
    cluster.lose(2)
    assert cluster.final.keys() == {0, 1}


def test_leaving_early_others_take_over():
    cluster = Cluster("dana", 2, torch.ones(SIZE), plan=Plan(4, 1))
    assert isinstance(cluster.leave(1), Final)
    while not cluster.server.leases.done:
        cluster.push(0, GRADIENT, 0.1)
    assert sorted(update.batch for update in cluster.updates) == [0, 1, 2, 3]


# ---- ended by a script ----------------------------------------------------------------------------------------------


def stop(cluster: Cluster, worker: int, reason: str = "converged") -> None:
    cluster.say(worker, cluster.workers[worker].leave(torch.zeros(0), stop=reason))


@pytest.mark.parametrize("algorithm", ["asgd", "dana", "ssgd", "easgd"])
def test_one_worker_ends_the_run_for_all(algorithm):
    """The batches that the others compute at that moment still count. Then they hear that none are left, and leave."""
    cluster = Cluster(algorithm, 3, torch.ones(SIZE), plan=Plan(100, 2), ahead=3)
    for worker in range(3):
        cluster.push(worker, GRADIENT, 0.1)
    updates = len(cluster.updates)
    stop(cluster, 1)
    assert not cluster.final
    for worker in (0, 2):
        cluster.push(worker, GRADIENT, 0.1)
    for worker in (0, 2):
        reply = cluster.replies[worker]
        assert isinstance(reply, Parameters)
        assert (reply.applied, reply.done, reply.leases) == (True, True, ())
    assert len(cluster.updates) > updates
    for worker in (0, 2):
        cluster.leave(worker)
    assert all(torch.equal(final.params, cluster.server.master.params) for final in cluster.final.values())
    for worker in range(3):
        cluster.bye(worker)
    assert cluster.server.finished
    summary = cluster.server.summary()
    assert (summary["complete"], summary["stopped"], summary["refusals"]) == (True, "converged", {})


def test_who_waits_for_batches_hears_that_the_run_was_ended():
    cluster = Cluster("dana", 2, torch.ones(SIZE), plan=Plan(1, 1))
    assert cluster.pull(1) is None
    stop(cluster, 0)
    reply = cluster.replies[1]
    assert isinstance(reply, Parameters)
    assert reply.done


def test_a_run_is_ended_once_and_not_after_its_end():
    cluster = Cluster("asgd", 2, torch.ones(SIZE), plan=Plan(10, 2))
    stop(cluster, 0, "first")
    stop(cluster, 1, "second")
    assert cluster.server.summary()["stopped"] == "first"
    complete = run_out("asgd")
    complete.say(0, complete.workers[0].leave(torch.zeros(2), stop="too late"))
    assert complete.server.summary()["stopped"] is None


def test_a_reason_is_cut():
    cluster = Cluster("asgd", 1, torch.ones(SIZE))
    stop(cluster, 0, "x" * 10_000)
    assert cluster.server.summary()["stopped"] == "x" * MAX_REASON


def test_a_restarted_server_knows_that_the_run_was_ended():
    cluster = Cluster("asgd", 2, torch.ones(SIZE), plan=Plan(10, 2))
    stop(cluster, 0)
    again = ServerCore(cluster.settings)
    again.restore(cluster.server.snapshot(), [], life=1, now=0.0)
    assert (again.state.stopped, again.leases.done) == ("converged", True)


def test_a_shard_that_leases_nothing_hears_of_the_end_by_the_leave():
    """The worker that ends the run tells every shard that no batches are left."""
    cluster = Cluster("asgd", 1, torch.ones(SIZE), plan=Plan(10, 2))
    leave = cluster.workers[0].leave(torch.zeros(0), stop="converged")
    assert leave.done


def test_a_run_that_all_have_left_was_not_trained_to_its_end():
    cluster = Cluster("asgd", 3, torch.ones(SIZE), plan=Plan(10, 2))
    for worker in (0, 1):
        cluster.leave(worker)
        assert cluster.server.summary()["stopped"] is None
    cluster.lose(2)
    assert cluster.server.summary()["stopped"] == "every worker left before the last batch"


# ---- latecomers -----------------------------------------------------------------------------------------------------


def test_anybody_may_ask_how_far_the_run_is():
    core = make_core("asgd")
    assert answer(core.handle(7, Inquire(7, 1, 5), 0.0), 7) == Progress(5, 0.0)
    cluster = Cluster("asgd", 1, torch.ones(SIZE), plan=Plan(2, 3))
    for _ in range(3):
        cluster.push(0, GRADIENT, 0.1)
    before = arithmetic_of(cluster.server)
    assert answer(cluster.server.handle(7, Inquire(7, 1, 5), 0.0), 7) == Progress(5, 1.5)
    assert arithmetic_of(cluster.server) == before
    assert 7 not in cluster.server.members


def test_a_worker_that_takes_part_may_ask_for_the_parameters_as_they_are() -> None:
    core = make_core("dana-zero")
    assert answer(core.handle(7, Inquire(7, 1, 5, wants_params=True), 0.0), 7) == Progress(5, 0.0, None)
    cluster = Cluster("dana-zero", 2, torch.ones(SIZE), plan=Plan(2, 3))
    cluster.push(0, GRADIENT, 0.1)
    cluster.lose(1)
    before = arithmetic_of(cluster.server)
    told = answer(cluster.server.handle(7, Inquire(0, 1, 5, wants_params=True), 0.0), 7)
    assert torch.equal(told.params, cluster.server.master.params)
    assert told.params.data_ptr() != cluster.server.master.params.data_ptr(), "it is sent later"
    for stranger in (Inquire(7, 1, 5, True), Inquire(0, 2, 5, True), Inquire(1, 1, 5, True)):
        assert answer(cluster.server.handle(7, stranger, 0.0), 7).params is None
    assert arithmetic_of(cluster.server) == before


def test_the_look_ahead_forgets_who_left():
    cluster = Cluster("dana-zero", 2, torch.zeros(SIZE))
    for worker in (0, 1):
        cluster.push(worker, torch.full((SIZE,), 1.0 + worker), 0.1)
    cluster.leave(1)
    cluster.pull(0)
    assert torch.allclose(cluster.views[0], cluster.server.master.params - 0.9 * 0.1 * 1.0)


def test_finished_when_all_said_goodbye():
    cluster = run_out("asgd")
    for worker in range(3):
        cluster.leave(worker)
    for worker in range(3):
        assert not cluster.server.finished
        assert isinstance(cluster.bye(worker), Noted)
    assert cluster.server.finished


@pytest.mark.parametrize("message", [Push(0, 1, 9, 10, (0.1,), 1, None, 0, GRADIENT), Pull(0, 1, 9)])
def test_who_left_gets_no_more_work(message):
    cluster = Cluster("asgd", 2, torch.ones(SIZE), plan=Plan(4, 1))
    cluster.leave(0)
    refusal = answer(cluster.server.handle(0, message, 1.0))
    assert isinstance(refusal, Refusal)
    assert "left" in refusal.reason
    assert not cluster.server.leases.holds(0, 0)


@pytest.mark.parametrize(
    ("given", "buffers", "reason"),
    [
        (torch.ones(SIZE + 1), torch.zeros(2), "wrong size"),
        (None, torch.zeros(3), "wrong size"),
    ],
)
def test_a_leave_of_the_wrong_size(given, buffers, reason):
    core, _ = started("dana")
    before = arithmetic_of(core)
    refusal = answer(core.handle(0, Leave(0, 1, 2, given, buffers), 1.0))
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
    assert arithmetic_of(core) == before


def test_a_share_that_is_not_finite_is_not_added():
    core, _ = started("dana")
    before = arithmetic_of(core)
    final = answer(core.handle(0, Leave(0, 1, 2, torch.tensor([NAN, 1.0, 1.0]), torch.zeros(2)), 1.0))
    assert isinstance(final, Final)
    assert arithmetic_of(core) == before


def test_what_a_script_reports_is_in_the_summary():
    cluster = run_out("asgd", workers=1)
    cluster.leave(0)
    figures = {"test_error_percent": 1.5, "note": "θ", "perplexity": INF}
    assert isinstance(cluster.say(0, cluster.workers[0].report(figures)), Noted)
    reported = cluster.server.summary()["reported"]
    assert reported == {"test_error_percent": 1.5, "note": "θ", "perplexity": None}, "JSON has no infinity"


def test_a_report_cannot_override_what_the_server_measured():
    cluster = run_out("asgd", workers=1)
    before = cluster.server.summary()
    cluster.leave(0)
    cluster.say(0, cluster.workers[0].report(dict.fromkeys(before, "none")))
    assert cluster.server.summary() == {**before, "reported": dict.fromkeys(before, "none")}


def test_a_run_has_a_bounded_number_of_reported_figures():
    cluster = run_out("asgd", workers=1)
    cluster.leave(0)
    whole = {str(n): 1.0 for n in range(MAX_REPORTED)}
    assert isinstance(cluster.say(0, cluster.workers[0].report(whole)), Noted)
    assert isinstance(cluster.say(0, cluster.workers[0].report({"0": 2.0})), Noted), "a new value takes no more room"
    refusal = cluster.say(0, cluster.workers[0].report({"one more": 3.0}))
    assert isinstance(refusal, Refusal)
    assert "at most 64" in refusal.reason
    assert cluster.server.summary()["reported"] == {**whole, "0": 2.0}


def test_reports_make_no_checkpoints():
    cluster = run_out("asgd", workers=1)
    cluster.leave(0)
    milestones, kept = [], []
    cluster.server.on_milestone = lambda core: milestones.append(core.master.version)
    cluster.server.on_report = lambda reported: kept.append(dict(reported))
    for number in range(300):
        cluster.say(0, cluster.workers[0].report({"accuracy": float(number)}))
    assert milestones == []
    assert kept == [{"accuracy": float(number)} for number in range(300)], "each is kept before it is acknowledged"


def test_a_worker_that_says_goodbye_without_leaving_takes_no_batches_with_it():
    cluster = Cluster("asgd", 2, torch.ones(SIZE), plan=Plan(4, 1))
    held = cluster.leases(1)
    assert isinstance(cluster.server.handle(1, Bye(1, 1, 9), 1.0)[0][1], Noted)
    while not cluster.server.leases.done:
        cluster.push(0, GRADIENT, 0.1)
    assert held[0] in [update.batch for update in cluster.updates]
    assert {update.worker for update in cluster.updates} == {0}


def test_only_a_shard_that_lacks_something_takes_the_end_of_the_model():
    core, _ = started("dana")
    refusal = answer(core.handle(0, Bye(0, 1, 2, rest=torch.zeros(5)), 1.0))
    assert isinstance(refusal, Refusal)
    assert "does not need" in refusal.reason
    assert core.full_model.rest is None
    assert not core.takes(Bye(0, 1, 3, rest=announced(1 << 34)))
