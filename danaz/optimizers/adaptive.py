"""Optimizers with a step size for each parameter, as torch defines them: Adam, NAdam, RMSprop and Adagrad."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, expm1, fsum, log

import torch
from torch import Tensor

from danaz.optimizers.base import Optimizer, Scalars, Vectors

SERIES = 60  # terms of a logarithm's series, each less than half of the one before


@dataclass(frozen=True)
class Adam(Optimizer):
    """m ← β₁m + (1 − β₁)g; n ← β₂n + (1 − β₂)g²; s = −η m/(1 − β₁ᵗ)/d; a = −ηβ₁ m/(1 − β₁ᵗ⁺¹)/d.

    d = √(n/(1 − β₂ᵗ)) + ε, and t counts the gradients. With ``amsgrad``, the largest n so far takes the place of n
    in d. A decoupled ``weight_decay`` w adds −ηwθ̂ to s: that is AdamW.

    Kingma, Ba, ICLR 2015, arXiv 1412.6980; Loshchilov, Hutter, Decoupled Weight Decay Regularization, ICLR 2019, arXiv
    1711.05101; Reddi, Kale, Kumar, ICLR 2018 (AMSGrad).
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8  # ε
    amsgrad: bool = False
    weight_decay: float = 0.0  # w

    name = "adam"

    @property
    def state(self) -> tuple[str, ...]:
        return (*["mean"] * (self.beta1 != 0), "square", *["largest_square"] * self.amsgrad)

    @property
    def momentum(self) -> float:
        return self.beta1

    @property
    def needs_view(self) -> bool:
        return self.weight_decay != 0

    @property
    def keeps_velocity(self) -> bool:
        return self.beta1 != 0

    def step(self, params: Tensor, grad: Tensor, state: Vectors, at: Scalars, view: Tensor | None = None) -> None:
        self._decay(params, view, at)
        mean = state["mean"].mul_(self.beta1).add_(grad, alpha=1 - self.beta1) if self.beta1 else grad
        self._take_square(grad, state)
        params.addcdiv_(mean, self._denominator(state, at.count), value=-at.lr / (1 - self.beta1**at.count))

    def add_heading(self, out: Tensor, state: Vectors, at: Scalars, weight: float) -> None:
        if at.count and self.beta1:
            rate = weight * at.lr / (1 - self.beta1 ** (at.count + 1))
            out.addcdiv_(state["mean"], self._denominator(state, at.count), value=rate)

    def velocity(self, state: Vectors, at: Scalars) -> Tensor:
        return self._mean(state, at.count).div_(self._denominator(state, at.count))

    def without_momentum(self) -> Optimizer:
        return replace(self, beta1=0.0)

    def _mean(self, state: Vectors, count: int) -> Tensor:
        """The mean gradient f32[n] without its bias towards zero, a new tensor."""
        return state["mean"].div(1 - self.beta1**count)

    def _decay(self, params: Tensor, view: Tensor | None, at: Scalars) -> None:
        if self.weight_decay:
            assert view is not None, "decoupled weight decay needs the view"
            params.add_(view, alpha=-at.lr * self.weight_decay)

    def _take_square(self, grad: Tensor, state: Vectors) -> None:
        state["square"].mul_(self.beta2).addcmul_(grad, grad, value=1 - self.beta2)
        if self.amsgrad:
            torch.maximum(state["largest_square"], state["square"], out=state["largest_square"])

    def _denominator(self, state: Vectors, count: int) -> Tensor:
        """d f32[n], a new tensor."""
        square = state["largest_square" if self.amsgrad else "square"]
        return square.div(1 - self.beta2**count).sqrt_().add_(self.eps)


