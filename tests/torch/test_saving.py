"""danaz.save and danaz.load: files that plain torch reads, and goes on from; and the other way round."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from loops import adopt, alone, assert_same, make_net
from ranks import ThreadGroup, on_each_rank
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from danaz.run.settings import RankInfo, Settings
from danaz.server.settings import ServerSettings
from danaz.torch.loop import LoopError
from danaz.torch.optimizer import UnsupportedOptimizerError
from danaz.torch.saving import SavedFileError
from danaz.torch.session import Session
from scripts import ScriptCluster

STEPS = 6
Make = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def nothing_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/files/test_atomic.py shows that files are synced to the disk; here it would only take time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 3, 5, 5, generator=generator), torch.randn(4, 2, generator=generator)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x, y = batch(step)
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    optimizer.step()


def torch_alone(make: Make, steps: range, model: nn.Module | None = None, state: Any = None) -> nn.Module:
    model = model or make_net()
    optimizer = make(model)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        train_step(model, optimizer, step)
    return model


def two_groups(kind: type[torch.optim.Optimizer], first: dict[str, Any], **others: Any) -> Make:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        parts = [{"params": list(model.last.parameters()), **first}, {"params": list(model.convolution.parameters())}]
        return kind(parts, **others)  # type: ignore[call-arg]

    return make


MAKE: dict[str, Make] = {
    "sgd": two_groups(torch.optim.SGD, {"lr": 0.2, "weight_decay": 0.1}, lr=0.1, momentum=0.8, nesterov=True),
    "adam": two_groups(torch.optim.Adam, {"betas": (0.5, 0.9), "amsgrad": True}, lr=0.01, amsgrad=True),
    "adamw": two_groups(torch.optim.AdamW, {"lr": 0.02}, lr=0.01, weight_decay=0.3),
    "nadam": two_groups(torch.optim.NAdam, {"momentum_decay": 0.1}, lr=0.01),
    "rmsprop": two_groups(torch.optim.RMSprop, {"lr": 0.02}, lr=0.01, momentum=0.7, centered=True),
    "adagrad": two_groups(torch.optim.Adagrad, {"lr": 0.2}, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2),
}
LOOKS_AHEAD = ("sgd", "nadam")  # torch's own class computes gradients where danaz does, under every algorithm
WHERE_TORCH_STEPS = [
    *((name, "ssgd") for name in MAKE),
    *((name, algorithm) for name in LOOKS_AHEAD for algorithm in ("baseline", "dana", "dana-zero", "multi-asgd")),
    ("adagrad", "dana"),
    ("adagrad", "baseline"),
]


def begin(session: Session, make: Make, path: Path | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make_net()
    optimizer = adopt(session, model, make(model))
    if path is not None:
        with torch.no_grad():
            model.last.bias.fill_(7.0)
        session.load(path)
    return model, optimizer


def save_after(steps: int, make: Make, algorithm: str, path: Path, at_the_end: bool = False) -> None:
    with alone(algorithm) as session:
        model, optimizer = begin(session, make)
        for step in session.run_steps(steps if at_the_end else 100, 4):
            train_step(model, optimizer, step)
            if step == steps - 1 and not at_the_end:
                session.save(path, {"note": "in mid-run"})
                session.stop("enough")
        if at_the_end:
            session.save(path, {"note": "at the end"})


@pytest.mark.parametrize(
    ("name", "algorithm", "at_the_end"),
    [(*each, False) for each in WHERE_TORCH_STEPS] + [("sgd", "dana", True), ("nadam", "baseline", True)],
)
def test_plain_torch_goes_on_from_the_file(name: str, algorithm: str, at_the_end: bool, tmp_path: Path) -> None:
    save_after(STEPS, MAKE[name], algorithm, tmp_path / "saved.pt", at_the_end)
    content = torch.load(tmp_path / "saved.pt", weights_only=True)
    model = make_net()
    model.load_state_dict(content["model"])
    torch_alone(MAKE[name], range(STEPS, 2 * STEPS), model, content["optimizer"])
    assert_same(model, torch_alone(MAKE[name], range(2 * STEPS)), name=name)


@pytest.mark.parametrize("name", list(MAKE))
def test_the_state_is_the_one_that_torch_has(name: str, tmp_path: Path) -> None:
    save_after(STEPS, MAKE[name], "ssgd", tmp_path / "saved.pt")
    ours = torch.load(tmp_path / "saved.pt", weights_only=True)["optimizer"]
    model = make_net()
    optimizer = MAKE[name](model)
    for step in range(STEPS):
        train_step(model, optimizer, step)
    theirs = optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for number, row in theirs["state"].items():
        assert ours["state"][number].keys() == row.keys()
        for key, value in row.items():
            torch.testing.assert_close(ours["state"][number][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "algorithm", "source"),
    [(*each, "danaz") for each in WHERE_TORCH_STEPS]
    + [("sgd", "dana", "plain torch"), ("adamw", "ssgd", "plain torch")],
)
def test_a_new_run_goes_on_from_what_torch_or_danaz_has_saved(
    name: str, algorithm: str, source: str, tmp_path: Path
) -> None:
    make, path = MAKE[name], tmp_path / "saved.pt"
    save_after(STEPS, make, algorithm, path)
    with alone(algorithm) as session:
        model, optimizer = begin(session, make, path if source == "danaz" else None)
        if source == "plain torch":
            plain = make_net()
            theirs = make(plain)
            for step in range(STEPS):
                train_step(plain, theirs, step)
            model.load_state_dict(plain.state_dict())
            optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for step in session.run_steps(100, 4):
            train_step(model, optimizer, STEPS + step)
            if step == STEPS - 1:
                session.save(tmp_path / "later.pt", {})
                session.stop("enough")
    model.load_state_dict(torch.load(tmp_path / "later.pt", weights_only=True)["model"])
    assert_same(model, torch_alone(make, range(2 * STEPS)), name=name)


@pytest.mark.parametrize("algorithm", ["dana", "baseline"])
def test_adam_goes_on_as_in_a_run_of_one_piece(algorithm: str, tmp_path: Path) -> None:
    """Its parameters in the file are torch's, without the look-ahead that danaz trains at."""

    def train(session: Session, steps: range, path: Path | None = None) -> nn.Module:
        model, optimizer = begin(session, MAKE["adamw"], path)
        for step in session.run_steps(len(steps), 4):
            train_step(model, optimizer, steps[step])
        return model

    save_after(STEPS, MAKE["adamw"], algorithm, tmp_path / "saved.pt")
    with alone(algorithm) as session:
        resumed = train(session, range(STEPS, 2 * STEPS), tmp_path / "saved.pt")
    with alone(algorithm) as session:
        whole = train(session, range(2 * STEPS))
    tolerance = 1e-5 if algorithm == "dana" else 2e-3  # baseline computes its first gradient at torch's parameters
    assert_same(resumed, whole, tolerance)


