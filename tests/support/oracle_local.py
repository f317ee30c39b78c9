"""The oracles of workers that step by themselves. Some meet at a server now and then, some meet only each other."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
from oracle import ORACLES as ORACLES
from oracle import Array, Oracle, Rounds, Steps, Views


class LocalSteps:
    """Steps on the worker, from the view on: x ← x + s + a′ − a. For SGD: v ← γv + g; x ← x − η(γv + g)."""

    def walked(self: Oracle, i: int, steps: Steps, state: Any) -> Array:  # type: ignore[misc]
        """Return where ``steps`` lead, and bring ``state`` up to date."""
        x = self.sent[i][0]
        for g, lr in steps:
            before = state.a(lr)
            x = x + state.s(g, x, lr) + state.a(lr) - before
        return x


class Eamsgd(LocalSteps, Oracle, name="eamsgd"):
    """``local[i]`` is xᵢ, ``theta`` the centre x̃."""

    def set_up(self) -> None:
        self.local = dict.fromkeys(self.present, self.theta)

    def take(self, i: int, steps: Steps) -> None:
        x = self.walked(i, steps, self.states[i])
        e = 0.9 / len(self.present) * (x - self.theta)
        self.local[i] = x - e
        self.theta = self.theta + e

    def view(self, i: int) -> Array:
        return self.local[i]

    def fresh(self, i: int) -> Views:
        self.local[i] = self.theta
        return super().fresh(i)


class Easgd(Eamsgd, name="easgd"):
    def set_up(self) -> None:
        super().set_up()
        self.states = {i: state.without_momentum() for i, state in self.states.items()}


class ModelAveraging(LocalSteps, Rounds, name="model-averaging"):
    def set_up(self) -> None:
        super().set_up()
        self.tentative: dict[int, Any] = {}

    def pushed(self, i: int, steps: Steps) -> Array:
        self.tentative[i] = copy.deepcopy(self.states[i])
        return self.walked(i, steps, self.tentative[i])

    def apply(self, i: int, mean: Array, lr: Array) -> None:
        self.states |= {j: self.tentative[j] for j in self.waiting}
        self.theta = mean


class Bmuf(ModelAveraging, name="bmuf"):
    def set_up(self) -> None:
        super().set_up()
        self.step = self.zeros()  # Δ

    @property
    def beta(self) -> float:
        return 1 - 1 / len(self.present)

    def apply(self, i: int, mean: Array, lr: Array) -> None:
        """B is what was sent to i. β changes as workers come and go, so each worker may have another B.

        Workers begin each block with a fresh state.
        """
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
