"""The pipeline: what each batch is computed on, how late it is applied, and that nothing is applied twice."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from stimuli import LAYOUT, SIZE

from danaz.config import load_config
from danaz.launching import LaunchError, check_workers
from danaz.rules.base import HyperparameterError
from danaz.server.core import ServerCore
from danaz.server.messages import Parameters, Plan, Push, Refusal
from danaz.server.settings import ServerSettings
from danaz.settings import Settings
from danaz.simulate.simulator import Simulation
from danaz.worker.core import Role, WorkerCore

QUADRATIC = Path(__file__).parents[1] / "configs/quadratic.yaml"
WORKERS = 4


def simulation(folder: Path, *overrides: str, late: bool = True) -> Simulation:
    sets = (f"workers={WORKERS}", "epochs=1", "threads=1", "schedule=round-robin", "pipeline=true", *overrides)
    simulated = Simulation(load_config(QUADRATIC, sets), folder)
    simulated.fetches_late = late
    return simulated


@pytest.mark.parametrize(("late", "lag"), [(True, WORKERS), (False, 2 * WORKERS - 1)])
def test_it_equals_its_definition(tmp_path, late, lag):
    """θ ← θ − ηg(θ of ``lag`` updates before), recomputed from first principles on the recorded pushes."""
    simulated = simulation(tmp_path, "algorithm=asgd", late=late)
    simulated.start()
    handle, history, pushed = simulated.server.handle, [simulated.server.master.params.double().clone()], []

    def listen(route, message, now):
        if isinstance(message, Push):
            core = simulated.workers[message.worker].core
            pushed.append((message, message.push.clone()))
            assert core.version >= message.view_version
        replies = handle(route, message, now)
        if isinstance(message, Push):
            history.append(simulated.server.master.params.double().clone())
        return replies

    simulated.server.handle = listen
    simulated.advance(40)
    x = simulated.flat.params
    for version, (message, push) in enumerate(pushed):
        if version >= 2 * WORKERS:
            assert version - message.view_version == lag
        x.copy_(history[message.view_version])
        grad, _, _ = simulated._gradient(message.batch)
        assert torch.allclose(push, grad, rtol=1e-5, atol=1e-6), "the gradient at the view that it names"
        expected = history[version] - message.lr[0] * grad.double()
        assert torch.allclose(history[version + 1], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["dana", "dana-zero", "dc-asgd", "dana-ga", "asgd"])
def test_it_goes_downhill(tmp_path, algorithm):
    simulated = simulation(tmp_path, f"algorithm={algorithm}", "epochs=5")
    losses, record = [], simulated.folder.record
    simulated.folder.record = lambda update: (losses.append(update.loss), record(update))
    summary = simulated.run()
    assert summary["mean_lag"] == pytest.approx(WORKERS, abs=0.1)
    assert summary["final_train_loss"] < losses[0] / 5


def ask(worker, request, server, chance, last):
    """Bring a request to the server over a line that loses and repeats; joins anew when told to."""
    number, answered = worker.role.worker, None
    while answered is None:
        for _ in range(chance.choice((0, 1, 1, 2))):
            replies = [reply for route, reply in server.handle(number, request, 0.0) if route == number]
            answered = next((r for r in replies if chance.random() < 0.8), answered)
        if server.leases.done and answered is None:
            answered = next(reply for route, reply in server.handle(number, request, 0.0) if route == number)
    if isinstance(answered, Refusal):
        assert answered.rejoin
        worker.receive(answered)
        return ask(worker, worker.join(), server, chance, last)
    worker.receive(answered)
    last[number] = answered
    return answered


@pytest.mark.parametrize("algorithm", ["dana", "dana-zero", "dana-ga"])
@pytest.mark.parametrize("seed", range(5))
def test_exactly_once_whatever_is_lost_or_repeated(algorithm, seed):
    """Two workers, requests lost and delivered twice, answers lost, a worker given up now and then."""
    chance, applied, plan = random.Random(seed), [], Plan(30, 1)
    settings = ServerSettings(algorithm=algorithm, workers=2, worker_timeout_s=100.0)
    server = ServerCore(settings, on_update=applied.append)
    rule, now = settings.rule(0.9).worker_rule, 0.0
    workers = [WorkerCore(Role(w, 1, "", 0.9, LAYOUT, plan, ahead=2), rule) for w in range(2)]
    last: dict[int, Parameters] = {}
    for worker in workers:
        for route, reply in server.handle(worker.role.worker, worker.join(torch.zeros(SIZE)), now):
            workers[route].receive(reply)
            last[route] = reply

    while not server.leases.done:
        worker = chance.choice(workers)
        number = worker.role.worker
        if chance.random() < 0.05:
            server.members[number].heard_at = -1000.0
            server.tick(now)
        if not last[number].leases:
            if server.leases._returned or server.leases._next < plan.batches:
                ask(worker, worker.pull(), server, chance, last)
            continue
        if worker.fetched is None:
            ask(worker, worker.pull(ahead=True), server, chance, last)
        if worker.fetched is None or not last[number].leases:
            continue
        push = worker.push(torch.randn(SIZE), (0.1,) * len(LAYOUT.groups), 1, 1.0, last[number].leases[0], None, False)
        ask(worker, push, server, chance, last)
    assert sorted(update.batch for update in applied) == list(range(plan.batches))
    assert len({(u.worker, u.request) for u in applied}) == plan.batches


@pytest.mark.parametrize("algorithm", ["ssgd", "easgd", "bmuf"])
def test_what_cannot_be_pipelined_says_why(algorithm):
    with pytest.raises(LaunchError, match=rf"{algorithm} cannot train with pipeline: its workers"):
        check_workers(Settings(algorithm=algorithm, pipeline=True))


def test_local_steps_cannot_be_pipelined():
    with pytest.raises(LaunchError, match="steps alone between pushes"):
        check_workers(Settings(algorithm="dana", sync_period=2, pipeline=True))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"strenght": 0.5}, "no hyper-parameter 'strenght'; it has"),
        ({"strength": "much"}, "expected a finite float"),
        ({"momentum": 0.5}, "is a setting of the run itself"),
    ],
)
def test_hyperparameters_are_checked(values, why):
    with pytest.raises(HyperparameterError, match=why):
        check_workers(Settings(algorithm="dc-asgd", hyperparameters=values))


def test_a_hyperparameter_reaches_the_rule(tmp_path):
    sets = ("algorithm=dc-asgd", "lr=0.005")
    ends = [
        simulation(tmp_path / str(strength), *sets, f"hyperparameters={{strength: {strength}}}").run()["params_l2"]
        for strength in (0.04, 2.0)
    ]
    assert ends[0] == simulation(tmp_path / "default", *sets).run()["params_l2"], "0.04 is the paper's"
    assert ends[0] != ends[1]
