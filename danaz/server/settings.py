"""The settings of a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from danaz.optimizers import SGD, Optimizers
from danaz.rules import Rule, find_algorithm


@dataclass(frozen=True)
class ServerSettings:
    """What the server must know before anyone joins."""

    algorithm: str
    workers: int  # training starts when this number has joined
    digest: str = ""  # of the configuration that the workers must run too
    lr_correction: bool = True
    weight_decay: tuple[float, ...] = ()  # of each parameter group, for rules that must separate it from the gradient
    sync_period: int | None = None  # mini-batches between a worker's pushes; None: the rule's own default
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)  # the algorithm's own
    wire_view: str = "fp32"  # codec of the views
    gap_every: int = 1  # updates between measurements of the gap; 0: never measure it
    worker_timeout_s: float = 60.0
    recovery_s: float = 20.0  # a restarted server waits this long for the workers it knew
    checkpoint_s: float = 30.0  # between checkpoints; 0: write none
    shard: int = 0  # this server's slice; shard 0 leads: it leases batches, writes the journal and knows the version
    shards: int = 1
    memory_bytes: float = inf  # of the server's machine: a model that cannot fit is refused before it is received
    refuse_outliers: bool = False  # refuse pushes far outside the cluster's size, instead of only reporting them

    def rule(self, optimizers: Optimizers = SGD) -> Rule:
        """The rule of these settings, which carries out ``optimizers``.

        Raises UnknownAlgorithmError, UnsupportedPeriodError, HyperparameterError and UnfitOptimizerError.
        """
        algorithm = find_algorithm(self.algorithm)
        algorithm.check(self.hyperparameters)
        return algorithm.rule(
            **self.hyperparameters,
            optimizer=optimizers,
            lr_correction=self.lr_correction,
            weight_decay=self.weight_decay,
            sync_period=self.sync_period,
        )
