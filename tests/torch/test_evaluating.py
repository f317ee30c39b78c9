"""danaz.evaluating: the model as it should be evaluated in mid-run, and the training state back to the bit."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from loops import adopt, alone
from sockets import PATIENCE_S
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from waiting import until

from danaz.server.settings import ServerSettings
from danaz.torch.evaluating import EvaluationError
from danaz.torch.session import NotInitializedError, Session
from scripts import Counted, ScriptCluster

EPOCHS, SAMPLES, BATCH = 3, 24, 8


def make_model() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.1), nn.Linear(4, 1))
    model[2].eval()  # a script may keep some modules in another mode than the others
    return model


def make_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def state_of(model: nn.Module) -> list[Any]:
    return [*(t.clone() for t in model.state_dict().values()), *(m.training for m in model.modules())]


def equal(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Check that the model is after the block what it was before, to the bit."""
    before = state_of(model)
    yield
    assert equal(state_of(model), before)


def train_batch(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    mse_loss(model(x), torch.ones(len(x), 1)).backward()
    optimizer.step()


def train_steps(session: Session, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Train four steps, and let the test look at the model after each."""
    for step in session.run_steps(4, 1):
        train_batch(model, optimizer, torch.rand(4, 1, generator=torch.Generator().manual_seed(step)))
        yield


Look = Callable[[Session, nn.Module, int], None]


def script(look: Look, fetched: list[tuple[int, int]], models: dict[tuple[int, int], nn.Module], epochs: int) -> Any:
    """Return a script that looks at its model after each epoch's loop, on every rank."""

    def story(session: Session, number: int) -> None:
        model = make_model()
        models[number, session.group.rank] = model
        optimizer = adopt(session, model, make_sgd(model))
        loader = DataLoader(Counted(SAMPLES, number, fetched, lambda: None), batch_size=BATCH, shuffle=True)
        for epoch in session.run_epochs(epochs):
            for x, _ in session.run_batches(loader, epoch):
                train_batch(model, optimizer, x)
            look(session, model, epoch)

    return story


def run(look: Look, cluster: ScriptCluster, epochs: int = EPOCHS) -> dict[tuple[int, int], nn.Module]:
    """Run a cluster whose worker 0 has two ranks. Return the models by worker and rank."""
    models: dict[tuple[int, int], nn.Module] = {}
    for number in range(cluster.settings.workers):
        cluster.worker(number, script(look, cluster.fetched, models, epochs), ranks=2 if number == 0 else 1)
    cluster.run()
    return models


def is_main(session: Session) -> bool:
    return session.place.worker == 0 and session.group.rank == 0


# ---- one rank, as people write it ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ServerSettings("dana", workers=2),
        ServerSettings("dana", workers=2, pipeline=True),
        ServerSettings("dana-zero", workers=2),
        ServerSettings("easgd", workers=2, sync_period=2),
    ],
    ids=["dana", "pipelined", "dana-zero", "local steps"],
)
@pytest.mark.parametrize("at", ["view", "server"])
def test_the_main_process_evaluates_while_the_others_go_on(settings: ServerSettings, at: str) -> None:
    own: dict[int, dict[int, Tensor]] = defaultdict(dict)
    there, evaluates = threading.Barrier(2), threading.Event()
    evaluated = []
    cluster = ScriptCluster(settings)

    def look(session: Session, model: nn.Module, epoch: int) -> None:
        if session.place.worker:
            evaluates.wait(PATIENCE_S)
            return
        own[epoch][session.group.rank] = model[1].running_mean.clone()
        there.wait(PATIENCE_S)
        if not is_main(session):
            return
        view = parameters(model)
        with kept(model), session.evaluating(model, at, together=False):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            assert torch.allclose(model[1].running_mean, (own[epoch][0] + own[epoch][1]) / 2)
            if at == "view":
                assert torch.equal(parameters(model), view)
            updates = len(cluster.updates)
            evaluates.set()
            if epoch == 0:
                until(lambda: len(cluster.updates) > updates, "an update of the other worker")
        evaluated.append(epoch)

    run(look, cluster)
    assert evaluated[0] == 0
    assert not torch.equal(own[0][0], own[0][1])
    assert cluster.core.summary()["complete"]


