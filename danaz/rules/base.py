"""What an update rule is.

A rule is elementwise: it sees slices of flat f32 vectors and a few scalars, so the same object serves a whole model, a
shard in its own process, or a chunk that is still in cache. (A rule with a barrier may ask for whole layers instead:
``per_layer``.) A rule holds hyper-parameters and nothing else. The server keeps the vectors that the rule declares in
``shared_state`` and ``worker_state`` (zero at the start), and passes slices of them to the rule. If the rule sets
``needs_view``, the server also passes ``own["view"]``, what it last sent to the worker.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from danaz.files.user_module import UserModuleError, import_user_name
from danaz.optimizers import Optimizers, Own, Sgd, Vectors

Factory = Callable[..., "Rule"]
Pushes = Literal["gradient", "displacement", "parameters"]  # a displacement is added to the server's parameters


@dataclass(frozen=True)
class Context:
    """The scalars of one update, or of one reply."""

    lr: float  # η of this update; in a reply, that of the last gradient of any worker in these parameters, or 0
    own_lr: float  # ηᵢ of this worker's last applied gradient in these parameters, 0 before its first
    max_lr: float  # the largest η applied so far
    lag: int  # τ: updates applied since this worker's view was sent
    version: int  # updates applied before this one
    own_count: int  # gradients in this worker's state, before this one
    workers: int = 1  # N, how many take part now
    group: int = 0  # number of the parameter group that this slice belongs to
    shared_count: int = 0  # gradients in the shared state, before this one


class WorkerRule:
    """The worker's half of a rule: turns a gradient into a push. By default the push is the gradient."""

    pushes: Pushes = "gradient"
    worker_state: tuple[str, ...] = ()
    needs_view: bool = False  # old["view"] is the parameters that the gradient was computed on
    sync_period: int = 1  # mini-batches between pushes; the steps in between move the worker's own parameters
    resets: bool = False  # the state starts from zero after each push
    gives_back: bool = False
    names_absent: bool = False  # a displacement names the parameters that made no step: a momentum on the server waits

    def push(self, out: Tensor, grad: Tensor, old: Vectors, new: Vectors, ctx: Context) -> None:
        """Write the push into ``out`` f32[n] and the state after it into ``new``; ``old`` stays untouched.

        The caller keeps ``old`` until the server has applied the push, and goes back to it on a refusal.
        Only the rates, ``ctx.own_count`` and ``ctx.group`` are known on a worker. Where pushes are displacements or
        parameters, ``out`` is the displacement of this one mini-batch.
        """
        out.copy_(grad)

    def give_back(self, out: Tensor, state: Vectors, ctx: Context) -> None:
        """Write what the server must add to its parameters when this worker leaves, if the rule ``gives_back``.

        ``ctx`` is that of a push, with ``ctx.own_lr`` and ``ctx.own_count`` as the state has them.
        """
        raise NotImplementedError


