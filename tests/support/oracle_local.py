"""The oracles of workers that step by themselves. Some meet at a server now and then, some meet only each other."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
from oracle import ORACLES as ORACLES
from oracle import Array, Oracle, Rounds, Steps, Views


class LocalSteps:
    """Steps on the worker, from the view on, as torch's class makes them: x ← x + s, or x ← x + s + a′ − a.

    For SGD: v ← γv + g; x ← x − η(γv + g).
    """

    def walked(self: Oracle, i: int, steps: Steps, state: Any) -> Array:  # type: ignore[misc]
        """Return where ``steps`` lead, and bring ``state`` up to date."""
        x = self.sent[i][0]
        for g, lr in steps:
            before = state.a(lr)
            s = state.s(g, x, lr)
            x = x + s + (state.a(lr) - before if state.torch_looks_ahead else 0.0)
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


class Diloco(ModelAveraging, name="diloco"):
    """Δ = mean(θ − θᵢ), and a step of torch.optim.SGD(lr=0.7, momentum=0.9, nesterov=True) along it."""

    def set_up(self) -> None:
        super().set_up()
        self.m = self.zeros()

    def pushed(self, i: int, steps: Steps) -> Array:
        return self.sent[i][0] - super().pushed(i, steps)

    def apply(self, i: int, mean: Array, lr: Array) -> None:
        self.states |= {j: self.tentative[j] for j in self.waiting}
        self.m = 0.9 * self.m + mean
        self.theta = self.theta - 0.7 * (mean + 0.9 * self.m)


class AsyncDiloco(LocalSteps, Oracle):
    """Each worker's Δ = θ − θᵢ, with θ as it was sent, is divided by N."""

    def take(self, i: int, steps: Steps) -> None:
        x = self.walked(i, steps, self.states[i])
        self.outer(i, (self.sent[i][0] - x) / len(self.present))

    def outer(self, i: int, delta: Array) -> None:
        self.theta = self.theta - 0.7 * delta


class AsyncDilocoAsgd(AsyncDiloco, name="async-diloco asgd"):
    pass


class AsyncDilocoNag(AsyncDiloco, name="async-diloco nag-asgd"):
    def set_up(self) -> None:
        self.m = self.zeros()

    def outer(self, i: int, delta: Array) -> None:
        self.m = 0.9 * self.m + delta
        self.theta = self.theta - 0.7 * (delta + 0.9 * self.m)


class AsyncDilocoDelayed(AsyncDiloco, name="async-diloco delayed-nesterov"):
    """Algorithm 3 of Liu et al. with c = 0."""

    def set_up(self) -> None:
        self.m, self.buffer = self.zeros(), self.zeros()

    def outer(self, i: int, delta: Array) -> None:
        self.buffer = self.buffer + delta
        if (self.updates + 1) % len(self.present):
            self.theta = self.theta - 0.7 * delta
            return
        self.m, self.buffer = 0.9 * self.m + self.buffer, self.zeros()
        self.theta = self.theta - 0.7 * (0.9 * self.m + delta)


class AsyncDilocoDefault(AsyncDilocoDelayed, name="async-diloco"):
    pass


class AsyncDilocoDana(AsyncDiloco, name="async-diloco dana"):
    """DANA-Zero along Δ: θ̂ = θ − γη Σⱼ mⱼ, over all workers, also those that have gone: they forfeit their share.

    Here ``theta`` is θ̂, in which the model ends, too.
    """

    def set_up(self) -> None:
        self.position, self.m = self.theta, {i: self.zeros() for i in self.present}
        self.forfeited = self.zeros()

    def outer(self, i: int, delta: Array) -> None:
        self.m[i] = 0.9 * self.m[i] + delta
        self.position = self.position - 0.7 * self.m[i]
        self.theta = self.position - 0.7 * 0.9 * (sum(self.m.values(), self.zeros()) + self.forfeited)

    def fresh(self, i: int) -> Views:
        self.forfeited = self.forfeited + self.m[i]
        self.m[i] = self.zeros()
        return super().fresh(i)


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
