"""Every algorithm against its formula. A new one is a row here as soon as it is registered: it needs an oracle."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from cluster import Cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_local import ORACLES
from pair import GROUPS, SIZE, Pair, Run, carried_out, close, runs
from torch import Tensor

from danaz.optimizers import Optimizer, Optimizers
from danaz.rules import ALGORITHMS, Context
from danaz.vectors import cutting

every_algorithm = pytest.mark.parametrize("name", sorted(ALGORITHMS))

# ---- the matrix --------------------------------------------------------------------------------------------------


@every_algorithm
class TestEveryAlgorithm:
    def test_it_has_an_oracle(self, name):
        assert name in ORACLES, (
            f"algorithm {name!r} has no oracle: write its formula in float64 NumPy in tests/support/oracle.py"
        )

    def test_it_describes_itself(self, name):
        algorithm = ALGORITHMS[name]
        assert algorithm.summary.endswith(".")
        assert algorithm.paper
        assert all(
            isinstance(default, (int, float, bool, str, tuple)) for default in algorithm.hyperparameters.values()
        )

    @given(run=runs())
    @settings(max_examples=30, deadline=None)
    def test_it_is_its_formula(self, name, run):
        """Any order, any number of workers, any rates, any optimizer."""
        Pair(name, run).live_through_it()

    @given(run=runs(), cut=st.integers(1, SIZE))
    @settings(max_examples=15, deadline=None)
    def test_slices_are_the_whole(self, name, run, cut):
        """Bit for bit, so that sharding and chunking change no rule."""
        whole, sliced = final_state(name, run, cutting.SLICE_FLOATS), final_state(name, run, cut)
        assert all(torch.equal(whole[key], sliced[key]) for key in whole)

    @given(run=runs())
    @settings(max_examples=15, deadline=None)
    def test_its_state_is_in_its_vectors(self, name, run):
        """A rule object built anew goes on with the vectors of the last one, bit for bit."""
        assert state_after(name, run, fresh_rule_each_time=False) == state_after(name, run, fresh_rule_each_time=True)

    def test_a_worker_that_was_refused_is_where_it_was(self, name):
        """Commit on acceptance: a NaN leaves no trace in any state, so the next push is as if it had not been."""
        for optimizer in carried_out(name):
            states = []
            for gradients in ([1.0, float("nan"), 2.0, 0.5], [1.0, 2.0, 0.5]):
                cluster = Cluster(name, 1, torch.ones(SIZE), groups=GROUPS, optimizers=Optimizers([optimizer]))
                for value in gradients:
                    cluster.push(0, [torch.full((SIZE,), value)] * cluster.sync_period, 0.1)
                core = cluster.workers[0]
                given = [] if core.given_back() is None else [core.given_back()]
                states.append([cluster.views[0], cluster.server.master.params, *core.vectors.values(), *given])
            assert all(torch.equal(poisoned, clean) for poisoned, clean in zip(*states, strict=True)), optimizer


@pytest.mark.parametrize("name", sorted(name for name, each in ALGORITHMS.items() if not each.rule().per_layer))
@pytest.mark.parametrize("cuts", [(1, 1003), (7, 64), (1000, 1001)])
def test_long_slices_are_the_whole(name, cuts):
    """Lengths at which a vectorised loop has a rest to do by itself. A rule that works per layer is never so cut."""
    for optimizer in carried_out(name):
        whole = one_update_in_slices(name, optimizer, [0, 1003])
        assert whole
        for sliced in ([0, *cuts, 1003], [*range(0, 1003, 17), 1003]):
            again = one_update_in_slices(name, optimizer, sliced)
            assert all(torch.equal(whole[key], again[key]) for key in whole), optimizer


# What has no server is simulated, with all its workers.
LIVE = sorted(name for name, algorithm in ALGORITHMS.items() if algorithm.rule().live)


@pytest.mark.parametrize("name", LIVE)
@given(run=runs("lose", "come_back", "start_anew", "leave"))
@settings(max_examples=30, deadline=None)
def test_it_is_its_formula_while_workers_come_and_go(name, run):
    Pair(name, run).live_through_it()


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - set(LIVE)))
@given(run=runs())
@settings(max_examples=20, deadline=None)
def test_without_a_server_the_model_is_the_mean_of_all_workers(name, run):
    pair = Pair(name, run)
    pair.live_through_it()
    server = pair.cluster.server
    mean = torch.stack([member.vectors["local"] for member in server.members.values()]).mean(0)
    close(server.master.params, mean)


def final_state(name: str, run: Run, slice_floats: int) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "SLICE_FLOATS", slice_floats)
        pair = Pair(name, run)
        pair.live_through_it()
    server = pair.cluster.server
    members = {f"{m.worker}.{key}": vector for m in server.members.values() for key, vector in m.vectors.items()}
    views = {f"view.{worker}": view for worker, view in pair.cluster.views.items()}
    return {"params": server.master.params, **server.master.shared, **members, **views}


def one_update_in_slices(name: str, optimizer: Optimizer, cuts: list[int]) -> dict[str, Tensor]:
    """All vectors after a push, an update and a view made slice by slice, from a random state."""
    generator = torch.Generator().manual_seed(7)
    rule = ALGORITHMS[name].rule(optimizer=Optimizers([optimizer]))
    names = ["grad", "params", "worker.view", *(f"worker.{n}" for n in rule.worker_rule.worker_state)]
    names += [f"{whose}.{n}" for whose in ("own", "other") for n in ("view", "neighbour", *rule.worker_state)]
    names += [f"shared.{n}" for n in rule.shared_state]
    vectors = {n: torch.rand(1003, generator=generator) + 0.1 for n in names}  # positive: some are mean squares
    vectors |= {f"new.{n}": torch.zeros(1003) for n in rule.worker_rule.worker_state}
    vectors |= {"push": torch.zeros(1003), "out": torch.zeros(1003)}
    context = Context(lr=0.1, own_lr=0.07, max_lr=0.2, lag=3, version=11, own_count=4, shared_count=11)

    for start, stop in pairwise(cuts):
        part = {n: vector[start:stop] for n, vector in vectors.items()}

        def of(kind: str, part: dict[str, Tensor] = part) -> dict[str, Tensor]:
            return {n.removeprefix(kind): vector for n, vector in part.items() if n.startswith(kind)}

        rule.worker_rule.push(part["push"], part["grad"], of("worker."), of("new."), context)
        if rule.barrier:
            pushes = [(part["grad"], 0.25), (part["push"], 0.75)]
            rule.apply_round(part["params"], pushes, [of("own."), of("other.")], of("shared."), context)
        else:
            rule.apply(part["params"], part["push"], of("own."), of("shared."), context)
        rule.view(part["out"], part["params"], of("own."), of("shared."), context)
    return vectors


def state_after(name: str, run: Run, fresh_rule_each_time: bool) -> dict[str, list[float]]:
    pair = Pair(name, run)
    for what, worker in run.events:
        if fresh_rule_each_time:
            server = pair.cluster.server
            server.master.rule = server.settings.rule(pair.cluster.optimizers)
            server.master.shared = copy.deepcopy(server.master.shared)
        if worker < pair.limit:
            getattr(pair, what)(worker)
    vectors = {"theta": pair.theta(), **pair.cluster.server.master.shared}
    return {key: vector.tolist() for key, vector in vectors.items()}
