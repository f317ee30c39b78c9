"""The update rules. A new one is a file beside these and its name in the import below."""

from danaz.rules import (
    asgd,
    averaging,
    dana,
    decentralised,
    delay_compensated,
    elastic,
    gap_aware,
    lars,
    nadam,
    staleness_aware,
)
from danaz.rules.base import (
    ALGORITHMS,
    Algorithm,
    Context,
    Rule,
    UnknownAlgorithmError,
    Vectors,
    WorkerRule,
    algorithm,
    find_algorithm,
)
from danaz.rules.chain import Transform, chain, scale_gradient
from danaz.rules.dana import dana_zero

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Context",
    "Rule",
    "Transform",
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
    "elastic",
    "find_algorithm",
    "gap_aware",
    "lars",
    "nadam",
    "scale_gradient",
    "staleness_aware",
]
