"""What each algorithm must do, in float64 NumPy, written only from the papers' formulas and not from danaz.

Each class is one algorithm. It is given an optimizer of oracle_optimizers.py, which says what one gradient does. θ is
``theta``, the optimizer's state of worker i is ``states[i]``, and ηᵢ is ``rate[i]``. Rates and weight decay are arrays
with one number for each parameter, so that parameter groups need no special treatment. Each event returns the views
that it makes the server send.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from oracle_optimizers import Array

Views = dict[int, Array]
Steps = list[tuple[Array, Array]]

ORACLES: dict[str, type[Oracle]] = {}


class Oracle:
    """The bookkeeping that all algorithms share: who is there, what each was last sent, how many updates."""

    barrier = False
    weight_decay: Array | float = 0.0  # β; the gradients already include βw
    layers: tuple[slice, ...] = (slice(None),)

    def __init_subclass__(cls, name: str = "") -> None:
        if name:
            ORACLES[name] = cls

    def __init__(self, theta: Array, workers: int, optimizer: Any, lr_correction: bool = True):
        self.theta = np.array(theta, dtype=np.float64)
        self.optimizer = optimizer
        self.lr_correction = lr_correction
        self.updates = 0
        self.lr = self.zeros()  # η of the last update
        self.max_lr = self.zeros()
        self.present = set(range(workers))
        self.sent: dict[int, tuple[Array, int]] = {}  # worker -> its view and the view's version
        self.states = {i: optimizer.clone() for i in range(workers)}
        self.rate = {i: self.zeros() for i in range(workers)}
        self.t = dict.fromkeys(range(workers), 0)  # number of updates of each worker
        self.set_up()

    def zeros(self) -> Array:
        return np.zeros_like(self.theta)

    # ---- what an algorithm says ----------------------------------------------------------------------------------

    def set_up(self) -> None:
        pass

    def corrected(self, i: int, g: Array, lag: int) -> Array:
        return g

    def apply(self, i: int, g: Array, lr: Array) -> None:
        raise NotImplementedError

    def view(self, i: int) -> Array:
        return self.theta

    def after(self, i: int) -> None:
        pass

    def final(self) -> Array:
        """Return θ after all workers that are there have given back."""
        return self.theta

    # ---- events --------------------------------------------------------------------------------------------------

    def start(self) -> Views:
        return self.send(*self.present)

    def send(self, *workers: int) -> Views:
        for i in workers:
            self.sent[i] = self.view(i).copy(), self.updates
        return {i: self.sent[i][0] for i in workers}

    def push(self, i: int, steps: Steps, samples: int) -> Views:
        lr = steps[-1][1]
        self.max_lr = np.maximum(self.max_lr, lr)
        self.take(i, steps)
        self.updates += 1
        self.t[i] += 1
        self.lr = self.rate[i] = lr
        return self.send(i)

    def take(self, i: int, steps: Steps) -> None:
        """Take one gradient; rules whose workers make local steps override this, and take more."""
        [(g, lr)] = steps
        self.apply(i, self.corrected(i, g, self.updates - self.sent[i][1]), lr)
        self.after(i)

    def pulled(self, i: int) -> Views:
        """A worker asks for a fresh view instead of pushing."""
        return self.send(i)

    def lost(self, i: int) -> Views:
        self.present.discard(i)
        return {}

    def back(self, i: int) -> Views:
        """The same process comes back after it was given up."""
        self.present.add(i)
        return self.send(i)

    def fresh(self, i: int) -> Views:
        """A new process replaces it."""
        self.present.add(i)
        self.states[i], self.rate[i], self.t[i] = self.states[i].clone(), self.zeros(), 0
        return self.send(i)

    def left(self, i: int) -> Views:
        self.present.discard(i)
        return {}


# ---- the DANA paper ----------------------------------------------------------------------------------------------


class Asgd(Oracle, name="asgd"):
    def set_up(self) -> None:
        self.states = {i: state.without_momentum() for i, state in self.states.items()}

    def take(self, i: int, steps: Steps) -> None:
        x = self.sent[i][0]
        for g, lr in steps:
            displacement = self.states[i].s(g, x, lr)
            x, self.theta = x + displacement, self.theta + displacement


class NagAsgd(Oracle, name="nag-asgd"):
    def set_up(self) -> None:
        self.shared = self.optimizer.clone()

    def apply(self, i: int, g: Array, lr: Array) -> None:
        self.theta = self.theta + self.shared.s(g, self.sent[i][0], lr)

    def view(self, i: int) -> Array:
        return self.theta + self.shared.a(self.lr)


class Baseline(NagAsgd, name="baseline"):
    pass


class MultiAsgd(Oracle, name="multi-asgd"):
    def apply(self, i: int, g: Array, lr: Array) -> None:
        self.theta = self.theta + self.states[i].s(g, self.sent[i][0], lr)

    def view(self, i: int) -> Array:
        return self.theta + self.states[i].a(self.rate[i])


class DanaZero(MultiAsgd, name="dana-zero"):
    def view(self, i: int) -> Array:
        return self.theta + self.ahead()

    def ahead(self) -> Array:
        return sum((self.states[j].a(self.rate[j]) for j in self.present), self.zeros())


class Dana(Oracle, name="dana"):
    """``theta`` is Θ here."""

    ahead = DanaZero.ahead

    def take(self, i: int, steps: Steps) -> None:
        x = self.sent[i][0]
        for g, lr in steps:
            before = self.states[i].a(self.rate[i] if self.lr_correction else lr)
            displacement = self.states[i].s(g, x, lr) + self.states[i].a(lr) - before
            x, self.theta, self.rate[i] = x + displacement, self.theta + displacement, lr

    def left(self, i: int) -> Views:
        self.theta = self.theta - self.states[i].a(self.rate[i])
        return super().left(i)

    def final(self) -> Array:
        return self.theta - self.ahead()


class Rounds(Oracle):
    """A round waits for all workers that are there, and averages their pushes over the samples.

    A worker that comes while others already wait enters at the next round.
    """

    barrier = True

    def set_up(self) -> None:
        self.waiting: dict[int, tuple[Array, int]] = {}
        self.joining: set[int] = set()

    def push(self, i: int, steps: Steps, samples: int) -> Views:
        self.waiting[i] = self.pushed(i, steps), samples
        self.next_lr = steps[-1][1]
        return self.close_round()

    def pushed(self, i: int, steps: Steps) -> Array:
        [(g, _)] = steps
        return g

    def lost(self, i: int) -> Views:
        super().lost(i)
        self.waiting.pop(i, None)
        self.joining.discard(i)
        return self.close_round()

    left = lost

    def back(self, i: int) -> Views:
        self.waiting.pop(i, None)
        self.present.add(i)
        self.joining.add(i)
        return self.close_round()

    def fresh(self, i: int) -> Views:
        self.states[i] = self.states[i].clone()
        return self.back(i)

    def close_round(self) -> Views:
        if not self.waiting:
            joining, self.joining = self.joining, set()
            return self.send(*joining)
        if set(self.waiting) != self.present - self.joining:
            return {}
        self.apply_round()
        self.waiting.clear()
        self.joining.clear()
        self.updates += 1
        self.lr = self.next_lr
        return self.send(*self.present)

    def apply_round(self) -> None:
        samples = sum(n for _, n in self.waiting.values())
        mean = sum((pushed * n for pushed, n in self.waiting.values()), self.zeros()) / samples
        self.apply(max(self.waiting), mean, self.next_lr)


class Ssgd(Rounds, NagAsgd, name="ssgd"):
    def set_up(self) -> None:
        Rounds.set_up(self)
        NagAsgd.set_up(self)

    def view(self, i: int) -> Array:
        return super().view(i) if self.optimizer.torch_looks_ahead else self.theta


class SsgdLars(Rounds, name="ssgd-lars"):
    def set_up(self) -> None:
        super().set_up()
        self.velocity = self.zeros()

    def apply(self, i: int, mean: Array, lr: Array) -> None:
        """``mean`` is g + βw."""
        decay = self.weight_decay * self.theta
        rates = self.zeros()
        for layer in self.layers:
            norm_w, norm_g = np.linalg.norm(self.theta[layer]), np.linalg.norm((mean - decay)[layer])
            ratio = 0.001 * norm_w / (norm_g + np.linalg.norm(decay[layer])) if norm_w > 0 else 1
            rates[layer] = lr[layer] * ratio
        self.velocity = self.optimizer.gamma * self.velocity + rates * mean
        self.theta = self.theta - self.velocity


# ---- the Gap-Aware paper -----------------------------------------------------------------------------------------


class Sa(NagAsgd, name="sa"):
    def corrected(self, i: int, g: Array, lag: int) -> Array:
        return g / max(1, lag)


class DanaSa(DanaZero, name="dana-sa"):
    corrected = Sa.corrected


class GapAware(Oracle):
    def set_up(self) -> None:
        super().set_up()
        self.r = self.zeros()

    def corrected(self, i: int, g: Array, lag: int) -> Array:
        if self.updates == 0:
            return g
        average_step = self.max_lr * (np.sqrt(self.r / (1 - 0.999**self.updates)) + 1e-8)
        return g / (1 + np.abs(self.theta - self.sent[i][0]) / average_step)

    def after(self, i: int) -> None:
        self.r = 0.999 * self.r + 0.001 * self.applied_velocity(i) ** 2

    def applied_velocity(self, i: int) -> Array:
        raise NotImplementedError


class Ga(GapAware, NagAsgd, name="ga"):
    def applied_velocity(self, i: int) -> Array:
        return self.shared.velocity()


class DanaGa(GapAware, DanaZero, name="dana-ga"):
    def applied_velocity(self, i: int) -> Array:
        return self.states[i].velocity()


# ---- compared with -----------------------------------------------------------------------------------------------


class DcAsgd(NagAsgd, name="dc-asgd"):
    """Without momentum, and so without a look-ahead."""

    strength = 0.04

    def set_up(self) -> None:
        self.shared = self.optimizer.without_momentum()

    def corrected(self, i: int, g: Array, lag: int) -> Array:
        return g + self.strength * g * g * (self.theta - self.sent[i][0])


class DcAsgdAdaptive(DcAsgd, name="dc-asgd-adaptive"):
    def set_up(self) -> None:
        super().set_up()
        self.m = self.zeros()

    def corrected(self, i: int, g: Array, lag: int) -> Array:
        self.m = 0.95 * self.m + 0.05 * g**2
        return g + 2 / np.sqrt(self.m + 1e-7) * g * g * (self.theta - self.sent[i][0])


class DanaDc(DanaZero, name="dana-dc"):
    strength = 2.0
    corrected = DcAsgd.corrected


class DanaNadam(Oracle, name="dana-nadam"):
    """``m[i]`` is mᵢ. The momentum of an SGD is β₁."""

    def set_up(self) -> None:
        self.m = dict.fromkeys(self.present, self.zeros())
        self.n = self.zeros()
        numbers = self.optimizer.numbers
        self.beta1 = numbers["momentum"] if "momentum" in numbers else numbers["beta1"]
        self.beta2 = numbers.get("beta2", 0.999)

    def apply(self, i: int, g: Array, lr: Array) -> None:
        self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * g
        self.n = self.beta2 * self.n + (1 - self.beta2) * g**2
        mean = self.m[i] / (1 - self.beta1 ** (self.t[i] + 1))
        self.theta = self.theta - lr * mean / (np.sqrt(self.n / (1 - self.beta2 ** (self.updates + 1))) + 1e-8)

    def view(self, i: int) -> Array:
        if not self.updates:
            return self.theta
        means = (self.m[j] / (1 - self.beta1 ** (self.t[j] + 1)) for j in self.present)
        scale = np.sqrt(self.n / (1 - self.beta2**self.updates)) + 1e-8
        return self.theta - self.lr * self.beta1 * sum(means, self.zeros()) / scale

    def fresh(self, i: int) -> Views:
        self.m[i] = self.zeros()
        return super().fresh(i)
