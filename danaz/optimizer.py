"""The user's own torch.optim.SGD, carried out by the cluster."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from danaz.flat import FlatModel
from danaz.schedule import warmup_factor
from danaz.worker.core import Loss
from danaz.worker.group import Group

Push = Callable[[Tensor, list[float], Loss], None]  # (mean gradient f32[P], lr per group, mean loss)

BUCKET_FLOATS = 1 << 20  # 4 MB: long enough to use the wire well, short enough to begin while backward still runs


class UnsupportedOptimizerError(TypeError):
    """An optimizer that DANA cannot stand in for."""


def check_supported(optimizer: torch.optim.Optimizer) -> float:
    """The momentum of an optimizer that danaz can carry out. Raises UnsupportedOptimizerError with the reason."""
    if type(optimizer) is not torch.optim.SGD:
        raise UnsupportedOptimizerError(
            f"danaz carries out torch.optim.SGD, not {type(optimizer).__name__}: the rules it implements are those of "
            "SGD with (Nesterov) momentum."
        )
    for key in ("dampening", "maximize"):
        if any(group[key] for group in optimizer.param_groups):
            raise UnsupportedOptimizerError(f"danaz cannot carry out SGD with {key}: no asynchronous rule has it.")
    momenta = {float(group["momentum"]) for group in optimizer.param_groups}
    if len(momenta) > 1:
        raise UnsupportedOptimizerError(
            f"all parameter groups must have the same momentum, these have {sorted(momenta)}: the server looks ahead "
            "along one sum of velocities."
        )
    if momenta != {0.0} and not all(group["nesterov"] for group in optimizer.param_groups):
        warnings.warn(
            "danaz trains with Nesterov momentum (DANA is built on it); nesterov=False is not kept", stacklevel=3
        )
    return momenta.pop()


class GradientExchange:
    """Averages gradients over the ranks while backward still produces them.

    The flat gradient is cut into buckets of neighbouring parameters; a bucket's sum begins when all its gradients are
    there, always in the same order (last parameters first), which torch.distributed requires.
    """

    def __init__(self, flat: FlatModel, group: Group, passes: int):
        self.flat = flat
        self.group = group
        self.weight = 1.0 / group.size
        self.asks_to_end = False  # this rank
        self.ends = False  # a rank has asked to, which all ranks have heard in the same step
        self._passes = passes
        self._buckets = _buckets(flat)
        self._bucket_of = {i: number for number, bucket in enumerate(self._buckets) for i in bucket}
        self._reset()
        if group.size > 1:
            for index, parameter in enumerate(flat.trained):
                parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]

    def _reset(self) -> None:
        self._seen = [0] * len(self.flat.trained)
        self._missing = [len(bucket) for bucket in self._buckets]
        self._handles: list[Any] = []

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def gradient_is_there(parameter: Tensor) -> None:
            self._seen[index] += 1
            number = self._bucket_of[index]
            if self._seen[index] > self._passes or number < len(self._handles):
                raise RuntimeError(
                    "a gradient was produced again before optimizer.step(), after its sum over the ranks had begun. To "
                    "accumulate K backward passes, give DistributedOptimizer(…, backward_passes_per_step=K)."
                )
            if self._seen[index] == self._passes:
                self._missing[number] -= 1
            while len(self._handles) < len(self._buckets) and not self._missing[len(self._handles)]:
                self._begin_next()

        return gradient_is_there

    def _begin_next(self) -> None:
        number = len(self._handles)
        bucket = self._buckets[number]
        self.flat.gather_gradients(bucket)
        entries = self.flat.layout.parameters
        grads = self.flat.grads[entries[bucket.start].start : entries[bucket.stop - 1].stop]
        # Not a multiplication by zero: what a rank without samples holds may be anything.
        grads.mul_(self.weight) if self.weight else grads.zero_()
        self._handles.append(self.group.sum_async(grads, f"grads.{number}"))

    def finish(self, loss: Loss, lr: list[float]) -> tuple[Loss, list[float]]:
        """Return when the flat gradient is the mean over the batch; returns the batch's mean loss, and rank 0's rates.

        Rank 0's, because the loop of a rank that had no samples now and then has moved its schedule less often.
        """
        if self.group.size == 1:
            self.flat.gather_gradients(range(len(self.flat.trained)))
            return loss, lr
        while len(self._handles) < len(self._buckets):
            self._begin_next()
        share = 0.0 if loss is None else float(loss) * self.weight
        rates = lr if self.group.rank == 0 else [0.0] * len(lr)
        # float32 like the gradients, so that Horovod can sum both in one go.
        flags = [float(loss is not None), float(self.asks_to_end)]
        scalars = torch.tensor([share, *flags, *(part for r in rates for part in _parts(r))])
        self._handles.append(self.group.sum_async(scalars, "scalars"))
        for handle in self._handles:
            self.group.wait(handle)
        self._reset()
        mean_loss, has_loss, asking, *parts = scalars.tolist()
        self.ends = asking > 0
        return mean_loss if has_loss else None, [sum(parts[i : i + 3]) for i in range(0, len(parts), 3)]


def _parts(value: float) -> list[float]:
    """Three float32 that add up to the float64 ``value``: 3 x 24 bits hold its 53."""
    parts = []
    for _ in range(3):
        part = float(np.float32(value))
        parts.append(part)
        value -= part
    return parts


def _buckets(flat: FlatModel) -> list[range]:
    """Ranges of parameter numbers, from the last parameters to the first."""
    buckets, stop, floats = [], len(flat.trained), 0
    for index in reversed(range(len(flat.trained))):
        floats += flat.trained[index].numel()
        if floats >= BUCKET_FLOATS or index == 0:
            buckets.append(range(index, stop))
            stop, floats = index, 0
    return buckets


class DistributedOptimizer(torch.optim.Optimizer):
    """Stands in for the SGD optimizer it wraps; lr, momentum, weight decay and groups are read from it at each step.

    ``step()`` averages the gradient over this worker's ranks, pushes it, and puts the next view into the model. It
    takes ``loss=`` (the mean over this rank's samples) for the run's records. torch's learning-rate schedulers work
    on either optimizer.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        group: Group,
        backward_passes_per_step: int = 1,
    ):
        """Raises UnsupportedOptimizerError, and ValueError for parameters that danaz cannot train."""
        self.momentum = check_supported(optimizer)
        self.flat = FlatModel(model, [group["params"] for group in optimizer.param_groups])
        self.exchange = GradientExchange(self.flat, group, backward_passes_per_step)
        self._wrapped = optimizer
        self._push: Push | None = None
        self._synchronized: tuple[Loss, list[float]] | None = None  # mean loss, lr per group
        super().__init__(optimizer.param_groups, optimizer.defaults)

    @property
    def has_schedule(self) -> bool:
        """Whether a learning-rate scheduler of torch's moves the rates: it notes the first rate in every group."""
        return any("initial_lr" in group for group in self.param_groups)

    def connect(self, push: Push) -> None:
        """Send what ``step`` produces to ``push``."""
        self._push = push

    def synchronize(self, loss: float | Tensor | None = None) -> None:
        """Wait for the mean gradient, to look at or clip it before ``step()``."""
        if self._synchronized is None:
            lr = [float(group["lr"]) for group in self.param_groups]
            self._synchronized = self.exchange.finish(kept_loss(loss), lr)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None) -> Any:
        """One update of this worker. Returns the closure's result, if one is given."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = loss = closure()
        if self._push is None:
            raise RuntimeError(
                "optimizer.step() outside of danaz.shard: iterate `for batch in danaz.shard(loader, epoch)`"
            )
        self.synchronize(loss)
        assert self._synchronized is not None
        (mean_loss, lr), self._synchronized = self._synchronized, None
        self.flat.gather_gradients(range(len(self.flat.trained)))  # those that the user has replaced since
        self._push(decayed_gradient(self.flat, self.param_groups), lr, mean_loss)
        # A scheduler made for the wrapped optimizer asks whether that one has stepped.
        self._wrapped._opt_called = True  # type: ignore[attr-defined]
        return result

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        super().zero_grad(set_to_none)


def kept_loss(loss: Loss) -> Loss:
    """The loss as it is now. One on a GPU is read later: to wait for it is to wait for all of backward."""
    if not isinstance(loss, Tensor):
        return loss
    return loss.item() if loss.device.type == "cpu" else loss.detach().to(torch.float64, copy=True)


def weight_decays(param_groups: Sequence[dict[str, Any]]) -> tuple[float, ...]:
    """β of each parameter group."""
    return tuple(float(group["weight_decay"]) for group in param_groups)


@torch.no_grad()
def decayed_gradient(flat: FlatModel, param_groups: Sequence[dict[str, Any]]) -> Tensor:
    """g + wθ̂ f32[P], group by group; the flat gradient itself stays as it is, for loops that accumulate gradients."""
    decays = weight_decays(param_groups)
    if not any(decays):
        return flat.grads
    for decay, (start, stop) in zip(decays, flat.layout.groups, strict=True):
        out = flat.decayed[start:stop]
        torch.add(flat.grads[start:stop], flat.params[start:stop], alpha=decay, out=out)
    return flat.decayed


def effective_lr(
    lr: Sequence[float], *, epoch: float, workers: int, warmup_epochs: float, scales_lr: bool
) -> list[float]:
    """The user's rates as the cluster applies them: warmed up and, for SSGD, scaled with the number of workers."""
    factor = warmup_factor(epoch, workers, warmup_epochs) * (workers if scales_lr else 1)
    return [rate * factor for rate in lr]