# ---- several ranks and workers ---------------------------------------------------------------------------------------


def test_all_ranks_of_an_all_reduce_world_begin_with_rank_0s_state(tmp_path: Path) -> None:
    save_after(STEPS, MAKE["adamw"], "ssgd", tmp_path / "saved.pt")

    def work(group: ThreadGroup) -> list[Tensor]:
        session = Session(Settings("ssgd", workers=1), RankInfo(), group)
        model, optimizer = begin(session, MAKE["adamw"], None if group.rank else tmp_path / "saved.pt")
        for step in session.run_steps(STEPS, 4):
            train_step(model, optimizer, STEPS + step)
        return [*model.state_dict().values()]

    models = on_each_rank(2, work)
    expected = list(torch_alone(MAKE["adamw"], range(2 * STEPS)).state_dict().values())
    for model in models:
        if isinstance(model, BaseException):
            raise model
        for ours, theirs in zip(model, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("algorithm", "has_state"), [("dana", True), ("dana-zero", False), ("easgd", False)])
def test_only_the_main_process_of_a_cluster_writes_and_says_what_it_has(
    algorithm: str, has_state: bool, tmp_path: Path
) -> None:
    cluster = ScriptCluster(ServerSettings(algorithm, workers=2))
    loaded = []

    def story(session: Session, number: int) -> None:
        model, optimizer = begin(session, MAKE["sgd"])
        for step in session.run_steps(STEPS, 4):
            train_step(model, optimizer, step)
        session.save(tmp_path / f"{number}-{session.group.rank}.pt", {"best": torch.ones(2)})
        if number == 0 and session.group.rank == 0:
            loaded.append(session.load(tmp_path / "0-0.pt"))

    cluster.worker(0, story, ranks=2)
    cluster.worker(1, story)
    cluster.run()
    assert [path.name for path in tmp_path.iterdir()] == ["0-0.pt"]
    [saved] = loaded
    assert (saved.has_optimizer_state, saved.progress, saved.version > 0) == (has_state, 1.0, True)
    assert (saved.algorithm, saved.extra["best"].tolist()) == (algorithm, [1.0, 1.0])