def test_an_evaluation_leaves_no_trace_in_the_training() -> None:
    """The script swaps other values in and recomputes statistics while it evaluates."""

    def trained(at: str | None) -> list[Tensor]:
        torch.manual_seed(3)
        model = make_model()
        with alone("dana") as session:
            optimizer = adopt(session, model, make_sgd(model))
            loader = DataLoader(TensorDataset(torch.linspace(0, 1, SAMPLES)[:, None]), batch_size=BATCH)
            for epoch in session.run_epochs(EPOCHS):
                for (x,) in session.run_batches(loader, epoch):
                    train_batch(model, optimizer, x)
                    if at is None:
                        continue
                    with kept(model), session.evaluating(model, at, together=epoch == 1):
                        for parameter in model.parameters():
                            parameter.mul_(2)
                        model[0].weight.data = torch.ones(4, 1)
                        model.train()
                        model(x)
        return list(model.state_dict().values())

    without = trained(None)
    for at in ("view", "server"):
        assert all(torch.equal(a, b) for a, b in zip(trained(at), without, strict=True))


def test_the_state_comes_back_after_an_error_also_from_within_another_evaluation() -> None:
    model = make_model()
    with alone("dana-zero") as session:
        optimizer = adopt(session, model, make_sgd(model))
        for _ in train_steps(session, model, optimizer):
            outer, inner = (session.evaluating(model, at, False) for at in ("server", "view"))
            with kept(model), pytest.raises(ZeroDivisionError), outer, inner:
                raise ZeroDivisionError
        assert session.finished


def test_the_server_has_theta_where_the_view_looks_ahead(servers: list[Any]) -> None:
    model = make_model()
    with alone("dana-zero") as session:
        optimizer = adopt(session, model, make_sgd(model))
        for _ in train_steps(session, model, optimizer):
            view = parameters(model)
            with session.evaluating(model, "server", False):
                assert torch.equal(parameters(model), servers[0].master.params)
                assert not torch.equal(parameters(model), view)


# ---- all ranks -------------------------------------------------------------------------------------------------------


def test_parameters_of_another_type_show_the_values_that_are_evaluated(servers: list[Any]) -> None:
    """Such a parameter is a rounded copy of what the cluster trains."""
    with alone("nag-asgd") as session:
        model = nn.Linear(1, 1).to(torch.bfloat16)
        optimizer = adopt(session, model, make_sgd(model))
        for step in session.run_steps(4, 4):
            optimizer.zero_grad()
            mse_loss(model(torch.ones(4, 1, dtype=torch.bfloat16)), torch.zeros(4, 1, dtype=torch.bfloat16)).backward()
            optimizer.step()
            view = parameters(model)
            with kept(model), session.evaluating(model, "server", False):
                assert torch.equal(parameters(model), servers[0].master.params.to(torch.bfloat16))
                assert step == 0 or not torch.equal(parameters(model), view)


def test_all_ranks_together_see_one_model_in_the_midst_of_the_loop() -> None:
    seen: dict[int, list[list[Tensor]]] = defaultdict(list)

    def story(session: Session, number: int) -> None:
        model = make_model()
        optimizer = adopt(session, model, make_sgd(model))
        for step in session.run_steps(6, 4):
            seed = session.seed_for(step)
            train_batch(model, optimizer, torch.rand(4, 1, generator=torch.Generator().manual_seed(seed)))
            if number:
                continue
            own = model[1].running_mean.clone()
            with kept(model), session.evaluating(model, "server", together=True):
                seen[session.group.rank].append([parameters(model), model[1].running_mean.clone(), own])

    cluster = ScriptCluster(ServerSettings("dana-zero", workers=2))
    cluster.worker(0, story, ranks=2)
    cluster.worker(1, story)
    cluster.run()
    assert len(seen[0]) == len(seen[1]) > 0
    for (params, mean, own), (other_params, other_mean, other_own) in zip(seen[0], seen[1], strict=True):
        assert torch.equal(params, other_params)
        assert torch.equal(mean, other_mean)
        assert torch.allclose(mean, (own + other_own) / 2)
        assert not torch.equal(own, other_own)


def test_a_rank_without_a_connection_is_told_what_to_write() -> None:
    def look(session: Session, model: nn.Module, epoch: int) -> None:
        if session.place.worker == 0 and session.group.rank == 1:
            refused = pytest.raises(EvaluationError, match=r"within `if danaz\.rank")
            with kept(model), refused, session.evaluating(model, "server", together=False):
                pass

    run(look, ScriptCluster(ServerSettings("dana", workers=1)))


# ---- where an evaluation may not be ----------------------------------------------------------------------------------


