"""What one gradient does to the parameters: SGD, Adam and their relatives, for algorithms to carry out."""

from danaz.optimizers.adaptive import Adagrad, Adam, NAdam, RMSprop
from danaz.optimizers.base import Optimizer, OptimizerError, Optimizers, Scalars, Vectors
from danaz.optimizers.by_name import KINDS, optimizers_from_lists, optimizers_to_lists
from danaz.optimizers.own import Own
from danaz.optimizers.sgd import PlainSgd, Sgd

SGD = Optimizers([Sgd()])  # as the DANA paper has it

__all__ = [
    "KINDS",
    "SGD",
    "Adagrad",
    "Adam",
    "NAdam",
    "Optimizer",
    "OptimizerError",
    "Optimizers",
    "Own",
    "PlainSgd",
    "RMSprop",
    "Scalars",
    "Sgd",
    "Vectors",
    "optimizers_from_lists",
    "optimizers_to_lists",
]