@dataclass(frozen=True)
class NAdam(Adam):
    """Adam whose step already looks ahead: for one worker, dana makes the very steps of torch.optim.NAdam.

    μₜ = β₁(1 − ½ 0.96^(tψ)) and Πₜ = μ₁…μₜ take the places of β₁ and β₁ᵗ: a = −η μₜ₊₁ m/(1 − Πₜ₊₁)/d; s = a of the
    state before, at η, − η(1 − μₜ) g/(1 − Πₜ)/d. ψ is ``momentum_decay``.

    Dozat, Incorporating Nesterov Momentum into Adam, ICLR 2016 workshop.
    """

    momentum_decay: float = 4e-3

    name = "nadam"
    steps_look_ahead = True

    def step(self, params: Tensor, grad: Tensor, state: Vectors, at: Scalars, view: Tensor | None = None) -> None:
        self._decay(params, view, at)
        self.add_heading(params, state, replace(at, count=at.count - 1), -self.momentum)
        if self.beta1:
            state["mean"].mul_(self.beta1).add_(grad, alpha=1 - self.beta1)
        self._take_square(grad, state)
        factor, product = self.course(at.count)
        rate = -at.lr * (1 - factor) / (1 - product)
        params.addcdiv_(grad, self._denominator(state, at.count), value=rate)

    def add_heading(self, out: Tensor, state: Vectors, at: Scalars, weight: float) -> None:
        if at.count and self.beta1:
            factor, product = self.course(at.count + 1)
            rate = weight * at.lr * factor / self.beta1 / (1 - product)
            out.addcdiv_(state["mean"], self._denominator(state, at.count), value=rate)

    def _mean(self, state: Vectors, count: int) -> Tensor:
        return state["mean"].div(1 - self.course(count)[1])

    def course(self, count: int) -> tuple[float, float]:
        """(μₜ, Πₜ) for t = ``count``."""
        return _factor_and_product(self.beta1, self.momentum_decay, count)


@lru_cache(maxsize=64)  # the slices of a vector ask for the same few
def _factor_and_product(beta1: float, momentum_decay: float, count: int) -> tuple[float, float]:
    """(μₜ, Πₜ) for t = ``count``, in a closed form, which takes the same time for every t.

    log Πₜ = t log β₁ + Σₖ log(1 − ½qᵏ) for k = 1 … t, where q = 0.96^ψ. By the series of the logarithm, that sum is
    −Σₙ qⁿ(1 − qⁿᵗ)/(1 − qⁿ)/(n 2ⁿ), of which SERIES terms are exact for float64.
    """
    rate = momentum_decay * log(0.96)  # log q
    factor = beta1 * (1 - 0.5 * exp(count * rate))
    if not beta1:
        return factor, float(count == 0)
    sums = (expm1(n * count * rate) / expm1(n * rate) if rate else count for n in range(1, SERIES))
    total = fsum(-exp(n * rate) * each / (n * 2**n) for n, each in enumerate(sums, start=1))
    return factor, exp(count * log(beta1) + total)


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """n ← αn + (1 − α)g²; v ← γv + g/(√n + ε); s = −ηv; a = −ηγv.

    With ``centered``, the variance takes the place of n: n less the square of the mean gradient.

    Tieleman, Hinton, Lecture 6.5, Coursera 2012; Graves, arXiv 1308.0850 (centered).
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0  # γ
    centered: bool = False

    name = "rmsprop"

    @property
    def state(self) -> tuple[str, ...]:
        return ("square", *["mean"] * self.centered, *["velocity"] * (self.momentum != 0))

    @property
    def keeps_velocity(self) -> bool:
        return self.momentum != 0

    def step(self, params: Tensor, grad: Tensor, state: Vectors, at: Scalars, view: Tensor | None = None) -> None:
        variance = state["square"].mul_(self.alpha).addcmul_(grad, grad, value=1 - self.alpha)
        if self.centered:
            mean = state["mean"].lerp_(grad, 1 - self.alpha)
            variance = torch.addcmul(variance, mean, mean, value=-1).clamp_(min=0)  # rounding may make it negative
        denominator = variance.sqrt().add_(self.eps)
        if self.momentum:
            params.sub_(state["velocity"].mul_(self.momentum).addcdiv_(grad, denominator), alpha=at.lr)
        else:
            params.addcdiv_(grad, denominator, value=-at.lr)

    def add_heading(self, out: Tensor, state: Vectors, at: Scalars, weight: float) -> None:
        if self.momentum:
            out.add_(state["velocity"], alpha=weight * at.lr)

    def velocity(self, state: Vectors, at: Scalars) -> Tensor:
        return state["velocity"]

    def without_momentum(self) -> Optimizer:
        return replace(self, momentum=0.0)


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """n ← n + g²; s = −η/(1 + (t − 1)ζ) g/(√n + ε); a = 0. ζ is ``lr_decay``; n starts at ``initial``.

    Duchi, Hazan, Singer, JMLR 2011.
    """

    eps: float = 1e-10
    lr_decay: float = 0.0
    initial: float = 0.0

    name = "adagrad"

    @property
    def state(self) -> tuple[str, ...]:
        return ("square",)

    def step(self, params: Tensor, grad: Tensor, state: Vectors, at: Scalars, view: Tensor | None = None) -> None:
        square = state["square"].addcmul_(grad, grad)
        rate = at.lr / (1 + (at.count - 1) * self.lr_decay)
        params.addcdiv_(grad, square.add(self.initial).sqrt_().add_(self.eps), value=-rate)