def test_nothing_is_trained_within_an_evaluation() -> None:
    model = make_model()
    with alone("dana") as session:
        optimizer = adopt(session, model, make_sgd(model))
        loader = DataLoader(TensorDataset(torch.linspace(0, 1, SAMPLES)[:, None]), batch_size=BATCH)
        for epoch in session.run_epochs(1):
            with (
                session.evaluating(model, "view", False),
                pytest.raises(RuntimeError, match="to evaluate, iterate the loader itself"),
            ):
                next(iter(session.run_batches(loader, epoch)))
            for (x,) in session.run_batches(loader, epoch):
                refused = pytest.raises(EvaluationError, match="train outside of it")
                with kept(model), session.evaluating(model, "view", False), refused:
                    optimizer.step()
                train_batch(model, optimizer, x)


def test_what_danaz_cannot_evaluate_is_refused() -> None:
    model = make_model()
    with alone("dana") as session:
        with (
            pytest.raises(NotInitializedError, match="wrap the optimizer first"),
            session.evaluating(model, "view", False),
        ):
            pass
        adopt(session, model, make_sgd(model))
        with session.evaluating(model, "view", False):
            assert not model.training, "before the first batch, the model is what the script has made"
        refused = pytest.raises(ValueError, match="at='view' or at='server', not 'theta'")
        with refused, session.evaluating(model, "theta", False):
            pass
        refused = pytest.raises(NotInitializedError, match="begins with the first batch")
        with refused, session.evaluating(model, "server", False):
            pass
        refused = pytest.raises(ValueError, match="without any parameter that DistributedOptimizer trains")
        with refused, session.evaluating(make_model(), "view", False):
            pass


# ---- the end of the run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["view", "server"])
@pytest.mark.parametrize("stopper", [0, 1])
def test_a_run_that_is_stopped_within_an_evaluation_ends_with_the_trained_model(at: str, stopper: int) -> None:
    stopped = []

    def look(session: Session, model: nn.Module, epoch: int) -> None:
        if not stopped and epoch > 0 and (session.place.worker, session.group.rank) == (stopper, 0):
            with session.evaluating(model, at, together=False):
                session.stop("good enough")
                stopped.append(parameters(model))
            assert all(module.training for module in [model, *model[:2]])
            assert torch.equal(parameters(model), stopped[0])

    cluster = ScriptCluster(ServerSettings("dana", workers=2))
    models = run(look, cluster, epochs=10_000)
    assert cluster.core.summary()["stopped"] == "good enough"
    assert len(models) == 3
    for model in models.values():
        assert torch.equal(parameters(model), cluster.core.master.params)


@pytest.mark.parametrize("epochs", [2, 5])
def test_one_rank_may_stop_the_run_after_the_last_batch_of_an_epoch(epochs: int) -> None:
    """The other ranks are at the end of their loops, where buffers are averaged, or on their way to the next epoch."""
    ended = []

    def story(session: Session, number: int) -> None:
        model = make_model()
        optimizer = adopt(session, model, make_sgd(model))
        loader = DataLoader(Counted(SAMPLES, number, [], lambda: None), batch_size=BATCH)
        for epoch in session.run_epochs(epochs):
            for batch, (x, _) in enumerate(session.run_batches(loader, epoch)):
                train_batch(model, optimizer, x)
                if (session.group.rank, epoch, batch) == (1, 1, SAMPLES // BATCH - 1):
                    session.stop("enough")
                    break
            if session.finished:
                break
        ended.append(parameters(model))

    cluster = ScriptCluster(ServerSettings("dana", workers=1))
    cluster.worker(0, story, ranks=2)
    cluster.run()
    assert len(ended) == 2
    assert torch.equal(*ended)


def test_after_the_run_both_points_are_the_trained_model() -> None:
    model = make_model()
    with alone("dana") as session:
        optimizer = adopt(session, model, make_sgd(model))
        list(train_steps(session, model, optimizer))
        trained = parameters(model)
        for at in ("view", "server"):
            with session.evaluating(model, at, False):
                assert torch.equal(parameters(model), trained)


def test_a_break_ends_the_run_before_the_model_is_evaluated() -> None:
    model = make_model()
    with alone("dana") as session:
        optimizer = adopt(session, model, make_sgd(model))
        for step in session.run_steps(100, 1):
            train_batch(model, optimizer, torch.rand(4, 1, generator=torch.Generator().manual_seed(step)))
            if step == 3:
                break
        look_ahead = parameters(model)
        with session.evaluating(model, "view", False):
            assert session.finished
            assert not torch.equal(parameters(model), look_ahead)
