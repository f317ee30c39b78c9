"""What one gradient does to the parameters: SGD, Adam and their relatives, for algorithms to carry out."""

from danaz.optimizers.adaptive import Adagrad, Adam, NAdam, RMSprop
from danaz.optimizers.base import Optimizer, Optimizers, Scalars, Vectors
from danaz.optimizers.sgd import PlainSgd, Sgd

KINDS: dict[str, type[Optimizer]] = {kind.name: kind for kind in (Sgd, Adam, NAdam, RMSprop, Adagrad)}

__all__ = [
    "KINDS",
    "Adagrad",
    "Adam",
    "NAdam",
    "Optimizer",
    "Optimizers",
    "PlainSgd",
    "RMSprop",
    "Scalars",
    "Sgd",
    "Vectors",
]