class Rule:
    """The server's half of a rule, and what it declares about itself."""

    barrier: bool = False  # the round waits for every live worker, and their pushes are averaged
    all_reduce: bool = False  # live, one Horovod world over all hosts takes the server's place
    scales_lr: bool = False  # η is multiplied by the number of workers (linear scaling)
    per_layer: bool = False  # with a barrier: each slice of apply_round is one layer, for rules that need its norm
    gossips: bool = False  # own["neighbour"] is another worker's "local", drawn at random
    live: bool = True  # whether it can be launched; a rule without a server runs only in the simulator
    needs_view: bool = False  # own["view"] is what the server last sent to this worker, as the worker decoded it
    view_is_state: bool = False  # a view is all that the server holds, so a restarted server may go on from one
    max_workers: int | None = None
    worker_state: tuple[str, ...] = ()  # vectors per worker, on the server
    shared_state: tuple[str, ...] = ()  # vectors the server keeps once
    worker_rule: WorkerRule = WorkerRule()

    @property
    def pushes(self) -> Pushes:
        """What its workers push."""
        return self.worker_rule.pushes

    @property
    def push_moves_view(self) -> bool:
        """Whether a view plus a push is the next view, so that the worker knows it before the server answers."""
        return self.view_is_state and self.pushes == "displacement"

    def apply(self, params: Tensor, push: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        """Update ``params`` f32[n] and the state vectors in place; a gradient ``push`` may be used as scratch."""
        raise NotImplementedError

    def apply_round(
        self,
        params: Tensor,
        pushes: Sequence[tuple[Tensor, float]],
        owns: Sequence[Vectors],
        shared: Vectors,
        ctx: Context,
    ) -> None:
        """Update ``params`` f32[n] by the (push, weight) of every worker of a round; the weights add up to 1.

        By default, this calls ``apply`` with the weighted mean of the pushes.
        """
        mean = torch.zeros_like(params)
        for push, weight in pushes:
            mean.add_(push, alpha=weight)
        self.apply(params, mean, owns[-1], shared, ctx)

    def enter(self, own: Vectors, params: Tensor) -> None:
        """Prepare a new worker's vectors, which are zero."""

    def view(self, out: Tensor, params: Tensor, own: Vectors, shared: Vectors, ctx: Context) -> None:
        """Write into ``out`` f32[n] the parameters this worker computes its next gradient on."""
        out.copy_(params)

    def resum(self, shared: Vectors, workers: Iterable[tuple[Vectors, Context]]) -> None:
        """Rebuild shared sums from each worker's vectors and scalars, to undo drift and after a worker left."""

    def velocity(self, own: Vectors, shared: Vectors, ctx: Context) -> Tensor:
        """The velocity v that the update of ``ctx`` has just moved the parameters along, f32[n]."""
        raise NotImplementedError(f"{type(self).__name__} has no velocity")


@dataclass(frozen=True)
class Algorithm:
    """A named rule: what users choose with ``--algorithm``."""

    name: str
    paper: str
    build: Callable[..., Rule]
    takes_own: bool = False  # whether an optimizer that danaz does not know can make its steps itself
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # values of hyper-parameters that are names

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.build) or "").split("\n", 1)[0]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Name -> default of everything the rule's author lets users set, beside the optimizer."""
        return {name: default for name, default in self._parameters.items() if name != OPTIMIZER}

    @property
    def takes_any_optimizer(self) -> bool:
        """Whether the rule is built over an optimizer; otherwise it is a rule of SGD."""
        return OPTIMIZER in self._parameters

    @property
    def _parameters(self) -> dict[str, Any]:
        return {p.name: p.default for p in inspect.signature(self.build).parameters.values()}

    def rule(
        self, *, optimizer: Optimizers | None = None, sync_period: int | None = None, **hyperparameters: Any
    ) -> Rule:
        """Build the rule from those of the given hyper-parameters that it has (ASGD has no momentum, say).

        ``optimizer`` is by default SGD with the algorithm's momentum.

        Raises:
            UnfitOptimizerError: the rule cannot carry out this optimizer.
            UnsupportedPeriodError: ``sync_period`` is above 1, and the rule must see every gradient.
            UserModuleError: what the user's own factory returns is no Rule.
        """
        given = {k: v for k, v in hyperparameters.items() if k in self.hyperparameters}
        for own in (each for each in optimizer or () if isinstance(each, Own) and not self.takes_own):
            able = sorted(name for name, other in ALGORITHMS.items() if other.takes_own)
            raise UnfitOptimizerError(
                f"{self.name} does not take {own.class_name}: the cluster makes the steps in its place, and must know "
                "their mathematics. Train with SGD, Adam, AdamW, NAdam, RMSprop or Adagrad of torch.optim, or with an "
                f"algorithm that lets your own optimizer make its steps: {', '.join(able)}"
            )
        if optimizer is not None and self.takes_any_optimizer:
            given[OPTIMIZER] = optimizer
        elif optimizer is not None:
            momentum = self._momentum_of_sgd(optimizer)
            given |= {"momentum": momentum} if "momentum" in self.hyperparameters else {}
        if sync_period is not None and "sync_period" in self.hyperparameters:
            given["sync_period"] = sync_period
        elif sync_period not in (None, 1):
            raise UnsupportedPeriodError(
                f"{self.name} cannot push every {sync_period} mini-batches: its server must see each gradient. "
                "Use sync_period 1, or an algorithm that steps on the worker, such as dana, asgd or easgd."
            )
        rule = self.build(**given)
        if not isinstance(rule, Rule):
            raise UserModuleError(f"{self.name!r} returned {type(rule).__name__}, expected a danaz.rules.Rule")
        return rule

    def refusal(self, optimizers: Optimizers) -> str:
        """Why the rule cannot carry out ``optimizers``; empty if it can."""
        try:
            self.rule(optimizer=optimizers)
        except UnfitOptimizerError as error:
            return str(error)
        return ""

    def _momentum_of_sgd(self, optimizers: Optimizers) -> float:
        """The momentum of all parameter groups. Raises UnfitOptimizerError if it is not that of SGD, and one."""
        if not all(isinstance(optimizer, Sgd) for optimizer in optimizers):
            raise UnfitOptimizerError(
                f"{self.name} is a rule of SGD and cannot carry out {optimizers[0].name}. Use an algorithm that "
                "carries out any optimizer, such as dana; `danaz algorithms` shows them"
            )
        momenta = {optimizer.momentum for optimizer in optimizers}
        if len(momenta) > 1 and "momentum" in self.hyperparameters:
            raise UnfitOptimizerError(
                f"{self.name} has one momentum for all parameter groups, and these have {sorted(momenta)}. Use an "
                "algorithm that carries out any optimizer, such as dana"
            )
        return max(momenta)

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        """Raises HyperparameterError for a name that this algorithm lacks or a value of another kind."""
        own = {name: default for name, default in self.hyperparameters.items() if name not in FROM_SETTINGS}
        for name, value in hyperparameters.items():
            if name in FROM_SETTINGS:
                raise HyperparameterError(f"{name} is a setting of the run itself, and not of its hyperparameters")
            if name not in own:
                there_are = f"it has {', '.join(own)}" if own else "it has none of its own"
                raise HyperparameterError(f"{self.name} has no hyper-parameter {name!r}; {there_are}")
            kind, default = type(own[name]), own[name]
            fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
            if not fits or (isinstance(value, bool) and kind is not bool) or value in (inf, -inf) or value != value:
                expected = "text" if kind is str else f"a finite {kind.__name__}"
                raise HyperparameterError(
                    f"{self.name}: {name} = {value!r}, expected {expected}, as its default {default!r} is"
                )
            if name in self.choices and value not in self.choices[name]:
                there_are = ", ".join(self.choices[name])
                raise HyperparameterError(f"{self.name}: {name} = {value!r}, expected one of {there_are}")


