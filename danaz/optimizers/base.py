"""What an optimizer is.

An optimizer says what one gradient does to the parameters; an algorithm (danaz.rules) says where the optimizer's state
lives, and along which momentum the view looks ahead. So each algorithm can carry out each optimizer.

Two displacements describe an optimizer, and both are added to the parameters:

- s, that of a gradient g computed at the view θ̂: ``step`` adds it, and brings the state up to date.
- a, which the momentum in the state alone will still cause at the next step. It is −μu, where μ is the ``momentum``
  and u the *heading*: ``add_heading`` adds u, times a weight. Without momentum, μ is 0.

An optimizer is elementwise, like a rule: it sees slices f32[n] of flat vectors, and a few scalars. It holds
hyper-parameters and nothing else. The state is zero at the start; its owner keeps the vectors that ``state`` names, and
counts the gradients in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from math import inf
from typing import ClassVar

from torch import Tensor

Vectors = Mapping[str, Tensor]  # name -> f32[n], all slices of the same range


class OptimizerError(ValueError):
    """There is no such optimizer, or it cannot have this hyper-parameter."""


@dataclass(frozen=True)
class Scalars:
    """The numbers that a step depends on, beside the hyper-parameters."""

    lr: float  # η
    count: int  # number of gradients in the state; for a step, this one included


# The lowest value of a hyper-parameter, and the first above it that is too high; of all others, 0 and infinity. A
# momentum may be negative, to offset what asynchrony adds.
RANGES = {
    "momentum": (-1.0, 1.0),
    "beta1": (0.0, 1.0),
    "beta2": (0.0, 1.0),
    "alpha": (0.0, 1.0),
    "eps": (1e-30, inf),  # with 0, a gradient of 0 would be divided by 0
}


@dataclass(frozen=True)
class Optimizer:
    """What one gradient does to the parameters of one group.

    The fields of a subclass are its hyper-parameters, all numbers or truth values.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Raise OptimizerError for a hyper-parameter that is out of its range."""
        for field in fields(self):
            value, (low, high) = getattr(self, field.name), RANGES.get(field.name, (0.0, inf))
            if not low <= value < high:
                raise OptimizerError(f"{field.name} is {value!r}; a number from {low:g} to below {high:g} was expected")

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the state's vectors."""
        return ()

    @property
    def momentum(self) -> float:
        """μ: the share of the heading that the next step makes again, whatever its gradient."""
        return 0.0

    @property
    def needs_view(self) -> bool:
        """Whether a step needs θ̂, the parameters that the gradient was computed on."""
        return False

    @property
    def is_adaptive(self) -> bool:
        """Whether each parameter has a step size of its own, which follows its gradients."""
        return True

    @property
    def steps_look_ahead(self) -> bool:
        """Whether the parameters that torch's class of this optimizer moves are θ + a, and not θ."""
        return False

    @property
    def keeps_velocity(self) -> bool:
        """Whether the state says along which velocity the last step went."""
        return False

    def step(self, params: Tensor, grad: Tensor, state: Vectors, at: Scalars, view: Tensor | None = None) -> None:
        """Take ``grad`` f32[n] into ``state``, and add s to ``params``, in place. ``grad`` stays as it is.

        ``view`` f32[n] is θ̂, if the optimizer needs it.
        """
        raise NotImplementedError

    def add_heading(self, out: Tensor, state: Vectors, at: Scalars, weight: float) -> None:
        """Add ``weight`` u to ``out`` f32[n]. Nothing is added if there is no gradient in the state."""

    def velocity(self, state: Vectors, at: Scalars) -> Tensor:
        """Return v f32[n], for which the last step was −ηv, apart from decoupled weight decay. Do not change it."""
        raise NotImplementedError

    def advance(self, out: Tensor, grad: Tensor, old: Vectors, new: Vectors, at: Scalars, view: Tensor | None) -> None:
        """Write s into ``out`` f32[n], and the state after ``grad`` into ``new``; ``old`` stays as it is.

        Where the new state is not finite, neither is ``out``: the square of a large gradient may be infinite, and hide
        in a step of 0.
        """
        for name in self.state:
            new[name].copy_(old[name])
        self.step(out.zero_(), grad, new, at, view)
        for name in self.state:
            out.add_(new[name], alpha=0)  # 0 · ∞ is NaN

    def displace(
        self, out: Tensor, grad: Tensor, old: Vectors, new: Vectors, at: Scalars, before: Scalars, view: Tensor | None
    ) -> None:
        """The same with s + a′ − a: a is the look-ahead of ``old`` at ``before``, and a′ that of ``new`` at ``at``."""
        self.advance(out, grad, old, new, at, view)
        self.add_heading(out, old, before, self.momentum)
        self.add_heading(out, new, at, -self.momentum)

    def without_momentum(self) -> Optimizer:
        """Return the same optimizer with μ = 0."""
        return self

    def fused(self) -> Optimizer:
        """Return an optimizer that does the same in fewer passes over memory, up to rounding; this one if none does."""
        return self


class Optimizers(tuple[Optimizer, ...]):
    """The optimizer of each parameter group; a single one is that of all groups.

    They are of one kind, and may have different hyper-parameters.
    """

    def of(self, group: int) -> Optimizer:
        """The optimizer of a parameter group."""
        return self[group if len(self) > 1 else 0]

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the vectors that some group needs."""
        return tuple(dict.fromkeys(name for each in self for name in each.state))

    @property
    def needs_view(self) -> bool:
        return any(each.needs_view for each in self)

    @property
    def is_adaptive(self) -> bool:
        """Whether some group's steps have a size for each parameter."""
        return any(each.is_adaptive for each in self)

    def without_momentum(self) -> Optimizers:
        """The same optimizers with μ = 0."""
        return Optimizers(each.without_momentum() for each in self)

    def fused(self) -> Optimizers:
        """The same optimizers, in fewer passes over memory where that is possible."""
        return Optimizers(each.fused() for each in self)
