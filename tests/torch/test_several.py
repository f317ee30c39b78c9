"""Several optimizers in one script: their steps on a batch are one update, and come out as torch makes them."""

from __future__ import annotations

import atexit
import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from loops import adopt, alone
from ranks import ThreadGroup, on_each_rank
from sockets import serving
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from danaz.run.settings import RankInfo, Settings
from danaz.server.core import ServerCore
from danaz.server.records import Update
from danaz.server.settings import ServerSettings
from danaz.torch.data import Batching
from danaz.torch.optimizer import DistributedOptimizer, UnsupportedOptimizerError
from danaz.torch.session import NotInitializedError, Session
from scripts import run_world

SAMPLES, BATCH, EPOCHS, FEATURES = 22, 8, 3, 4  # two ranks share the last batch of 6 as 3/3

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass
class Gan:
    """What a loop gets: two models, an optimizer for each, and the batches."""

    critic: nn.Module
    generator: nn.Module
    of_critic: Any
    of_generator: Any
    batches: Callable[[], Iterator[tuple[int, Tensor]]]
    rank: int = 0
    seen: list[float] = field(default_factory=list)

    def fakes(self, x: Tensor) -> Tensor:
        return self.generator(x[:, :2])  # noise that comes with the sample, so that all ranks and torch have the same

    def critics_loss(self, x: Tensor) -> Tensor:
        return (softplus(-self.critic(x)) + softplus(self.critic(self.fakes(x).detach()))).mean()

    def generators_loss(self, x: Tensor) -> Tensor:
        return softplus(-self.critic(self.fakes(x))).mean()


Loop = Callable[[Gan], None]


def step_critic(gan: Gan, x: Tensor) -> None:
    gan.of_critic.zero_grad()
    gan.critics_loss(x).backward()
    gan.of_critic.step()


def step_generator(gan: Gan, x: Tensor) -> None:
    gan.of_generator.zero_grad()
    gan.generators_loss(x).backward()  # this also adds to the critic's gradients
    gan.of_generator.step()


def usual(gan: Gan) -> None:
    for _, x in gan.batches():
        step_critic(gan, x)
        step_generator(gan, x)


def generator_first(gan: Gan) -> None:
    for _, x in gan.batches():
        step_generator(gan, x)
        step_critic(gan, x)


def critic_more_often(gan: Gan) -> None:
    """As WGANs do; the critic's parameters are clamped, too."""
    for number, x in gan.batches():
        step_critic(gan, x)
        for p in gan.critic.parameters():
            p.data.clamp_(-0.3, 0.3)
        if number % 3 == 2:
            step_generator(gan, x)


def two_passes_and_clipping(gan: Gan) -> None:
    for _, x in gan.batches():
        gan.of_critic.zero_grad()
        softplus(-gan.critic(x)).mean().backward()
        softplus(gan.critic(gan.fakes(x).detach())).mean().backward()
        gan.seen.append(float(nn.utils.clip_grad_norm_(gan.critic.parameters(), 0.05)))
        gan.of_critic.step()
        step_generator(gan, x)


def scaler(gan: Gan) -> None:
    """The generator's loss overflows on one batch."""
    scale = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for number, x in gan.batches():
        gan.of_critic.zero_grad()
        scale.scale(gan.critics_loss(x)).backward()
        scale.step(gan.of_critic)
        gan.of_generator.zero_grad()
        loss = gan.generators_loss(x)
        scale.scale(loss * 1e38 * 1e38 if number == 1 else loss).backward()
        scale.step(gan.of_generator)
        scale.update()


def skip_one_on_a_rank(gan: Gan) -> None:
    """On some batches, a rank makes no step of the critic, or of the generator. Then none makes it, nor a later one."""
    for number, x in gan.batches():
        loss = gan.critics_loss(x)
        if number % 4 != 1 or gan.rank == 1:
            gan.of_critic.zero_grad()
            loss.backward()
        if number % 4 != 1 or gan.rank == 1:
            gan.of_critic.step()
        if (number % 4 == 2 and gan.rank == 0) or (number % 4 in (1, 2) and gan.rank == -1):
            continue
        step_generator(gan, x)


def skip_a_batch(gan: Gan) -> None:
    for number, x in gan.batches():
        if number % 3 != 1:
            step_critic(gan, x)
            step_generator(gan, x)


