"""The oracles of workers that step by themselves. Some meet at a server now and then, some meet only each other."""

from __future__ import annotations

import random

import numpy as np
from oracle import ORACLES as ORACLES
from oracle import Array, Oracle, Rounds, Steps, Views


class LocalNesterov:
    """Nesterov steps on the worker, from the view on: v ← γv + g; x ← x − η(γv + g)."""

    def walked(self: Oracle, i: int, steps: Steps, v: Array) -> tuple[Array, Array]:  # type: ignore[misc]
        x = self.sent[i][0]
        for g, lr in steps:
            v = self.gamma * v + g
            x = x - lr * (self.gamma * v + g)
        return x, v


class Easgd(Oracle, name="easgd"):
    """``local[i]`` is xᵢ, ``theta`` the centre x̃."""

    def set_up(self) -> None:
        self.local = dict.fromkeys(self.present, self.theta)

    def take(self, i: int, steps: Steps) -> None:
        x = self.walk(i, steps)
        e = 0.9 / len(self.present) * (x - self.theta)
        self.local[i] = x - e
        self.theta = self.theta + e

    def walk(self, i: int, steps: Steps) -> Array:
        return self.sent[i][0] - sum((lr * g for g, lr in steps), self.zeros())

    def view(self, i: int) -> Array:
        return self.local[i]

    def fresh(self, i: int) -> Views:
        self.local[i] = self.theta
        return super().fresh(i)


class Eamsgd(LocalNesterov, Easgd, name="eamsgd"):
    def walk(self, i: int, steps: Steps) -> Array:
        x, self.v[i] = self.walked(i, steps, self.v[i])
        return x


class ModelAveraging(LocalNesterov, Rounds, name="model-averaging"):
    def set_up(self) -> None:
        super().set_up()
        self.tentative: dict[int, Array] = {}

    def pushed(self, i: int, steps: Steps) -> Array:
        x, self.tentative[i] = self.walked(i, steps, self.v[i])
        return x

    def apply(self, i: int, mean: Array, lr: Array) -> None:
        self.v |= {j: self.tentative[j] for j in self.waiting}
        self.theta = mean


class Bmuf(ModelAveraging, name="bmuf"):
    def set_up(self) -> None:
        super().set_up()
        self.step = self.zeros()  # Δ

    @property
    def beta(self) -> float:
        return 1 - 1 / len(self.present)

    def apply(self, i: int, mean: Array, lr: Array) -> None:
        """B is what was sent to i. β changes as workers come and go, so each worker may have another B."""
        self.step = self.beta * self.step + mean - self.sent[i][0]
        self.theta = self.theta + self.step

    def view(self, i: int) -> Array:
        return self.theta + self.beta * self.step


# ---- without a server: θ is the mean of all xᵢ, and nobody comes or goes -------------------------------------------


class AdPsgd(Oracle, name="ad-psgd"):
    """``local[i]`` is xᵢ."""

    def set_up(self) -> None:
        self.local = dict.fromkeys(self.present, self.theta)

    def apply(self, i: int, g: Array, lr: Array) -> None:
        j = random.Random(self.updates).choice(sorted(self.present - {i}) or [i])  # the draw is not part of the formula
        mean = (self.local[i] + self.local[j]) / 2
        self.local[j] = mean
        self.local[i] = mean - lr * g

    def view(self, i: int) -> Array:
        return self.local[i]

    def final(self) -> Array:
        return np.mean(list(self.local.values()), axis=0)


class DPsgd(Rounds, name="d-psgd"):
    def set_up(self) -> None:
        super().set_up()
        self.local = dict.fromkeys(self.present, self.theta)

    def apply_round(self) -> None:
        before, n = self.local, len(self.local)
        ring = {i: {(i - 1) % n, i, (i + 1) % n} for i in range(n)}
        self.local = {
            i: sum(before[j] for j in ring[i]) / len(ring[i]) - self.next_lr * self.waiting[i][0] for i in range(n)
        }

    view = AdPsgd.view
    final = AdPsgd.final
