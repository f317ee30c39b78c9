"""Batch norm whose statistics are those of all ranks that share a batch: torch.nn.SyncBatchNorm, on any collective.

torch's own layer works on GPUs and torch.distributed alone, counts a rank's gradient like every other's, and hangs if
the ranks do not run it equally often. In danaz a rank's part of a batch has a weight, and a rank may skip a batch or
leave the run while the others are in the middle of a forward or backward. So a rank that is at the end of its batch
takes part in the statistics of the others, with no samples, until all have come there.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from danaz.worker.group import Group, apart

HEAD = 2  # number of figures in a rank's row of a table before its own: whether it has arrived, and its layer


class Channel:
    """What the synchronized layers of a model tell each other, from rank to rank.

    In each exchange every rank adds a row to a table. The rank is in a layer, forward or backward, or it has arrived at
    the end of a batch and waits there.
    """

    def __init__(self, group: Group, width: int, device: torch.device):
        """``width`` is the largest number of figures that a layer has to say."""
        self.weight = 1.0 / group.size  # this rank's share of the batch
        self._group = apart(group)
        self._table = torch.zeros(group.size, HEAD + width, dtype=torch.float64, device=device)

    def gather(self, layer: int, figures: Tensor) -> Tensor:
        """Return the figures f64[ranks, n] of all ranks, given those f64[n] of this one; zeros for one that waits.

        Every pass through a layer has a number, from 1. Raises RuntimeError if another rank is in another one.
        """
        table = self._exchange(torch.tensor([0.0, layer]), figures)
        there = {int(number) for waits, number in table[:, :HEAD].tolist() if not waits}
        if there != {layer}:
            raise RuntimeError(
                "the ranks of this worker are in different layers of SyncBatchNorm. All ranks must compute the same "
                "layers in the same order; use BatchNorm in parts of the model that only some batches use."
            )
        return table[:, HEAD : HEAD + len(figures)]

    def meet(self) -> None:
        """Return when all ranks have come here."""
        while not bool((self._exchange(torch.tensor([1.0, 0.0]), None)[:, 0] > 0).all()):
            pass

    def _exchange(self, head: Tensor, figures: Tensor | None) -> Tensor:
        row = self._table.zero_()[self._group.rank]
        row[:HEAD] = head
        if figures is not None:
            row[HEAD : HEAD + len(figures)] = figures
        self._group.wait(self._group.sum_async(self._table, "sync_batch_norm"))
        return self._table


class SyncBatchNorm(nn.SyncBatchNorm):
    """torch's layer, with statistics over the ranks of a danaz worker. A copy of it, and what is saved, is torch's."""

    def forward(self, input: Tensor) -> Tensor:
        connection = _connections.get(self)
        if not self.training or connection is None:
            return nn.modules.batchnorm._BatchNorm.forward(self, input)
        self._check_input_dim(input)
        channel, number = connection
        found = _statistics(channel, 2 * number - 1, input)
        if found.count < 2:
            raise ValueError(f"expected more than 1 value for each channel in training, got {found.count:g} in all")
        if self.track_running_stats:
            self._track(found.mean, found.variance * (found.count / (found.count - 1)))
        normalized: Tensor = _Normalize.apply(input, self.weight, self.bias, found, self.eps, channel, 2 * number)
        return normalized

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), factor)
        self.running_var.lerp_(variance.to(self.running_var), factor)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self).__new__, (nn.SyncBatchNorm,), self.__dict__


_connections: weakref.WeakKeyDictionary[nn.Module, tuple[Channel, int]] = weakref.WeakKeyDictionary()


def synchronize(model: nn.Module, group: Group, device: torch.device) -> Channel | None:
    """Let the model's layers of SyncBatchNorm, torch's or Horovod's, work over ``group``; None if it has none.

    The layers stay the same objects. In a world of one rank they stay as they are.
    """
    layers = [each for each in model.modules() if is_synchronized(each)]
    if not layers or group.size == 1:
        return None
    channel = Channel(group, 1 + 2 * max(int(layer.num_features) for layer in layers), device)  # type: ignore[arg-type]
    for number, layer in enumerate(layers, start=1):
        layer.__class__ = SyncBatchNorm
        vars(layer)["process_group"] = None
        _connections[layer] = (channel, number)
    return channel


def is_synchronized(module: nn.Module) -> bool:
    """Return whether this is a layer of SyncBatchNorm, of torch, Horovod or danaz."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module).__name__ == "SyncBatchNorm"


