"""Which of danaz' optimizers carries out the user's torch optimizer, and what its options mean for a gradient."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from danaz.optimizers import Adagrad, Adam, NAdam, Optimizer, OptimizerError, Optimizers, Own, RMSprop, Sgd
from danaz.vectors.model import FlatModel

Group = Mapping[str, Any]  # one of torch's param_groups


class UnsupportedOptimizerError(TypeError):
    """An optimizer, or an option of one, that no algorithm of danaz can carry out."""


def optimizers_of(optimizer: torch.optim.Optimizer) -> Optimizers:
    """Return the optimizer of each parameter group; a class that danaz does not know is Own.

    Implementations of the same mathematics (foreach, fused, capturable) make no difference here. The learning rate,
    weight decay that is added to the gradient, and maximize are not part of the result: they are read at each step.
    Raises UnsupportedOptimizerError for an option that no algorithm can carry out.
    """
    kind = type(optimizer)
    if kind is torch.optim.SparseAdam:
        raise UnsupportedOptimizerError(
            "SparseAdam makes steps on sparse gradients alone, and danaz makes them dense, because it sums and pushes "
            "whole vectors. Use torch.optim.Adam, which also moves the rows that a batch has not looked up."
        )
    if kind not in _READERS:
        return Optimizers([Own(kind.__name__)])
    groups = optimizer.param_groups
    if any(group.get("dampening") for group in groups):
        raise UnsupportedOptimizerError(
            "danaz cannot carry out SGD with dampening, because no asynchronous rule has it: make it without."
        )
    if any(group.get("differentiable") for group in groups):
        raise UnsupportedOptimizerError("danaz cannot differentiate through a step: make differentiable=False.")
    try:
        found = Optimizers(_READERS[kind](group) for group in groups)
    except OptimizerError as error:
        raise UnsupportedOptimizerError(f"{kind.__name__}: {error}") from None
    return found


def together(each: Sequence[Optimizers], *, make_own_steps: bool) -> Optimizers:
    """Return the optimizers of all parameter groups of several torch optimizers, in this order.

    If they ``make_own_steps``, they may be of any kind, as they must be if danaz does not know one of them. Raises
    UnsupportedOptimizerError for optimizers of several kinds whose steps a rule is to make.
    """
    if len(each) == 1:
        return each[0]
    firsts = [found[0] for found in each]
    names = list(dict.fromkeys(one.class_name if isinstance(one, Own) else one.name for one in firsts))
    if make_own_steps or any(isinstance(one, Own) for one in firsts):
        return Optimizers([Own(" and ".join(names))])
    if len(names) > 1:
        raise UnsupportedOptimizerError(
            f"the script has optimizers of several kinds ({', '.join(names)}), and this algorithm carries out one kind "
            "in a run. Make them of one kind; each may have its own rates and other options. Under ssgd, and in a "
            "process that runs alone, they may be of any kinds."
        )
    return Optimizers(optimizer for found in each for optimizer in found)


def warn_if_not_nesterov(optimizer: torch.optim.Optimizer) -> None:
    """Warn about an SGD momentum without nesterov=True: what danaz trains with is Nesterov's."""
    if any(group["momentum"] and not group["nesterov"] for group in optimizer.param_groups if "nesterov" in group):
        warnings.warn(
            "the optimizer has nesterov=False, but DANA is built on Nesterov momentum: danaz trains with it, and "
            "nesterov=False is not kept. Make the optimizer with nesterov=True, and this warning goes.",
            stacklevel=2,
        )


def _adam(group: Group, kind: type[Adam] = Adam, **others: float) -> Adam:
    beta1, beta2 = group["betas"]
    decay = float(group["weight_decay"]) if group.get("decoupled_weight_decay") else 0.0
    return kind(float(beta1), float(beta2), float(group["eps"]), bool(group.get("amsgrad")), decay, **others)


def _nadam(group: Group) -> Optimizer:
    return _adam(group, NAdam, momentum_decay=float(group["momentum_decay"]))


def _rmsprop(group: Group) -> Optimizer:
    alpha, eps, momentum = (float(group[name]) for name in ("alpha", "eps", "momentum"))
    return RMSprop(alpha, eps, momentum, bool(group["centered"]))


def _adagrad(group: Group) -> Optimizer:
    eps, lr_decay, initial = (float(group[name]) for name in ("eps", "lr_decay", "initial_accumulator_value"))
    return Adagrad(eps, lr_decay, initial)


_READERS: dict[type[torch.optim.Optimizer], Any] = {
    torch.optim.SGD: lambda group: Sgd(float(group["momentum"])),
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _nadam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}


def weight_decays(param_groups: Sequence[Group]) -> tuple[float, ...]:
    """Return the weight decay β of each parameter group that is added to the gradient; a decoupled one is not."""
    return tuple(
        0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0.0)) for group in param_groups
    )


@torch.no_grad()
def decayed_gradient(flat: FlatModel, param_groups: Sequence[Group]) -> Tensor:
    """Return g + βθ̂ f32[P], where β is each group's weight decay; in a group with maximize, −g + βθ̂.

    The flat gradient itself stays as it is, because some loops accumulate gradients.
    """
    decays, signs = weight_decays(param_groups), [-1.0 if group.get("maximize") else 1.0 for group in param_groups]
    if not any(decays) and min(signs) > 0:
        return flat.grads
    for decay, sign, (start, stop) in zip(decays, signs, flat.layout.groups, strict=True):
        out = flat.decayed[start:stop]
        torch.add(flat.grads[start:stop], flat.params[start:stop], alpha=sign * decay, out=out)
        if sign < 0:
            out.neg_()
    return flat.decayed
