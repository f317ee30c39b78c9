"""The optimizers by name: how they travel in messages, and how a checkpoint holds them."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from danaz.optimizers.adaptive import Adagrad, Adam, NAdam, RMSprop
from danaz.optimizers.base import Optimizer, OptimizerError, Optimizers
from danaz.optimizers.own import Own
from danaz.optimizers.sgd import Sgd

KINDS: dict[str, type[Optimizer]] = {kind.name: kind for kind in (Sgd, Adam, NAdam, RMSprop, Adagrad, Own)}


def optimizers_to_lists(optimizers: Optimizers) -> list[Any]:
    """[name, [hyper-parameters of each group]]."""
    return [optimizers[0].name, [asdict(each) for each in optimizers]]


def optimizers_from_lists(lists: Any) -> Optimizers:
    """The optimizers that ``optimizers_to_lists`` wrote. Raises OptimizerError for anything else."""
    match lists:
        case [str(name), [_, *_] as groups] if name in KINDS:
            return Optimizers(_optimizer(KINDS[name], group) for group in groups)
    raise OptimizerError(f"[name, groups] was expected, with one of the names {', '.join(KINDS)}")


def _optimizer(kind: type[Optimizer], values: Any) -> Optimizer:
    kinds = {field.name: type(field.default) for field in fields(kind)}
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise OptimizerError(f"{kind.name} has the hyper-parameters {', '.join(kinds)}")
    for name, value in values.items():
        if type(value) is not kinds[name]:
            raise OptimizerError(f"{name} of {kind.name} should be of the type {kinds[name].__name__}")
    return kind(**values)