def test_a_worker_whose_server_keeps_the_state_says_that_it_begins_without(tmp_path: Path) -> None:
    save_after(STEPS, MAKE["sgd"], "ssgd", tmp_path / "saved.pt")
    said: list[str] = []
    cluster = ScriptCluster(ServerSettings("dana-zero", workers=1))

    def story(session: Session, number: int) -> None:
        model, optimizer = begin(session, MAKE["sgd"], tmp_path / "saved.pt")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in session.run_steps(2, 4):
                train_step(model, optimizer, step)
        said.extend(str(each.message) for each in caught)

    cluster.worker(0, story)
    cluster.run()
    assert any("under dana-zero it is on the server" in each for each in said)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_file_says_where_the_run_was_and_what_the_script_added(tmp_path: Path) -> None:
    extra = {"accuracy": 0.5, "classes": ["a", "b"], "nested": {"pair": (1, None)}, "mean": torch.ones(2)}
    path = tmp_path / "saved.pt"
    with alone("dana") as session:
        session.choose_seed(5)
        model, optimizer = begin(session, MAKE["sgd"])
        session.save(path, {})
        first = torch.load(path, weights_only=True)
        assert (first["danaz"]["version"], first["optimizer"]["state"]) == (0, {})
        for step in session.run_steps(4, 4):
            train_step(model, optimizer, step)
            if step == 1:
                session.save(path, extra)
                refused = pytest.raises(LoopError, match=r"danaz\.load was called in mid-run")
                with refused:
                    session.load(path)
        trained = model.last.weight.clone()
        saved = session.load(path)
    assert not torch.equal(model.last.weight, trained)
    assert (saved.version, saved.progress, saved.epoch, saved.seed) == (2, 0.5, 0, 5)
    assert saved.extra.keys() == extra.keys()
    assert saved.extra["nested"] == extra["nested"]
    assert [path.name for path in tmp_path.iterdir()] == ["saved.pt"], "nothing is left of the part that was written"


def test_what_is_not_saved_is_said(tmp_path: Path) -> None:
    path = tmp_path / "saved.pt"
    with alone("dana") as session:
        begin(session, MAKE["sgd"])
        with pytest.raises(TypeError, match=r"extra\['options'\]\[1\], a set, which torch.load"):
            session.save(path, {"options": [1, {2}]})
        with pytest.raises(FileNotFoundError, match=r"nowhere/saved\.pt"):
            session.save(tmp_path / "nowhere" / "saved.pt", {})
        assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"not a file of torch", {"model": {}}, [1, 2]])
def test_another_file_is_refused_by_name(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with alone("dana") as session:
        begin(session, MAKE["sgd"])
        with pytest.raises(SavedFileError, match=r"other\.pt was not written by danaz\.save"):
            session.load(path)
        with pytest.raises(FileNotFoundError):
            session.load(tmp_path / "missing.pt")


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_after(STEPS, MAKE["adam"], "ssgd", tmp_path / "saved.pt")
    with alone("dana") as session, pytest.raises(ValueError, match=r"has momentum_buffer of last\.weight missing"):
        begin(session, MAKE["sgd"], tmp_path / "saved.pt")
    with alone("dana") as session:
        model, optimizer = begin(session, MAKE["adam"])
        for step in session.run_steps(2, 4):
            train_step(model, optimizer, step)
            with pytest.raises(UnsupportedOptimizerError, match="when training had begun"):
                optimizer.load_state_dict(torch.load(tmp_path / "saved.pt", weights_only=True)["optimizer"])


# ---- several models and optimizers -----------------------------------------------------------------------------------


def two_nets() -> list[nn.Module]:
    torch.manual_seed(3)
    return [nn.Sequential(nn.Flatten(), nn.Linear(75, 2)), nn.Sequential(nn.Flatten(), nn.Linear(75, 2, bias=False))]


def step_both(models: list[nn.Module], optimizers: list[torch.optim.Optimizer], step: int) -> None:
    x, y = batch(step)
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()


def make_both(models: list[nn.Module]) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=True)
        for model, lr, momentum in zip(models, (0.1, 0.05), (0.9, 0.5), strict=True)
    ]


