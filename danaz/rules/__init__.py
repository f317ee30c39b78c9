"""The update rules. A new one is a file beside these and its name in the import below."""

from danaz.rules import asgd as asgd
from danaz.rules import dana as dana
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
    "chain",
    "dana_zero",
    "find_algorithm",
    "scale_gradient",
]
