"""Optimizers in float64 NumPy, written from the papers' formulas and torch's documentation, and not from danaz.

Each has a state for every parameter, which counts that parameter's own gradients: ``t`` is an array. ``s(g, view, lr)``
takes a gradient into the state and returns its displacement; ``a(lr)`` returns the displacement that the momentum in
the state alone will still cause. ``velocity()`` is v if the last displacement was −ηv, apart from decoupled weight
decay. ``clone()`` is a fresh one with the same hyper-parameters, ``without_momentum()`` one that never looks ahead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class SgdOracle:
    torch_looks_ahead = True  # torch's parameters are θ + a, in the Nesterov form

    def __init__(self, size: int, momentum: float = 0.9):
        self.size, self.numbers = size, {"momentum": momentum}
        self.gamma, self.v = momentum, np.zeros(size)

    def clone(self) -> Any:
        return type(self)(self.size, **self.numbers)

    def without_momentum(self) -> Any:
        return type(self)(self.size, **{**self.numbers, "momentum": 0.0})

    def velocity(self) -> Array:
        return self.v

    def s(self, g: Array, view: Array, lr: Array, there: Array | bool = True) -> Array:
        self.v = np.where(there, self.gamma * self.v + g, self.v)
        return np.where(there, -lr * self.v, 0.0)

    def a(self, lr: Array) -> Array:
        return -lr * self.gamma * self.v


class AdamOracle:
    torch_looks_ahead = False

    def __init__(
        self,
        size: int,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        amsgrad: bool = False,
        weight_decay: float = 0.0,
    ):
        self.size = size
        self.numbers = {
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "amsgrad": amsgrad,
            "weight_decay": weight_decay,
        }
        self.beta1, self.beta2, self.eps, self.amsgrad, self.w = beta1, beta2, eps, amsgrad, weight_decay
        self.m, self.n, self.largest, self.t = np.zeros(size), np.zeros(size), np.zeros(size), np.zeros(size)

    clone = SgdOracle.clone

    def without_momentum(self) -> Any:
        return type(self)(self.size, **{**self.numbers, "beta1": 0.0})

    def velocity(self) -> Array:
        return self.m / (1 - self.beta1**self.t) / self.d()

    def take(self, g: Array, there: Array | bool) -> None:
        self.m = np.where(there, self.beta1 * self.m + (1 - self.beta1) * g, self.m)
        self.n = np.where(there, self.beta2 * self.n + (1 - self.beta2) * g**2, self.n)
        self.largest = np.maximum(self.largest, self.n)
        self.t = self.t + there

    def d(self) -> Array:
        """The denominator; 1 where there was no gradient yet."""
        square = self.largest if self.amsgrad else self.n
        seen = np.maximum(self.t, 1)
        return np.where(self.t > 0, np.sqrt(square / (1 - self.beta2**seen)) + self.eps, 1.0)

    def s(self, g: Array, view: Array, lr: Array, there: Array | bool = True) -> Array:
        self.take(g, there)
        step = -lr * (self.m / (1 - self.beta1 ** np.maximum(self.t, 1))) / self.d() - lr * self.w * view
        return np.where(there, step, 0.0)

    def a(self, lr: Array) -> Array:
        return -lr * self.beta1 * (self.m / (1 - self.beta1 ** (self.t + 1))) / self.d()


class NAdamOracle(AdamOracle):
    torch_looks_ahead = True

    def __init__(self, size: int, momentum_decay: float = 4e-3, **numbers: Any):
        super().__init__(size, **numbers)
        self.numbers["momentum_decay"] = momentum_decay
        self.psi = momentum_decay

    def mu(self, t: Array) -> Array:
        return self.beta1 * (1 - 0.5 * 0.96 ** (t * self.psi))

    def product(self, t: Array) -> Array:
        counts, places = np.unique(t, return_inverse=True)  # few differ
        return np.array([np.prod(self.mu(np.arange(1, count + 1))) for count in counts])[places]

    def velocity(self) -> Array:
        """Near to v: a step takes the new gradient at another weight than the mean does."""
        return self.m / (1 - self.product(self.t)) / self.d()

    def a(self, lr: Array) -> Array:
        return -lr * self.mu(self.t + 1) * self.m / (1 - self.product(self.t + 1)) / self.d()

    def s(self, g: Array, view: Array, lr: Array, there: Array | bool = True) -> Array:
        before = self.a(lr)
        self.take(g, there)
        t = np.maximum(self.t, 1)
        step = before - lr * (1 - self.mu(t)) * g / (1 - self.product(t)) / self.d() - lr * self.w * view
        return np.where(there, step, 0.0)


class RMSpropOracle:
    torch_looks_ahead = False

    def __init__(
        self, size: int, alpha: float = 0.99, eps: float = 1e-8, momentum: float = 0.0, centered: bool = False
    ):
        self.size = size
        self.numbers = {"alpha": alpha, "eps": eps, "momentum": momentum, "centered": centered}
        self.alpha, self.eps, self.gamma, self.centered = alpha, eps, momentum, centered
        self.n, self.mean, self.v = np.zeros(size), np.zeros(size), np.zeros(size)

    clone = SgdOracle.clone
    without_momentum = SgdOracle.without_momentum
    velocity = SgdOracle.velocity

    def s(self, g: Array, view: Array, lr: Array, there: Array | bool = True) -> Array:
        self.n = np.where(there, self.alpha * self.n + (1 - self.alpha) * g**2, self.n)
        self.mean = np.where(there, self.alpha * self.mean + (1 - self.alpha) * g, self.mean)
        variance = self.n - self.mean**2 if self.centered else self.n
        self.v = np.where(there, self.gamma * self.v + g / (np.sqrt(variance) + self.eps), self.v)
        return np.where(there, -lr * self.v, 0.0)

    def a(self, lr: Array) -> Array:
        return -lr * self.gamma * self.v


class AdagradOracle:
    torch_looks_ahead = False

    def __init__(self, size: int, eps: float = 1e-10, lr_decay: float = 0.0, initial: float = 0.0):
        self.size = size
        self.numbers = {"eps": eps, "lr_decay": lr_decay, "initial": initial}
        self.eps, self.zeta, self.n, self.t = eps, lr_decay, np.full(size, initial), np.zeros(size)

    clone = without_momentum = SgdOracle.clone

    def s(self, g: Array, view: Array, lr: Array, there: Array | bool = True) -> Array:
        self.n = np.where(there, self.n + g**2, self.n)
        self.t = self.t + there
        rate = lr / (1 + (np.maximum(self.t, 1) - 1) * self.zeta)
        return np.where(there, -rate * g / (np.sqrt(self.n) + self.eps), 0.0)

    def a(self, lr: Array) -> Array:
        return np.zeros(self.size)