@dataclass(frozen=True)
class _Statistics:
    """What the input of a layer looks like over all ranks."""

    mean: Tensor  # f[C]
    variance: Tensor  # f[C], of these values, not of what they are drawn from
    count: float  # number of values of each channel


@torch.no_grad()
def _statistics(channel: Channel, layer: int, x: Tensor) -> _Statistics:
    """Return the statistics of ``x`` over all ranks.

    Each rank's own mean and sum of squared deviations are joined as Chan et al. do (1983), without cancellation. A rank
    without samples of its own does not count; if no rank has any, this one counts alone.
    """
    values = _wide(x).transpose(0, 1).flatten(1)  # f[C, n]
    count = values.shape[1]
    mean = values.mean(1)
    squares = (values - mean[:, None]).square().sum(1)
    own = torch.cat([mean.new_tensor([count]), mean, squares]).double()
    rows = channel.gather(layer, own if channel.weight else torch.zeros_like(own)).clone()
    if not bool(rows[:, 0].any()):
        rows[0] = own
    counts, means, squares = rows[:, :1], rows[:, 1 : 1 + len(mean)], rows[:, 1 + len(mean) :]
    total = counts.sum()
    joined = (counts * means).sum(0) / total
    variance = (squares + counts * (means - joined).square()).sum(0) / total
    return _Statistics(joined.to(values), variance.to(values), float(total))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Normalize(torch.autograd.Function):
    """y = γ(x − mean)·slope + β with slope = 1/√(variance + ε), where mean and variance are those of all ranks' x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        found: _Statistics,
        eps: float,
        channel: Channel,
        layer: int,
    ) -> Tensor:
        mean, slope = found.mean, torch.rsqrt(found.variance + eps)
        ctx.save_for_backward(x, weight, mean, slope)
        ctx.total, ctx.channel, ctx.layer = found.count, channel, layer
        shape = [1, -1, *[1] * (x.dim() - 2)]
        y = (_wide(x) - mean.view(shape)) * slope.view(shape)
        if weight is not None and bias is not None:
            y = y * weight.view(shape).to(y) + bias.view(shape).to(y)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The loss of the whole batch is Σ wᵣLᵣ, and ``grad`` is that of this rank's own Lᵣ, as autograd has it.

        The way over mean and slope leads to all ranks: there the other ranks' gradients count by their weights. danaz
        multiplies by wᵣ after backward, so the sums are divided by it here.
        """
        x, weight, mean, slope = ctx.saved_tensors
        channel: Channel = ctx.channel
        shape, over = [1, -1, *[1] * (x.dim() - 2)], [0, *range(2, x.dim())]
        grad = _wide(grad)
        normal = (_wide(x) - mean.view(shape)) * slope.view(shape)
        of_bias, of_weight = grad.sum(over), (grad * normal).sum(over)
        scaled = grad if weight is None else grad * weight.view(shape).to(grad)
        factor = 1.0 if weight is None else weight.to(grad)
        own = torch.cat([of_bias * factor, of_weight * factor]).double() * channel.weight
        sums = channel.gather(ctx.layer, own).sum(0)
        if channel.weight:
            sums = sums.to(grad) / (ctx.total * channel.weight)
            along_mean, along_slope = sums[: len(mean)].view(shape), sums[len(mean) :].view(shape)
            of_x = (scaled - along_mean - normal * along_slope) * slope.view(shape)
        else:
            of_x = torch.zeros_like(grad)
        if weight is None:
            return of_x.to(x.dtype), *[None] * 6
        return of_x.to(x.dtype), of_weight.to(weight), of_bias.to(weight), *[None] * 4
