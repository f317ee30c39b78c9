"""What a server must know before anyone joins."""

from __future__ import annotations

from dataclasses import dataclass

from danaz.rules import Rule, find_algorithm


@dataclass(frozen=True)
class ServerSettings:
    """What the server must know before anyone joins."""

    algorithm: str
    workers: int  # training starts when so many have joined
    digest: str = ""  # of the configuration that the workers must run too
    lr_correction: bool = True
    sync_period: int | None = None  # mini-batches between a worker's pushes; None: the rule's own default
    wire_view: str = "fp32"  # codec of the views
    gap_every: int = 1  # measure the gap at every so many updates, 0 never
    worker_timeout_s: float = 60.0

    def rule(self, momentum: float) -> Rule:
        """The rule of these settings. Raises UnknownAlgorithmError and UnsupportedPeriodError."""
        return find_algorithm(self.algorithm).rule(
            momentum=momentum, lr_correction=self.lr_correction, sync_period=self.sync_period
        )
