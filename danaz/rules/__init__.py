"""The update rules. A new one is a file beside these and its name in the import below."""

from danaz.optimizers import Optimizers, Vectors
from danaz.rules import (
    asgd,
    averaging,
    dana,
    decentralised,
    delay_compensated,
    diloco,
    elastic,
    gap_aware,
    lars,
    local,
    nadam,
    staleness_aware,
)
from danaz.rules.base import (
    ALGORITHMS,
    Algorithm,
    Context,
    Rule,
    UnfitOptimizerError,
    UnknownAlgorithmError,
    WorkerRule,
    algorithm,
    find_algorithm,
    sgd_unless,
)
from danaz.rules.chain import Transform, chain, scale_gradient
from danaz.rules.dana import dana_zero

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Context",
    "Optimizers",
    "Rule",
    "Transform",
    "UnfitOptimizerError",
    "UnknownAlgorithmError",
    "Vectors",
    "WorkerRule",
    "algorithm",
    "asgd",
    "averaging",
    "chain",
    "dana",
    "dana_zero",
    "decentralised",
    "delay_compensated",
    "diloco",
    "elastic",
    "find_algorithm",
    "gap_aware",
    "lars",
    "local",
    "nadam",
    "scale_gradient",
    "sgd_unless",
    "staleness_aware",
]
