"""What a server must know before anyone joins. Light: launchers read it too."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """What the server must know before anyone joins."""

    algorithm: str
    workers: int  # training starts when so many have joined
    digest: str = ""  # of the configuration that the workers must run too
    lr_correction: bool = True
    gap_every: int = 1  # measure the gap at every so many updates, 0 never
    worker_timeout_s: float = 60.0
