"""An optimizer's state: as danaz keeps it, and as torch does, so that either can go on from what the other has done.

danaz keeps vectors over all parameters, on the worker, or in a server core of the same process. torch keeps tensors for
each parameter. Also, each has its own idea of what the parameters are. Those that danaz trains on are θ + a, which look
ahead along the momentum (under ssgd, they are torch's). Those of torch are θ; but θ + a for NAdam, and for SGD with
nesterov=True.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from danaz.optimizers import Adagrad, Adam, NAdam, Optimizer, Optimizers, Scalars
from danaz.rules import Rule
from danaz.server.core import ServerCore
from danaz.torch.alone import LocalLink
from danaz.vectors.counts import Counts
from danaz.vectors.cutting import cut
from danaz.vectors.layout import Layout
from danaz.worker import between
from danaz.worker.core import WorkerCore
from danaz.worker.group import Group
from danaz.worker.worker import Worker

Rows = dict[int, dict[str, Tensor]]  # torch's state: number of the parameter -> name -> tensor

_OF_ADAM = {"mean": "exp_avg", "square": "exp_avg_sq", "largest_square": "max_exp_avg_sq"}
TORCH_NAMES: dict[str, dict[str, str]] = {  # optimizer -> danaz' name of a vector -> torch's
    "sgd": {"velocity": "momentum_buffer"},
    "adam": _OF_ADAM,
    "nadam": _OF_ADAM,
    "rmsprop": {"square": "square_avg", "mean": "grad_avg", "velocity": "momentum_buffer"},
    "adagrad": {"square": "sum"},
}


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer remembers of its steps, as danaz has it."""

    vectors: Mapping[str, Tensor]  # f32[P] each
    counts: Counts  # number of gradients in each element, and η of the last

    def to(self, device: torch.device) -> OptimizerState:
        """Return the same state on ``device``."""
        return OptimizerState({name: each.to(device) for name, each in self.vectors.items()}, self.counts)

    def look_ahead(self, optimizers: Optimizers, layout: Layout, groups: Iterable[bool]) -> Tensor:
        """Return a f32[P], which the momentum will still cause, for those of the parameter ``groups`` that are true."""
        ahead = torch.zeros_like(next(iter(self.vectors.values())))
        for group in (group for group, wanted in enumerate(groups) if wanted):
            optimizer = optimizers.of(group)
            for start, stop, count, lr in self.counts.runs(*layout.groups[group]):
                state = cut(self.vectors, start, stop)
                optimizer.add_heading(ahead[start:stop], state, Scalars(lr, count), -optimizer.momentum)
        return ahead


# ---- torch's form ----------------------------------------------------------------------------------------------------


def to_torch(state: OptimizerState, optimizers: Optimizers, layout: Layout) -> Rows:
    """Return ``state`` as torch's optimizers have it, in new tensors on the CPU.

    A parameter that has made no step has no state, as in torch; but Adagrad begins with one.
    """
    rows: Rows = {}
    for number, (group, start, stop) in enumerate(layout.layers()):
        optimizer, entry = optimizers.of(group), layout.parameters[number]
        count = next(state.counts.runs(start, stop), (0, 0, 0, 0.0))[2]
        if count or isinstance(optimizer, Adagrad):
            rows[number] = _row(optimizer, count, {name: entry.of(each) for name, each in state.vectors.items()})
    return rows


