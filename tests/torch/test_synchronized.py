"""SyncBatchNorm over ranks of threads: the statistics, gradients and buffers of the whole batch, however it is cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ThreadGroup, ThreadWorld, on_each_rank
from torch import Tensor, nn

from danaz.torch.models import has_batch_norm
from danaz.torch.synchronized import Channel, SyncBatchNorm, synchronize
from danaz.worker.group import SoloGroup

CPU = torch.device("cpu")


def model(kind: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 3, 2), kind(3, **options), nn.Tanh(), nn.Conv2d(3, 2, 1), kind(2, **options))


def loss(of: nn.Module, x: Tensor) -> Tensor:
    return (of(x) * torch.linspace(-1, 1, 18).reshape(2, 3, 3)).square().sum((1, 2, 3)).mean()


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}])
@pytest.mark.parametrize("parts", [(4, 4), (5, 2, 1), (3, 0)])
def test_it_is_batch_norm_of_the_whole_batch(parts: tuple[int, ...], options: dict[str, Any]) -> None:
    """A rank without samples computes on one of another rank, with weight zero."""
    x = 3 + torch.randn(sum(parts), 2, 4, 4, generator=torch.Generator().manual_seed(2))
    models = [model(nn.SyncBatchNorm, **options) for _ in parts]
    cuts = torch.cat([x, x[:1]]).split([*parts, 1])

    def work(group: ThreadGroup) -> list[Tensor]:
        mine, own = models[group.rank], cuts[group.rank] if parts[group.rank] else x[:1]
        channel = synchronize(mine, group, CPU)
        assert channel is not None
        channel.weight = parts[group.rank] / len(x)
        for _ in range(2):
            loss(mine, own).backward()
        channel.meet()
        return [channel.weight * p.grad for p in mine.parameters()]

    results = on_each_rank(len(parts), work)
    whole = model(nn.BatchNorm2d, **options)
    for _ in range(2):
        loss(whole, x).backward()
    for error in (each for each in results if isinstance(each, BaseException)):
        raise error
    for number, p in enumerate(whole.parameters()):
        summed = sum(each[number] for each in results if isinstance(each, list))
        torch.testing.assert_close(summed, p.grad, rtol=1e-4, atol=1e-5)
    for mine in models:
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(mine.get_buffer(name), buffer)
        torch.testing.assert_close(mine.eval()(x), whole.eval()(x), rtol=1e-4, atol=1e-5)


def test_ranks_that_are_elsewhere() -> None:
    """One rank has skipped the backward, and one computes nothing at all; the first is not held up."""
    models, x = [model(nn.SyncBatchNorm) for _ in range(3)], torch.randn(4, 2, 4, 4)

    def work(group: ThreadGroup) -> bool:
        channel = synchronize(models[group.rank], group, CPU)
        assert channel is not None
        if group.rank < 2:
            value = loss(models[group.rank], x[2 * group.rank : 2 * group.rank + 2])
            if group.rank == 0:
                value.backward()
        channel.meet()
        return True

    assert on_each_rank(3, work) == [True] * 3
    assert all(p.grad.isfinite().all() for p in models[0].parameters())
    assert torch.equal(models[0][1].running_mean, models[1][1].running_mean)


def test_ranks_in_different_layers_are_told_so() -> None:
    def work(group: ThreadGroup) -> None:
        Channel(group, 4, CPU).gather(1 + group.rank, torch.ones(3, dtype=torch.float64))

    for error in on_each_rank(2, work):
        assert isinstance(error, RuntimeError)
        assert "different layers of SyncBatchNorm" in str(error)


def test_a_batch_of_one_value_is_refused_as_in_torch() -> None:
    layers = [nn.Sequential(nn.SyncBatchNorm(3)) for _ in range(2)]

    def work(group: ThreadGroup) -> None:
        channel = synchronize(layers[group.rank], group, CPU)
        assert channel is not None
        channel.weight = 1.0 - group.rank
        layers[group.rank](torch.ones(1, 3))

    for error in on_each_rank(2, work):
        assert isinstance(error, ValueError)
        assert "more than 1 value for each channel in training, got 1 in all" in str(error)


def test_half_precision_is_normalized_in_float32() -> None:
    models = [model(nn.SyncBatchNorm).bfloat16() for _ in range(2)]
    x = 100 + torch.randn(4, 2, 4, 4).bfloat16()

    def work(group: ThreadGroup) -> Tensor:
        assert synchronize(models[group.rank], group, CPU) is not None
        y = models[group.rank](x[2 * group.rank : 2 * group.rank + 2])
        y.float().square().mean().backward()
        return y

    for y in on_each_rank(2, work):
        assert isinstance(y, Tensor)
        assert y.dtype == torch.bfloat16
        assert y.isfinite().all()
    assert all(p.grad.dtype == torch.bfloat16 for p in models[0].parameters())


def test_copies_and_what_is_saved_are_torchs(tmp_path: Path) -> None:
    group = ThreadWorld(2).groups[0]
    ours = model(nn.SyncBatchNorm)
    synchronize(ours, group, CPU)
    assert isinstance(ours[1], SyncBatchNorm)
    torch.save(ours, tmp_path / "model")
    for other in (copy.deepcopy(ours), torch.load(tmp_path / "model", weights_only=False)):
        assert type(other[1]) is nn.SyncBatchNorm
        assert torch.equal(other[1].running_var, ours[1].running_var)
    alone = model(nn.SyncBatchNorm)
    assert synchronize(alone, SoloGroup(), CPU) is None
    assert type(alone[1]) is nn.SyncBatchNorm


def test_synchronized_layers_need_no_second_sample_on_a_rank() -> None:
    assert has_batch_norm(model(nn.BatchNorm2d))
    assert not has_batch_norm(model(nn.SyncBatchNorm))
