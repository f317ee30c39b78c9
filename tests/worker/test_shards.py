"""Several servers, each with a slice of the vector, do the same as one server."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from axis import under
from live import Run, Running, launch, read_updates, until
from safetensors.torch import load_file
from sharded import LAYOUT, PLAN, compressor_of, gradients, linked, make_cores, push_of, say
from torch import Tensor

from danaz.launch.options import RunOptions
from danaz.launch.prepare import LaunchError, check_shards
from danaz.optimizers import SGD, Adam, Optimizers
from danaz.protocol.messages import Bye, Final, Noted, Parameters, Push, Refusal, Reply
from danaz.protocol.wire import decode, split
from danaz.run.settings import Settings
from danaz.server.core import ServerCore
from danaz.server.records import Update
from danaz.vectors.codecs import Compressor
from danaz.vectors.cutting import shard_spans
from danaz.vectors.layout import Layout
from danaz.worker.core import Role, Step, WorkerCore
from danaz.workloads.digits import DigitsNet

ELEMENTWISE = ["asgd", "nag-asgd", "dana", "dana-zero", "dana-ga", "dana-dc", "dana-sa", "dana-nadam", "easgd"]


def train(
    algorithm: str,
    shards: int,
    gap_every: int = 1,
    compressors: Sequence[Compressor | None] = (None, None),
    optimizers: Optimizers = SGD,
) -> tuple[list[Tensor], Tensor, ServerCore, list[Update]]:
    """Let two workers take unequal turns. Return every view, the final model, shard 0 and its journal."""
    cores, views, journal = make_cores(algorithm, shards, gap_every=gap_every), [], []
    cores[0].on_update = journal.append
    one, other = (
        linked(cores, worker, compressor, optimizers=optimizers) for worker, compressor in enumerate(compressors)
    )
    with one as (first, first_link, _), other as (second, second_link, _):
        replies = {}
        grads = gradients()
        for core, link in ((first, first_link), (second, second_link)):
            replies[core.role.worker] = say(core, link, core.join(next(grads) if core is first else None))
        for number in range(11):
            core, link = (first, first_link) if number % 3 else (second, second_link)
            batch = replies[core.role.worker].leases[0]
            lr = (0.1, 0.2, 0.05 / (1 + number))
            params = replies[core.role.worker].view.clone()
            absent = ((30, 70),) if number % 4 == 2 else ()
            reply = say(core, link, core.push(Step(batch, lr, 4, 1.0, absent), next(grads), params))
            assert reply.applied
            replies[core.role.worker] = reply
            views.append(reply.view.clone())
        return views, torch.cat([each.master.params for each in cores]), cores[0], journal


@under(
    {
        **dict.fromkeys(ELEMENTWISE, "sgd adamw"),
        "dana-nadam": "sgd",
        "dana-zero": "sgd adamw nadam rmsprop",
        "dana": "sgd adamw nadam rmsprop",
    }
)
@pytest.mark.parametrize("shards", [2, 3])
def test_slices_hold_the_same_bits_as_the_whole(algorithm: str, optimizers: Optimizers, shards: int) -> None:
    """Each shard keeps the states of its slice, and their counts: a layer has no gradient now and then."""
    views, params, leader, _ = train(algorithm, shards, optimizers=optimizers)
    whole_views, whole_params, whole, _ = train(algorithm, 1, optimizers=optimizers)
    assert all(torch.equal(view, other) for view, other in zip(views, whole_views, strict=True))
    assert torch.equal(params, whole_params)
    assert leader.totals.updates == whole.totals.updates == 11
    assert leader.leases.completed == whole.leases.completed == 11


@pytest.mark.parametrize("algorithm", ["dana", "dana-zero", "nag-asgd"])
def test_each_slice_has_the_optimizers_of_its_groups(algorithm: str) -> None:
    """Of three groups, one has no momentum, one is empty, and one keeps a vector that the others lack."""
    groups = [Adam(0.0, 0.9, weight_decay=0.1), Adam(0.5, 0.9), Adam(0.9, 0.99, amsgrad=True)]
    views, params, *_ = train(algorithm, 3, optimizers=Optimizers(groups))
    whole_views, whole_params, *_ = train(algorithm, 1, optimizers=Optimizers(groups))
    assert all(torch.equal(view, other) for view, other in zip(views, whole_views, strict=True))
    assert torch.equal(params, whole_params)
    assert not torch.equal(params, train(algorithm, 1, optimizers=Optimizers(groups[:1]))[1])


@under({"dana": "sgd adamw", "dana-zero": "adamw"})
@pytest.mark.parametrize("wire", ["bf16", "onebit", "topk:0.1"])
@pytest.mark.parametrize("shards", [2, 3])
def test_slices_that_travel_encoded_hold_the_same_bits_as_the_whole(
    algorithm: str, optimizers: Optimizers, wire: str, shards: int
) -> None:
    """This includes error feedback, because the whole vector is compressed in the same chunks."""

    def compressed(servers: int) -> tuple[list[Tensor], ServerCore]:
        compressors = [compressor_of(wire, shards) for _ in range(2)]
        views, _, leader, _ = train(algorithm, servers, compressors=compressors, optimizers=optimizers)
        return views, leader

    (views, leader), (whole_views, whole) = compressed(shards), compressed(1)
    assert all(torch.equal(view, other) for view, other in zip(views, whole_views, strict=True))
    plain_views, _, plain, _ = train(algorithm, shards, optimizers=optimizers)
    assert not torch.equal(views[-1], plain_views[-1]), "the codec must lose something, or this tests nothing"
    assert leader.totals.push_bytes == whole.totals.push_bytes < plain.totals.push_bytes == 11 * 4 * LAYOUT.size
    assert leader.totals.view_bytes == whole.totals.view_bytes == 13 * 4 * LAYOUT.size


def test_each_shard_is_sent_only_its_own_chunks() -> None:
    cores = make_cores("dana", 3)
    with linked(cores, compressor=compressor_of("topk:0.1", 3)) as (core, link, links):
        joined = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        push = push_of(core, joined, next(gradients()))
        link.exchange(push)
        for each, (start, stop) in zip(links, shard_spans(LAYOUT.size, 3), strict=True):
            part = each.said[-1]
            assert isinstance(part, Push)
            assert part.encoded is not None
            sent = [bytes(frame) for frames in split(part) for frame in frames]
            assert torch.equal(decode(sent).push, push.push[start:stop])


def gaps_of(journal: Sequence[Update], worker: int) -> list[float | None]:
    return [update.gap for update in journal if update.worker == worker]


@pytest.mark.parametrize("algorithm", ELEMENTWISE)
@pytest.mark.parametrize("shards", [2, 3])
def test_the_gap_is_that_of_one_server_but_one_push_later(algorithm: str, shards: int) -> None:
    *_, leader, journal = train(algorithm, shards)
    *_, whole = train(algorithm, 1)
    for worker in (0, 1):
        known, expected = gaps_of(journal, worker), gaps_of(whole, worker)
        assert known[0] is None
        assert known[1:] == pytest.approx(expected[:-1], rel=1e-6)
    assert any(gap for gap in gaps_of(whole, 0))
    assert leader.totals.gaps_measured == 11 - 2


def test_the_gap_is_measured_as_often_as_asked_in_all_slices() -> None:
    *_, journal = train("asgd", 2, gap_every=3)
    *_, always = train("asgd", 2)
    measured = gaps_of(journal, 0)
    assert 1 < sum(gap is not None for gap in measured) < len(measured)
    assert all(gap in (None, each) for gap, each in zip(measured, gaps_of(always, 0), strict=True))
    *_, never = train("asgd", 2, gap_every=0)
    assert {update.gap for update in never} == {None}


def test_a_push_that_one_shard_has_lost_has_no_gap() -> None:
    cores, journal = make_cores("asgd", 2), []
    cores[0].on_update = journal.append
    with linked(cores) as (core, link, _):
        reply = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        for number in range(4):
            if number == 1:
                cores[1].tick(1000.0)  # shard 1 gives the worker up
            reply = say(core, link, push_of(core, reply))
    assert [update.gap is not None for update in journal] == [False, True, False, True]


def refused_by_shard_0(**brought: Any) -> str:
    """Return why shard 0 did not apply a push that says this about the other slices."""
    cores = make_cores("asgd", 2)
    with linked(cores) as (core, link, links):
        joined = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        links[0].alter = lambda push: replace(push, **brought)
        reply = say(core, link, push_of(core, joined))
        assert isinstance(reply, Parameters)
        assert cores[0].master.version == 0
        return reply.refused


@pytest.mark.parametrize("squares", [(1.0,), (1.0,) * 5, (1.0, 1.0, nan, 1.0), (1.0, inf, 1.0, 1.0), (-1.0,) * 4])
def test_squares_that_do_not_fit_the_model_are_refused(squares: tuple[float, ...]) -> None:
    """The model has four layers."""
    assert refused_by_shard_0(squares=squares) == "squares of the other slices do not fit the model"


def test_a_negative_number_of_bytes_is_refused() -> None:
    assert refused_by_shard_0(elsewhere=-1) == "the other slices took fewer bytes than none"


def test_spans_tile_the_vector() -> None:
    assert shard_spans(128, 3) == [(0, 32), (32, 80), (80, 128)]  # the cuts are within a, b and d
    assert shard_spans(25_500_000, 2) == [(0, 12_750_000), (12_750_000, 25_500_000)]
    with pytest.raises(ValueError, match="too small"):
        shard_spans(31, 3)


def test_a_table_is_cut_at_and_within_tensors() -> None:
    head, tail = LAYOUT.cut(0, 88), LAYOUT.cut(64, 128)
    assert [(e.name, e.shape) for e in head.parameters] == [("a", (40,)), ("b", (8, 6))]
    assert [(e.name, e.start, e.shape) for e in tail.parameters] == [("b", 0, (24,)), ("c", 24, ()), ("d", 25, (39,))]
    assert head.groups == ((0, 40), (40, 40), (40, 88))
    assert tail.groups == ((0, 0), (0, 0), (0, 64))
    assert Layout.from_lists(tail.to_lists()) == tail


def test_a_push_that_is_not_finite_in_one_slice_is_refused_by_all() -> None:
    cores = make_cores("dana", 2)
    with linked(cores) as (core, link, _):
        joined = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        grad = torch.ones(LAYOUT.size)
        grad[-1] = nan  # this element is in the slice of shard 1
        reply = say(core, link, push_of(core, joined, grad))
        assert reply.refused == "push is not finite"
        assert [each.master.version for each in cores] == [0, 0]
        assert not core.vectors["velocity"].any()


@pytest.mark.parametrize("refused", ["by shard 0", "by shard 1"])
@under({"dana": "sgd adamw nadam"})
def test_each_slice_goes_on_with_the_state_of_what_was_applied_to_it(
    algorithm: str, optimizers: Optimizers, refused: str
) -> None:
    """A push counts in the slices that applied it alone: each slice is as if it had been trained by itself."""
    cores, grads, (_, stop) = make_cores(algorithm, 2), gradients(), shard_spans(LAYOUT.size, 2)[0]
    alone = {name: make_cores(algorithm, 1) for name in ("heard", "missed")}
    first, made = next(grads), [next(grads) for _ in range(4)]
    with linked(cores, optimizers=optimizers) as (core, link, _):
        reply = say(core, link, core.join(first))
        for turn, grad in enumerate(made):
            if turn == 1 and refused == "by shard 0":
                cores[0].leases.give_up(0)  # the batch belongs to another worker by now
            elif turn == 1:
                cores[1].tick(1000.0)
            reply = say(core, link, push_of(core, reply, grad))
    ends = {}
    for name, server in alone.items():
        with linked(server, optimizers=optimizers) as (core, link, _):
            reply = say(core, link, core.join(first))
            for grad in made if name == "heard" else [made[0], *made[2:]]:
                reply = say(core, link, push_of(core, reply, grad))
        ends[name] = server[0].master.params
    missed, heard = (cores[0], cores[1]) if refused == "by shard 0" else (cores[1], cores[0])
    mine = slice(0, stop) if refused == "by shard 0" else slice(stop, None)
    others = slice(stop, None) if refused == "by shard 0" else slice(0, stop)
    assert torch.equal(missed.master.params, ends["missed"][mine])
    assert torch.equal(heard.master.params, ends["heard"][others])


def test_a_repeated_push_is_applied_once_by_each_shard() -> None:
    cores = make_cores("dana-zero", 2)
    with linked(cores) as (core, link, links):
        joined = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        first = say(core, link, push_of(core, joined))
        for each, said in zip(cores, links, strict=True):
            each.handle(0, said.said[-1], 0.0)
        assert [each.master.version for each in cores] == [1, 1]
        assert first.applied


def test_a_shard_that_gave_a_worker_up_takes_it_in_again() -> None:
    """The push is lost only in that shard's slice, and the worker's velocity agrees with every shard."""
    cores = make_cores("dana", 2)
    with linked(cores) as (core, link, _):
        joined = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        cores[1].tick(1000.0)
        reply = say(core, link, push_of(core, joined))
        assert reply.applied
        assert [each.master.version for each in cores] == [1, 0]
        (_, stop), _ = shard_spans(LAYOUT.size, 2)
        velocity = core.vectors["velocity"]
        assert velocity[:stop].all()
        assert not velocity[stop:].any()
        say(core, link, push_of(core, reply))
        assert [each.master.version for each in cores] == [2, 1]
        assert core.vectors["velocity"].all()


def test_a_slice_that_was_applied_counts_although_shard_0_refused_the_push() -> None:
    cores = make_cores("dana", 2)
    with linked(cores) as (core, link, _):
        joined = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        cores[0].leases.give_up(0)  # the batch belongs to another worker by now
        reply = say(core, link, push_of(core, joined))
        assert "not leased" in reply.refused
        (_, stop), _ = shard_spans(LAYOUT.size, 2)
        velocity = core.vectors["velocity"]
        assert not velocity[:stop].any()
        assert velocity[stop:].all()


def test_error_feedback_moves_on_slice_by_slice() -> None:
    """Shard 0 has refused the push, and the other shard has applied it."""
    cores = make_cores("dana", 2)
    compressor = compressor_of("onebit", 2)
    assert compressor is not None
    with linked(cores, compressor=compressor) as (core, link, _):
        joined = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        cores[0].leases.give_up(0)
        reply = say(core, link, push_of(core, joined, next(gradients())))
        assert "not leased" in reply.refused
        (_, stop), _ = shard_spans(LAYOUT.size, 2)
        assert not compressor.residual[:stop].any()
        assert compressor.residual[stop:].all()


def test_a_worker_that_shard_0_gave_up_joins_every_shard_again() -> None:
    cores = make_cores("dana", 2)
    with linked(cores) as (core, link, _):
        joined = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        cores[0].tick(1000.0)
        push = push_of(core, joined)
        refusal = say(core, link, push)
        assert isinstance(refusal, Refusal)
        assert refusal.rejoin
        again = say(core, link, core.join())
        assert isinstance(again, Parameters)
        (_, stop), _ = shard_spans(LAYOUT.size, 2)
        assert core.vectors["velocity"][stop:].all()  # shard 1 had applied it
        assert not core.vectors["velocity"][:stop].any()


def test_the_end_is_put_together_from_all_slices() -> None:
    cores = make_cores("dana", 2)
    with linked(cores) as (core, link, links):
        reply = say(core, link, core.join(torch.zeros(LAYOUT.size)))
        while not reply.done:
            reply = say(core, link, push_of(core, reply))
        given_back = core.given_back()
        before = torch.cat([each.master.params for each in cores])
        final = say(core, link, core.leave(torch.tensor([1.0, 2.0, 3.0])))
        assert isinstance(final, Final)
        assert given_back is not None
        assert torch.equal(final.params, before + given_back)
        assert final.buffers.tolist() == [1.0, 2.0, 3.0]
        assert isinstance(say(core, link, core.bye()), Noted)
        assert all(each.finished for each in cores)
        whole = cores[0].full_model.params(cores[0].master.params)
        assert whole is not None
        assert torch.equal(whole, final.params)
        assert cores[0].full_model.layout == LAYOUT
        assert isinstance(links[1].said[-1], Bye)


def test_a_shard_sends_the_final_model_when_every_worker_has_left() -> None:
    """A shard leases no batches. Each worker that leaves tells it that none are left."""
    cores = make_cores("dana", 2, workers=2)
    settled: dict[int, Reply] = {}
    roles = [WorkerCore(Role(n, 1, "", SGD, LAYOUT, PLAN), cores[0].settings.rule().worker_rule) for n in (0, 1)]
    for core in roles:
        join = replace(core.join(torch.zeros(64)), params=torch.zeros(64) if core is roles[0] else None)
        settled.update({int(to): reply for to, reply in cores[1].handle(core.role.worker, join, 0.0)})
    for core in roles:
        core.receive(settled[core.role.worker])
        core.done = True
    give_back = torch.ones(64)
    leaves = [replace(core.leave(torch.empty(0)), give_back=give_back) for core in roles]
    assert cores[1].handle(0, leaves[0], 0.0) == []
    finals = cores[1].handle(1, leaves[1], 0.0)
    assert [to for to, _ in finals] == [0, 1]
    for _, final in finals:
        assert isinstance(final, Final)
        assert torch.equal(final.params, 2 * give_back)


@pytest.mark.parametrize(
    ("settings", "options", "reason"),
    [
        ({"algorithm": "ssgd"}, {}, "has no server"),
        ({"algorithm": "ssgd-lars"}, {}, "has no server"),
        ({}, {"record": True}, "--record"),
        ({}, {"refuse_outliers": True}, "--refuse-outliers"),
        ({}, {"invite": 1}, "--invite"),
    ],
)
def test_a_run_that_cannot_be_sharded_is_refused(
    settings: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    values = {"algorithm": "dana", **settings}
    with pytest.raises(LaunchError, match=reason):
        check_shards(Settings(**values), RunOptions(server_shards=2, **options))
    check_shards(Settings(**values), RunOptions(**options))


LIVE = ("--hosts", "localhost:2", "--workers-per-host", "2", "--collective", "torch", "--server-shards", "2")
SHARDED = ("configs/digits.yaml", *LIVE)
PARAMETERS = sum(p.numel() for p in DigitsNet().parameters())


def check_digits(run: Run, updates: int) -> None:
    assert run.summary["complete"]
    assert [update["version"] for update in run.updates] == list(range(1, updates + 1))
    assert sum(update["gap"] is None for update in run.updates) == 2, "the first update of each worker has none"
    assert run.summary["mean_gap"] > 0
    tensors = load_file(run.folder / "parameters.safetensors")
    expected = {name: t.shape for name, t in DigitsNet().state_dict().items() if t.is_floating_point()}
    assert {name: t.shape for name, t in tensors.items()} == expected
    assert all(t.isfinite().all() for t in tensors.values())
    assert (tensors["10.weight"] != 0).all()


def check_lossy_digits(run: Run, updates: int) -> None:
    check_digits(run, updates)
    assert 4 * PARAMETERS / 29 < run.summary["push_bytes_per_update"] < 4 * PARAMETERS / 27
    assert 2 * PARAMETERS <= run.summary["view_bytes_per_update"] < 2.1 * PARAMETERS


def test_digits_with_two_shards_lossy_codecs_and_adamw(tmp_path: Path) -> None:
    adamw = [f"--set={each}" for each in ("optimizer=adamw", "lr=0.003", "epochs=4", "lr_schedule.milestones=[3]")]
    run = launch(*SHARDED, *adamw, "--wire", "onebit", "--wire-view", "bf16", out=tmp_path / "run")
    check_lossy_digits(run, updates=180)
    assert run.summary["test_error_percent"] < 20


@pytest.mark.slow
@pytest.mark.parametrize("wire", [(), ("--wire", "onebit", "--wire-view", "bf16")], ids=["plain", "lossy"])
def test_digits_with_two_shards(wire: tuple[str, ...], tmp_path: Path) -> None:
    run = launch(*SHARDED, *wire, out=tmp_path / "run")
    assert run.summary["test_error_percent"] < 5
    if wire:
        check_lossy_digits(run, updates=900)
    else:
        check_digits(run, updates=900)
        assert run.summary["push_bytes_per_update"] == 4 * PARAMETERS


@pytest.mark.slow  # test_launcher_run.py shows that a service that fails ends the run
@pytest.mark.parametrize("name", ["server", "server.1"])
def test_the_death_of_a_shard_ends_a_run_that_is_to_stop(tmp_path: Path, name: str) -> None:
    run = Running(tmp_path / "run", *SHARDED, "--set", "epochs=2000", "--on-worker-failure", "stop")
    try:
        until(lambda: run.trains, "training begins")
        for pid in run.processes:
            words = Path("/proc", str(pid), "cmdline").read_bytes().decode().split("\0")
            if "serve" in words and ("--shard" in words) == (name == "server.1"):
                os.kill(pid, signal.SIGKILL)
        output, _ = run.launcher.communicate(timeout=100)
        assert run.launcher.returncode != 0
        assert f"{name} on localhost" in output
        assert "killed" in output.lower()
        until(lambda: not run.processes, "everything has ended")
    finally:
        run.end()


ENDLESS = """
import sys, time, torch, danaz.torch as danaz
from pathlib import Path
danaz.init()
model = torch.nn.Linear(32, 4)
optimizer = danaz.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=0.001), model)
data = torch.utils.data.TensorDataset(torch.randn(64, 32), torch.randn(64, 4))
for epoch in danaz.epochs(100_000):
    for x, y in danaz.shard(torch.utils.data.DataLoader(data, batch_size=8), epoch):
        time.sleep(0.005)  # as long as a larger model computes
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if Path(sys.argv[1]).exists():
            danaz.stop("enough")