def _row(optimizer: Optimizer, count: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return torch's state of one parameter, whose state in danaz is ``tensors`` after ``count`` gradients."""
    names = {name: their for name, their in TORCH_NAMES.get(optimizer.name, {}).items() if name in optimizer.state}
    row = {their: tensors[name].to("cpu", copy=True).contiguous() for name, their in names.items()}
    if optimizer.name != "sgd":
        row["step"] = torch.tensor(float(count))
    if isinstance(optimizer, Adam):
        row.setdefault("exp_avg", torch.zeros_like(row["exp_avg_sq"]))
    if isinstance(optimizer, NAdam):
        row["mu_product"] = torch.tensor(optimizer.course(count)[1])
    if isinstance(optimizer, Adagrad):
        row["sum"] += optimizer.initial
    return row


def from_torch(
    rows: Mapping[int, Mapping[str, Any]], optimizers: Optimizers, layout: Layout, lr: Sequence[float]
) -> OptimizerState:
    """Return the state that torch's ``rows`` describe, of an optimizer with the rates ``lr``.

    Raises ValueError if they are of another class of optimizer, or of other parameters.
    """
    vectors = {name: torch.zeros(layout.size) for name in optimizers.state}
    counts, rates = [0] * len(layout.parameters), [0.0] * len(layout.parameters)
    for number, (group, _, _) in enumerate(layout.layers()):
        row = {name: value for name, value in rows.get(number, {}).items() if value is not None}
        optimizer, entry = optimizers.of(group), layout.parameters[number]
        for name, their in TORCH_NAMES.get(optimizer.name, {}).items() if row else ():
            if name not in optimizer.state:
                continue
            if their not in row or row[their].shape != entry.shape:
                found = f"of shape {tuple(row[their].shape)}" if their in row else "missing"
                raise ValueError(
                    f"the optimizer's state has {their} of {entry.name} {found}, expected shape {entry.shape}: load "
                    "the state of the same class of optimizer over the same parameters"
                )
            entry.of(vectors[name]).copy_(row[their])
            if isinstance(optimizer, Adagrad):
                entry.of(vectors[name]).sub_(optimizer.initial)
        if row:
            counts[number], rates[number] = int(row.get("step", 1)), lr[group]
    stops = [entry.stop for entry in layout.parameters]
    return OptimizerState(vectors, Counts(tuple(stops), tuple(counts), tuple(rates)))


# ---- where danaz keeps it --------------------------------------------------------------------------------------------


class Keeper(Protocol):
    """Where a worker's state is kept."""

    def read(self) -> OptimizerState:
        """Return the state that belongs to the parameters in the model. It changes with the next step."""

    def begin_with(self, state: OptimizerState, ahead: Tensor) -> None:
        """Start from ``state``. The parameters in the model contain its look-ahead ``ahead`` f32[P]."""


@dataclass(frozen=True)
class OnWorker:
    """The worker keeps the state, and its server the look-ahead."""

    core: WorkerCore

    def read(self) -> OptimizerState:
        return OptimizerState(*self.core.current)

    def begin_with(self, state: OptimizerState, ahead: Tensor) -> None:
        self.core.begin_with(state.vectors, state.counts)


@dataclass(frozen=True)
class InCore:
    """A server core in this process keeps the vectors of these names, for all workers or for its only one."""

    core: ServerCore
    names: tuple[str, ...]

    def read(self) -> OptimizerState:
        self.core.settle()
        master, [member] = self.core.master, self.core.members.values()
        is_shared = self.names[0] in master.shared
        vectors = {name: (master.shared if is_shared else member.vectors)[name] for name in self.names}
        return OptimizerState(vectors, master.shared_counts if is_shared else member.counts)

    def begin_with(self, state: OptimizerState, ahead: Tensor) -> None:
        [member] = self.core.members.values()
        self.core.master.begin_with(member, state.vectors, state.counts, ahead)
        self.core.state.resum()


def same_state(group: Group, state: OptimizerState | None, device: torch.device) -> OptimizerState | None:
    """Return rank 0's ``state`` on every rank, with its vectors on ``device``."""
    if group.size == 1:
        return state
    facts = between.broadcast_object(group, None if state is None else [list(state.vectors), state.counts.to_lists()])
    if facts is None:
        return None
    names, counts = facts
    vectors = {name: between.broadcast(group, None if state is None else state.vectors[name]) for name in names}
    return OptimizerState(vectors, Counts.from_lists(counts)).to(device)


class StateAtHand:
    """The optimizer's state that this process has at hand, and the parameters that torch would have beside it."""

    def __init__(self, worker: Worker, rule: Rule, groups: Sequence[Mapping[str, Any]]):
        """``groups`` are those of the user's torch optimizer."""
        self._worker = worker
        self._keeper, self._optimizers = _keeper_of(worker, rule)
        each = [self._optimizers.of(number) for number in range(len(groups))]
        nesterov = [bool(group.get("nesterov", True)) for group in groups]
        self._torch_has_a = [one.steps_look_ahead and is_so for one, is_so in zip(each, nesterov, strict=True)]
        self._view_has_a = [one.steps_look_ahead or not rule.all_reduce for one in each]

    def read(self) -> OptimizerState | None:
        """Return the state; None if it is not at hand."""
        return None if self._keeper is None else self._keeper.read()

    def rows(self, state: OptimizerState) -> Rows:
        """Return ``state`` in torch's form."""
        return to_torch(state, self._optimizers, self._worker.flat.layout)

    def params_of_torch(self, state: OptimizerState, finished: bool) -> Tensor:
        """Return the parameters f32[P] that torch has where danaz has those in the model, as a copy.

        When a worker has ``finished``, θ is in its model; before, it is the view.
        """
        has = [False] * len(self._view_has_a) if finished else self._view_has_a
        return self._moved(state, has, self._torch_has_a)

    def view_of(self, state: OptimizerState) -> Tensor:
        """Return the view f32[P] that goes with torch's parameters in the model, and with ``state``."""
        return self._moved(state, self._torch_has_a, self._view_has_a)

    def state_of(self, rows: Mapping[int, Mapping[str, Any]], lr: Sequence[float]) -> OptimizerState | None:
        """Return the state that torch's ``rows`` describe, at the rates ``lr``; None if this process cannot keep it."""
        if self._keeper is None:
            return None
        return from_torch(rows, self._optimizers, self._worker.flat.layout, lr).to(self._worker.flat.params.device)

    def begin_with(self, state: OptimizerState) -> None:
        """Train on from ``state`` and the view in the model."""
        assert self._keeper is not None
        ahead = state.look_ahead(self._optimizers, self._worker.flat.layout, self._view_has_a)
        self._keeper.begin_with(state, ahead)

    def _moved(self, state: OptimizerState, has_a: Sequence[bool], gets_a: Sequence[bool]) -> Tensor:
        layout, params = self._worker.flat.layout, self._worker.flat.params.clone()
        pairs = list(zip(has_a, gets_a, strict=True))
        if any(has != gets for has, gets in pairs):
            params += state.look_ahead(self._optimizers, layout, [gets and not has for has, gets in pairs])
            params -= state.look_ahead(self._optimizers, layout, [has and not gets for has, gets in pairs])
        return params


def _keeper_of(worker: Worker, rule: Rule) -> tuple[Keeper | None, Optimizers]:
    """Return where this process keeps the state, if it does, and the optimizers whose state it is."""
    conversation, nothing = worker.conversation, Optimizers([Optimizer()])
    if conversation is None:
        return None, nothing
    local: Optimizers = getattr(rule.worker_rule, "optimizers", nothing)
    if local.state:
        return OnWorker(conversation.core), local
    last = getattr(rule, "rule", rule)  # of a chain
    carried: Optimizers = getattr(last, "optimizers", nothing)
    if carried.state and isinstance(conversation.link, LocalLink):
        return InCore(conversation.link.core, carried.state), carried
    return None, nothing