ALGORITHMS: dict[str, Algorithm] = {}
OPTIMIZER = "optimizer"  # the parameter of a factory whose rule carries out any optimizer
FROM_SETTINGS = ("momentum", "lr_correction", "weight_decay", "sync_period")  # they have keys of their own


class HyperparameterError(ValueError):
    """The algorithm has no such hyper-parameter, or does not accept this value for it."""


class UnfitOptimizerError(ValueError):
    """The rule cannot carry out this optimizer; the message says why."""


class UnsupportedPeriodError(ValueError):
    """The rule cannot leave out pushes."""


class UnknownAlgorithmError(ValueError):
    """No algorithm has this name."""


def sgd_unless(optimizer: Optimizers | None, momentum: float = 0.9) -> Optimizers:
    """Return ``optimizer``, or SGD with this momentum if there is none."""
    return Optimizers([Sgd(momentum)]) if optimizer is None else optimizer


def algorithm(
    name: str, *, paper: str, takes_own: bool = False, choices: Mapping[str, tuple[str, ...]] | None = None
) -> Callable[[Callable[..., Rule]], Callable[..., Rule]]:
    """Register a rule's factory under the name that users type. ``takes_own`` and ``choices``: see Algorithm."""

    def register(build: Factory) -> Factory:
        ALGORITHMS[name] = Algorithm(name, paper, build, takes_own, choices or {})
        return build

    return register


def find_algorithm(name: str) -> Algorithm:
    """Look an algorithm up by name, or import the user's own: ``package.module:factory``.

    Raises:
        UnknownAlgorithmError: no algorithm has this name; the message proposes the nearest one.
        UserModuleError: the user's own algorithm cannot be imported.
    """
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if ":" in name:
        return Algorithm(name, paper="", build=import_user_name(name, f"algorithm {name!r}"))
    nearest = get_close_matches(name, ALGORITHMS, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise UnknownAlgorithmError(f"unknown algorithm {name!r}.{hint} There are: {', '.join(sorted(ALGORITHMS))}.")
