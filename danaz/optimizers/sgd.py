"""Stochastic gradient descent, without and with momentum (Nesterov 1983; Sutskever et al., ICML 2013)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from danaz.optimizers.base import Optimizer, Scalars, Vectors


@dataclass(frozen=True)
class PlainSgd(Optimizer):
    """s = −ηg, without a state."""

    name = "sgd without momentum"
    is_adaptive = False

    def step(self, params: Tensor, grad: Tensor, state: Vectors, at: Scalars, view: Tensor | None = None) -> None:
        params.sub_(grad, alpha=at.lr)

    def displace(
        self, out: Tensor, grad: Tensor, old: Vectors, new: Vectors, at: Scalars, before: Scalars, view: Tensor | None
    ) -> None:
        out.copy_(grad).mul_(-at.lr)


@dataclass(frozen=True)
class Sgd(Optimizer):
    """v ← γv + g; s = −ηv; a = −ηγv.

    v does not contain η, so that a change of η also changes what the momentum still causes (Goyal et al., arXiv
    1706.02677: momentum correction).
    """

    momentum: float = 0.9  # γ

    name = "sgd"
    is_adaptive = False
    steps_look_ahead = True  # in its Nesterov form
    keeps_velocity = True

    @property
    def state(self) -> tuple[str, ...]:
        return ("velocity",)

    def step(self, params: Tensor, grad: Tensor, state: Vectors, at: Scalars, view: Tensor | None = None) -> None:
        velocity = state["velocity"].mul_(self.momentum).add_(grad)
        params.sub_(velocity, alpha=at.lr)

    def add_heading(self, out: Tensor, state: Vectors, at: Scalars, weight: float) -> None:
        out.add_(state["velocity"], alpha=weight * at.lr)

    def velocity(self, state: Vectors, at: Scalars) -> Tensor:
        return state["velocity"]

    def displace(
        self, out: Tensor, grad: Tensor, old: Vectors, new: Vectors, at: Scalars, before: Scalars, view: Tensor | None
    ) -> None:
        """−η(γv′ + g) + γ(η_before − η)v: the same in fewer steps, as Algorithm 4 of the DANA paper has it."""
        velocity = new["velocity"].copy_(old["velocity"]).mul_(self.momentum).add_(grad)
        out.copy_(grad).add_(velocity, alpha=self.momentum).mul_(-at.lr)
        if before.lr != at.lr:
            out.add_(old["velocity"], alpha=self.momentum * (before.lr - at.lr))

    def without_momentum(self) -> Optimizer:
        return PlainSgd()

    def fused(self) -> Optimizer:
        return FusedSgd(self.momentum)


@dataclass(frozen=True)
class FusedSgd(Sgd):
    """Sgd that brings v up to date in one pass, so that γv + g is rounded once; torch rounds γv, and then the sum."""

    def step(self, params: Tensor, grad: Tensor, state: Vectors, at: Scalars, view: Tensor | None = None) -> None:
        velocity = torch.add(grad, state["velocity"], alpha=self.momentum, out=state["velocity"])
        params.sub_(velocity, alpha=at.lr)
