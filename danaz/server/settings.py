"""The settings of a server, and those that it shares with the other processes of its run."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from danaz.optimizers import SGD, Optimizers
from danaz.options.shared import Serving, Training
from danaz.rules import Rule, find_algorithm


@dataclass(frozen=True)
class CommonSettings(Serving, Training):
    """What each process of a run knows: the options that they share, and two values that follow from the config."""

    digest: str = ""  # of the configuration: server and workers must agree
    gap_every: int = 1  # updates between measurements of the gap; 0: never measure it


@dataclass(frozen=True)
class ServerSettings(CommonSettings):
    """What the server must know before anyone joins. Training starts when ``workers`` have joined."""

    weight_decay: tuple[float, ...] = ()  # of each parameter group, for rules that must separate it from the gradient
    worker_timeout_s: float = 60.0
    recovery_s: float = 20.0  # a restarted server waits this long for the workers it knew
    shard: int = 0  # this server's slice; shard 0 leads: it leases batches, writes the journal and knows the version
    shards: int = 1
    memory_bytes: float = inf  # of the server's machine: a model that cannot fit is refused before it is received

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