"""
AT_WORK = 20  # at least as many batches as both workers hold when the run is stopped


@pytest.mark.timeout(300)  # on a busy machine, three processes take long to start
def test_a_worker_that_was_killed_comes_back_to_every_shard(tmp_path: Path) -> None:
    """It begins with a new state; what it had leased is computed by others, once."""
    script, enough = tmp_path / "script.py", tmp_path / "enough"
    script.write_text(ENDLESS)
    run = Running(tmp_path / "run", *LIVE, script=[str(script), str(enough)])

    def processes_of_worker_1() -> int:
        return len({update["incarnation"] for update in read_updates(run.folder) if update["worker"] == 1})

    try:
        until(lambda: processes_of_worker_1() == 1, "worker 1 takes part")
        os.kill(run.pid("rank"), signal.SIGKILL)
        until(lambda: processes_of_worker_1() == 2, "worker 1 is back")
        enough.touch()
        output, _ = run.launcher.communicate(timeout=150)
        assert run.launcher.returncode == 0, output
        done = sorted(update["batch"] for update in read_updates(run.folder))
        assert len(done) > 2 * AT_WORK
        assert len(set(done)) == len(done)
        assert done[:-AT_WORK] == list(range(len(done) - AT_WORK))
        assert (run.folder / "parameters.safetensors").exists()
    finally:
        run.end()