@pytest.mark.parametrize("algorithm", ["baseline", "ssgd", "dana", "dana-zero"])
@pytest.mark.filterwarnings("ignore:the script has 2 optimizers")  # their losses have nothing to do with each other
def test_several_models_and_optimizers(algorithm: str, tmp_path: Path) -> None:
    path, expected, continued = tmp_path / "saved.pt", two_nets(), two_nets()
    of_expected = make_both(expected)
    for step in range(2 * STEPS):
        step_both(expected, of_expected, step)
    for begins in (0, STEPS):
        with alone(algorithm) as session:
            models = two_nets()
            optimizers = [adopt(session, *pair) for pair in zip(models, make_both(models), strict=True)]
            if begins:
                session.load(path)
            for step in session.run_steps(100, 4):
                step_both(models, optimizers, begins + step)
                if step == STEPS - 1:
                    session.save(path if not begins else tmp_path / "second.pt", {})
                    session.stop("enough")
    first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("saved.pt", "second.pt"))
    assert [len(content[part]) for content in (first, second) for part in ("model", "optimizer")] == [2, 2, 2, 2]
    of_continued = make_both(continued)
    for model, optimizer, *saved in zip(continued, of_continued, first["model"], first["optimizer"], strict=True):
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    for step in range(STEPS, 2 * STEPS):
        step_both(continued, of_continued, step)
    for model, plain, saved in zip(expected, continued, second["model"], strict=True):
        assert_same(plain, model)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=1e-6)


def test_a_file_of_more_models_than_the_script_has_is_refused(tmp_path: Path) -> None:
    with alone("ssgd") as session:
        models = two_nets()
        for pair in zip(models, make_both(models), strict=True):
            adopt(session, *pair)
        session.save(tmp_path / "saved.pt", {})
    with alone("ssgd") as session:
        model = two_nets()[0]
        adopt(session, model, torch.optim.SGD(model.parameters(), lr=0.1))
        with pytest.raises(SavedFileError, match="holds 2 models, and this script has 1"):
            session.load(tmp_path / "saved.pt")


# ---- what the script itself has put into the model -------------------------------------------------------------------


def fill(model: nn.Module, value: float, replaces_memory: bool) -> None:
    for p in model.parameters():
        filled = torch.full_like(p.data, value)
        if replaces_memory:
            p.data = filled
        else:
            p.data.copy_(filled)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("replaces_memory", [True, False])
@pytest.mark.parametrize("evaluates", [True, False])
def test_the_file_has_what_the_script_put_there(
    kind: torch.dtype, replaces_memory: bool, evaluates: bool, tmp_path: Path
) -> None:
    """Within an evaluation, such as averaged parameters, they are no view that the momentum has moved."""
    model = nn.Linear(2, 1).to(kind)
    with alone("dana") as session:
        make = torch.optim.AdamW if evaluates else torch.optim.SGD
        options = {} if evaluates else {"momentum": 0.9, "nesterov": True}
        optimizer = adopt(session, model, make(model.parameters(), lr=0.1, **options))
        for _ in session.run_steps(3, 4):
            optimizer.zero_grad()
            mse_loss(model(torch.ones(4, 2, dtype=kind)), torch.zeros(4, 1, dtype=kind)).backward()
            optimizer.step()
            with session.evaluating(model, "view", False) if evaluates else nullcontext():
                fill(model, 3.0, replaces_memory)
                session.save(tmp_path / "saved.pt", {})
            saved = torch.load(tmp_path / "saved.pt", weights_only=True)["model"]
            assert all(value.dtype == kind and bool((value == 3.0).all()) for value in saved.values())