LOOPS: list[Loop] = [
    *(usual, generator_first, critic_more_often, two_passes_and_clipping, scaler, skip_one_on_a_rank, skip_a_batch)
]


def models() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(7)
    critic = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1))
    return critic, nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, FEATURES))


def data() -> TensorDataset:
    return TensorDataset(torch.randn(SAMPLES, FEATURES, generator=torch.Generator().manual_seed(8)))


def adamw(parameters: list[nn.Parameter], lr: float = 0.01) -> torch.optim.Optimizer:
    """Adam without the first momentum, whose steps are torch's under every algorithm."""
    return torch.optim.AdamW(parameters, lr, betas=(0.0, 0.9), weight_decay=0.1)


def sgd(parameters: list[nn.Parameter], lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr, weight_decay=0.01)


def heavy(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.02, momentum=0.9)


def train_with_torch(loop: Loop, makes: tuple[Make, Make]) -> Gan:
    critic, generator = models()
    batching = Batching(SAMPLES, BATCH)

    def batches() -> Iterator[tuple[int, Tensor]]:
        for batch in range(batching.plan(EPOCHS).batches):
            yield batch, data()[batching.indices(batch)][0]

    of_critic, of_generator = makes[0](list(critic.parameters())), makes[1](list(generator.parameters()))
    gan = Gan(critic, generator, of_critic, of_generator, batches, rank=-1)
    loop(gan)
    return gan


def train_with_danaz(loop: Loop, makes: tuple[Make, Make], session: Session, pair: tuple[nn.Module, nn.Module]) -> Gan:
    atexit.unregister(session.close)
    replicated = session.place.server is None
    optimizers = []
    for model, make in zip(pair, makes, strict=True):
        made = make(list(model.parameters()))
        optimizers.append(DistributedOptimizer(made, model, session.group, replicated=replicated))
        session.adopt(optimizers[-1])
    session.epochs = EPOCHS
    loader = DataLoader(data(), batch_size=BATCH, shuffle=True)

    def batches() -> Iterator[tuple[int, Tensor]]:
        number = 0
        for epoch in range(EPOCHS):
            for [x] in session.shard(loader, epoch):
                yield number, x
                number += 1

    gan = Gan(*pair, *optimizers, batches, rank=session.group.rank if session.group.size > 1 else -1)
    loop(gan)
    session.finish()
    session.close()
    return gan


def assert_alike(ours: Gan, theirs: Gan) -> None:
    for name in ("critic", "generator"):
        pairs = zip(getattr(ours, name).parameters(), getattr(theirs, name).parameters(), strict=True)
        for p, q in pairs:
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert ours.seen == pytest.approx(theirs.seen, rel=1e-3)


@pytest.mark.parametrize("algorithm", ["baseline", "ssgd", "dana"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_each_moves_at_its_own_step_as_in_torch(loop: Loop, algorithm: str) -> None:
    session = Session(Settings(algorithm=algorithm), RankInfo())
    ours = train_with_danaz(loop, (adamw, partial(adamw, lr=0.03)), session, models())
    assert_alike(ours, train_with_torch(loop, (adamw, partial(adamw, lr=0.03))))


@pytest.mark.parametrize("algorithm", ["baseline", "ssgd"])
def test_kinds_may_differ_where_the_scripts_own_objects_step(algorithm: str) -> None:
    """Momentum without Nesterov stays what it is, and nothing is said of it."""
    session = Session(Settings(algorithm=algorithm), RankInfo())
    ours = train_with_danaz(usual, (heavy, adamw), session, models())
    assert_alike(ours, train_with_torch(usual, (heavy, adamw)))
    assert ours.of_critic.state_dict()["state"][0]["momentum_buffer"].any()


def move_together(gan: Gan) -> None:
    """What ``usual`` is if both move at the end of the batch; the critic's gradient is that of its own loss alone."""
    for _, x in gan.batches():
        gan.of_critic.zero_grad()
        gan.critics_loss(x).backward()
        kept = [p.grad for p in gan.critic.parameters()]
        gan.of_generator.zero_grad()
        gan.of_critic.zero_grad()
        gan.generators_loss(x).backward()
        for p, grad in zip(gan.critic.parameters(), kept, strict=True):
            p.grad = grad
        gan.of_critic.step()
        gan.of_generator.step()


@pytest.mark.parametrize("algorithm", ["dana-zero", "nag-asgd", "asgd"])
def test_where_the_server_makes_the_steps_both_move_together(algorithm: str) -> None:
    session = Session(Settings(algorithm=algorithm), RankInfo())
    with pytest.warns(UserWarning, match=f"has 2 optimizers, and {algorithm} moves all their parameters together"):
        ours = train_with_danaz(usual, (sgd, sgd), session, models())
    assert_alike(ours, train_with_torch(move_together, (sgd, sgd)))
    session = Session(Settings(algorithm="dana-zero"), RankInfo())
    with pytest.warns(UserWarning, match="together"):
        ours = train_with_danaz(skip_a_batch, (adamw, adamw), session, models())
    assert not any(p.isnan().any() for p in ours.critic.parameters())


@pytest.mark.filterwarnings("ignore:the script has 2 optimizers")
@pytest.mark.parametrize(
    ("loop", "mode"), [*product(LOOPS, ["ssgd", "dana"]), *product([usual, skip_one_on_a_rank], ["dana-zero"])]
)
def test_ranks_equal_torch(loop: Loop, mode: str) -> None:
    """Two ranks of one worker; under dana and dana-zero with a server on a socket."""
    pairs = [models() for _ in range(2)]
    with ExitStack() as stack:
        place = RankInfo()
        if mode.startswith("dana"):
            address, _ = stack.enter_context(serving(ServerCore(ServerSettings(mode, 1, ""))))
            place = RankInfo(worker=0, server=address)

        def work(group: ThreadGroup) -> Gan:
            session = Session(Settings(algorithm=mode), place, group)
            return train_with_danaz(loop, (adamw, adamw), session, pairs[group.rank])

        results = on_each_rank(2, work)
    for error in (each for each in results if isinstance(each, BaseException)):
        raise error
    first, second = results
    assert isinstance(first, Gan)
    assert isinstance(second, Gan)
    for name in ("critic", "generator"):
        for p, q in zip(getattr(first, name).parameters(), getattr(second, name).parameters(), strict=True):
            assert torch.equal(p, q)
    if mode != "dana-zero":
        assert_alike(first, train_with_torch(loop, (adamw, adamw)))
    elif loop is usual:
        assert_alike(first, train_with_torch(move_together, (adamw, adamw)))


def test_in_a_pipeline_both_move_together() -> None:
    """The gradients do not depend on the parameters, so that the lag of a pipeline makes no difference."""

    def loop(gan: Gan) -> None:
        for _, x in gan.batches():
            gan.of_critic.zero_grad()
            gan.critic(x).mean().backward()
            gan.of_critic.step()
            gan.of_generator.zero_grad()
            gan.generator(x[:, :2]).square().sum(1).sqrt().mean().backward()
            gan.of_generator.step()

    def linear() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(7)
        return nn.Linear(FEATURES, 1), nn.Linear(2, 1)

    plain = partial(torch.optim.SGD, lr=0.01)
    with ExitStack() as stack:
        address, _ = stack.enter_context(serving(ServerCore(ServerSettings("dana", 1, ""))))
        session = Session(Settings(algorithm="dana", pipeline=True), RankInfo(worker=0, server=address))
        with pytest.warns(UserWarning, match="dana moves all their parameters together"):
            ours = train_with_danaz(loop, (plain, plain), session, linear())
    critic, generator = linear()
    batching = Batching(SAMPLES, BATCH)
    given = [data()[batching.indices(batch)][0] for batch in range(batching.plan(EPOCHS).batches)]
    expected = critic.weight - 0.01 * sum(x.mean(0) for x in given)
    torch.testing.assert_close(ours.critic.weight, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours.generator.weight, generator.weight)


# ---- what a run records ---------------------------------------------------------------------------------------------


def test_a_batch_is_one_update_and_names_the_mean_loss(servers: list[ServerCore]) -> None:
    updates = []
    critic, generator = models()
    with alone("dana") as session:
        of_critic, of_generator = adopt(session, critic, adamw(list(critic.parameters()))), None
        of_generator = adopt(session, generator, adamw(list(generator.parameters()), lr=0.03))
        session.epochs = 1
        for number, [x] in enumerate(session.shard(DataLoader(data(), batch_size=BATCH), 0)):
            if number == 0:
                servers[0].on_update = updates.append
            critic(x).mean().backward()
            of_critic.step(loss=1.0)
            if number != 1:
                generator(x[:, :2]).mean().backward()
                of_generator.step(loss=3.0)
        session.finish()
        summary = servers[0].summary()
    assert [update.loss for update in updates] == [2.0, 1.0, 2.0]
    assert [update.samples for update in updates] == [8, 8, 6]
    assert [list(update.lr) for update in updates] == [[0.01, 0.03]] * 3
    assert (summary["updates"], summary["epochs"], summary["skipped_batches"]) == (3, 1.0, 0)
    names = [entry.name for entry in session.optimizer.flat.layout.parameters]
    assert names == [f"{model}.{layer}.{what}" for model in "01" for layer in "02" for what in ("weight", "bias")]


@pytest.mark.parametrize("wraps_both", [True, False])
def test_an_error_in_an_own_step_that_the_script_catches(wraps_both: bool, servers: list[ServerCore]) -> None:
    """That optimizer makes no step on the batch; the other one does."""

    class Failing(torch.optim.Adadelta):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            raise ArithmeticError("no")

    critic, generator = models()
    untouched = copy.deepcopy(generator)
    with alone("baseline") as session:
        of_generator = adopt(session, generator, Failing(generator.parameters()))
        of_critic = adopt(session, critic, sgd(list(critic.parameters()))) if wraps_both else None
        session.epochs = 1
        for [x] in session.shard(DataLoader(data(), batch_size=BATCH), 0):
            generator(x[:, :2]).mean().backward()
            with pytest.raises(ArithmeticError, match="no"):
                of_generator.step()
            of_generator.zero_grad()
            if of_critic is not None:
                critic(x).mean().backward()
                of_critic.step()
        session.finish()
        summary = servers[0].summary()
    assert (summary["updates"], summary["skipped_batches"]) == ((3, 0) if wraps_both else (0, 3))
    for p, q in zip(generator.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_error_in_an_own_step_leaves_the_ranks_in_step() -> None:
    """Rank 0's object makes the step of all ranks. If it fails, no rank has made it, and the next batch goes on."""
    ends: dict[int, Tensor] = {}

    class Failing(torch.optim.Adadelta):
        calls = 0

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            self.calls += 1
            if self.calls == 2:
                raise ArithmeticError("no")
            super().step()

    def story(session: Session, number: int) -> None:
        critic, _ = models()
        failing = Failing(critic.parameters(), lr=0.5)
        optimizer = DistributedOptimizer(failing, critic, session.group, replicated=True)
        session.adopt(optimizer)
        session.epochs, failed = 1, 0
        for [x] in session.shard(DataLoader(data(), batch_size=BATCH), 0):
            optimizer.zero_grad()
            critic(x).mean().backward()
            try:
                optimizer.step()
            except ArithmeticError:
                failed += 1
            optimizer.zero_grad()
        session.finish()
        assert failed == (session.group.rank == 0)
        assert session.worker.metrics.version == 2
        ends[session.group.rank] = torch.cat([p.detach().flatten() for p in critic.parameters()])

    run_world("ssgd", 1, 2, story)
    assert torch.equal(ends[0], ends[1])


@pytest.mark.parametrize("algorithm", ["baseline", "dana"])
def test_a_gradient_that_is_not_finite_is_not_shown_to_the_next_loss(algorithm: str) -> None:
    """Batch norm would keep what it has seen for ever."""
    critic, generator = nn.Sequential(nn.Linear(FEATURES, 2), nn.BatchNorm1d(2)), models()[1]
    with alone(algorithm) as session:
        of_critic = adopt(session, critic, adamw(list(critic.parameters())))
        of_generator = adopt(session, generator, adamw(list(generator.parameters())))
        session.epochs = 1
        for number, [x] in enumerate(session.shard(DataLoader(data(), batch_size=BATCH), 0)):
            of_critic.zero_grad()
            (critic(x).square().mean() * (torch.nan if number == 1 else 1)).backward()
            of_critic.step()
            of_generator.zero_grad()
            critic(generator(x[:, :2])).mean().backward()
            of_generator.step()
        session.finish()
        assert session.worker.metrics.refused_pushes == 1
    assert bool(critic[1].running_mean.any())
    assert all(bool(value.isfinite().all()) for model in (critic, generator) for value in model.state_dict().values())


@pytest.mark.filterwarnings("ignore:the script has 2 optimizers")
def test_a_step_has_the_rate_of_its_own_moment(servers: list[ServerCore]) -> None:
    """The update may be made later, when the loop goes on and the schedule has moved."""
    critic, generator = models()
    updates: list[Update] = []
    with alone("nag-asgd") as session:
        of_critic = adopt(session, critic, sgd(list(critic.parameters())))
        adopt(session, generator, sgd(list(generator.parameters())))
        session.epochs = 1
        for number, [x] in enumerate(session.shard(DataLoader(data(), batch_size=BATCH), 0)):
            servers[0].on_update = updates.append
            of_critic.zero_grad()
            critic(x).mean().backward()
            of_critic.param_groups[0]["lr"] = 0.5 + number
            of_critic.step()
            of_critic.param_groups[0]["lr"] = 99.0
        session.finish()
    assert [update.lr[0] for update in updates] == [0.5, 1.5, 2.5]


def test_own_objects_keep_their_state_sound_and_their_own_rates(servers: list[ServerCore]) -> None:
    """A gradient that is not finite reaches no state, and a rate that an object changes stays changed."""

    class Halving(torch.optim.Adam):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            self.param_groups[0]["lr"] /= 2

    critic, generator = models()
    with alone("ssgd", workers=4, lr_scaling="linear") as session:
        of_critic = adopt(session, critic, Halving(critic.parameters(), lr=0.08))
        of_generator = adopt(session, generator, adamw(list(generator.parameters())))
        session.epochs = 1
        for number, [x] in enumerate(session.shard(DataLoader(data(), batch_size=2), 0)):
            of_critic.zero_grad()
            (critic(x).mean() * (torch.nan if number == 1 else 1)).backward()
            of_critic.step()
            of_generator.zero_grad()
            generator(x[:, :2]).mean().backward()
            of_generator.step()
        session.finish()
    assert of_critic.rates == [0.02]  # it has made two of three steps, of 8 samples each
    for optimizer in (of_critic, of_generator):
        state = optimizer.state_dict()["state"]
        assert all(value.isfinite().all() for row in state.values() for value in row.values())
    assert dict(servers[0].totals.refusals) == {"push is not finite": 1}


@pytest.mark.parametrize("algorithm", ["asgd", "model-averaging", "dana"])
def test_local_steps_of_several_optimizers(algorithm: str) -> None:
    session = Session(Settings(algorithm=algorithm, sync_period=2), RankInfo())
    ours = train_with_danaz(critic_more_often, (adamw, adamw), session, models())
    assert_alike(ours, train_with_torch(critic_more_often, (adamw, adamw)))


@pytest.mark.parametrize("algorithm", ["baseline", "dana"])
def test_two_optimizers_of_one_model(algorithm: str) -> None:
    """As an actor and its critic: one backward, and two steps."""
    ours, theirs = models()[0], models()[0]

    def step(model: nn.Module, first: Any, second: Any, x: Tensor) -> None:
        model.zero_grad()
        model(x).square().mean().backward()
        first.step()
        second.step()

    with alone(algorithm) as session:
        first = adopt(session, ours, adamw(list(ours[0].parameters())))
        second = adopt(session, ours, adamw(list(ours[2].parameters()), lr=0.03))
        session.epochs = 1
        for [x] in session.shard(DataLoader(data(), batch_size=BATCH), 0):
            step(ours, first, second, x)
        session.finish()
        assert [entry.name for entry in first.flat.layout.parameters] == [name for name, _ in ours.named_parameters()]
    first, second = adamw(list(theirs[0].parameters())), adamw(list(theirs[2].parameters()), lr=0.03)
    batching = Batching(SAMPLES, BATCH, shuffle=False)
    for batch in range(batching.batches_per_epoch):
        step(theirs, first, second, data()[batching.indices(batch)][0])
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_schedulers_of_both_follow_the_cluster() -> None:
    critic, generator = models()
    with alone("dana") as session:
        of_critic = adopt(session, critic, adamw(list(critic.parameters())))
        wrapped = adamw(list(generator.parameters()))
        of_generator = adopt(session, generator, wrapped)
        halves = torch.optim.lr_scheduler.StepLR(of_critic, 1, 0.5)
        thirds = torch.optim.lr_scheduler.StepLR(wrapped, 1, 1 / 3)
        session.epochs = 1
        for [x] in session.shard(DataLoader(data(), batch_size=BATCH), 0):
            for model, optimizer, given in ((critic, of_critic, x), (generator, of_generator, x[:, :2])):
                optimizer.zero_grad()
                model(given).mean().backward()
                optimizer.step()
            halves.step()
            thirds.step()
        session.finish()
    assert of_critic.rates == pytest.approx([0.01 / 8])
    assert of_generator.rates == pytest.approx([0.01 / 27])


def test_each_has_its_own_factor_for_the_number_of_workers() -> None:
    """Under ssgd, the rate of SGD grows with N, and that of Adam with the root of N."""
    critic, generator = models()
    with alone("ssgd", workers=4) as session:
        adopt(session, critic, sgd(list(critic.parameters())))
        adopt(session, generator, adamw(list(generator.parameters())))
        next(session.shard(DataLoader(data(), batch_size=BATCH), 0))
        assert session.applied_lr([1.0, 1.0]) == [4.0, 2.0]


# ---- what cannot be -------------------------------------------------------------------------------------------------


def test_kinds_that_one_rule_cannot_carry_out() -> None:
    critic, generator = models()
    with alone("dana") as session:
        adopt(session, critic, sgd(list(critic.parameters())))
        with pytest.raises(UnsupportedOptimizerError, match=r"several kinds \(sgd, adam\).*Make them of one kind"):
            adopt(session, generator, adamw(list(generator.parameters())))


def test_a_parameter_of_two_optimizers_is_refused() -> None:
    critic, _ = models()
    with alone("dana") as session:
        adopt(session, critic, sgd(list(critic.parameters())))
        with pytest.raises(ValueError, match=r"parameter 0\.weight is in two groups"):
            adopt(session, critic, sgd(list(critic[0].parameters())))


def test_an_optimizer_that_comes_after_the_first_batch() -> None:
    critic, generator = models()
    with alone("dana") as session:
        adopt(session, critic, sgd(list(critic.parameters())))
        next(session.shard(DataLoader(data(), batch_size=BATCH), 0))
        with pytest.raises(NotInitializedError, match="after the first batch"):
            adopt(session, generator, sgd(list(generator.parameters())))


def test_passes_of_several_optimizers() -> None:
    critic, generator = models()
    with alone("dana") as session:
        adopt(session, critic, sgd(list(critic.parameters())), passes=2)
        with pytest.raises(UnsupportedOptimizerError, match="backward_passes_per_step is more than 1"):
            adopt(session, generator, sgd(list(generator.parameters())))


@pytest.mark.filterwarnings("ignore:the script has 2 optimizers")
@pytest.mark.parametrize(("algorithm", "may_repeat"), [("dana", True), ("baseline", True), ("dana-zero", False)])
def test_several_steps_of_one_optimizer_on_a_batch(algorithm: str, may_repeat: bool) -> None:
    critic, generator = models()
    with alone(algorithm) as session:
        of_critic = adopt(session, critic, sgd(list(critic.parameters())))
        of_generator = adopt(session, generator, sgd(list(generator.parameters())))
        [x] = next(batches := session.shard(DataLoader(data(), batch_size=BATCH), 0))
        expected = copy.deepcopy(critic)
        theirs = sgd(list(expected.parameters()))
        for _ in range(2):
            for model, optimizer in ((critic, of_critic), (expected, theirs)):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                if not may_repeat and of_critic.joint.was_stepped and model is critic:
                    with pytest.raises(RuntimeError, match="called twice for one batch, before the other"):
                        optimizer.step()
                    return
                optimizer.step()
        generator(x[:, :2]).mean().backward()
        of_generator.step()
        for p, q in zip(critic.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q)
        with pytest.raises(RuntimeError, match="called twice for one batch"):
            of_critic.step()
        batches.close()
