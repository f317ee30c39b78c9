"""What the launcher tells each process of a run: its place in the cluster and how the cluster trains."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

from danaz.protocol.keys import WorkerKeys, take_worker_keys
from danaz.run.config import Config
from danaz.server.settings import ServerSettings
from danaz.vectors.codecs import Compressor, push_codec
from danaz.vectors.cutting import chunks_of_shards
from danaz.vectors.layout import Layout

FROM_LAUNCHER = "`danaz launch` sets it; unset all DANAZ_ variables to train without"


@dataclass(frozen=True)
class Settings:
    """The run's settings, the same for all its processes. They travel as JSON in DANAZ_SETTINGS."""

    algorithm: str = "baseline"
    workers: int = 1
    seed: int = 0
    warmup_epochs: float = 0.0
    lr_correction: bool = True
    sync_period: int | None = None
    pipeline: bool = False  # compute the next batch while the last one is pushed
    hyperparameters: dict[str, Any] = field(default_factory=dict)  # the algorithm's own
    wire: str = "fp32"  # codec of pushes
    wire_view: str = "fp32"  # and of views
    wire_warmup_epochs: float = 0.0  # of the cluster, in which pushes travel as they are
    gap_every: int = 1
    digest: str = ""  # of the configuration: server and workers must agree
    collective: str = "none"  # horovod or torch; none: a process alone
    ranks_per_worker: int = 1
    schedule: str = "live"
    checkpoint_s: float = 30.0  # between the server's checkpoints, 0 never
    server_shards: int = 1  # server processes, each with a slice of the vector
    refuse_outliers: bool = False  # pushes far outside the cluster's size

    @classmethod
    def of(cls, config: Config, *, schedule: str, collective: str) -> Settings:
        """The settings of a run of ``config``; a field that has the name of a key of the config has its value."""
        shared = {field.name for field in fields(cls)} & Config.model_fields.keys() - {"schedule"}
        return cls(
            **{name: getattr(config, name) for name in shared},
            warmup_epochs=config.lr_schedule.warmup_epochs,
            gap_every=gap_every(config.gap),
            digest=config.digest(),
            collective=collective,
            schedule=schedule,
        )

    def facts(self) -> dict[str, Any]:
        """What these settings contribute to summary.json."""
        names = ("algorithm", "workers", "ranks_per_worker", "schedule", "seed", "collective")
        return {name: getattr(self, name) for name in names}

    def for_server(
        self, workers: int | None = None, weight_decay: tuple[float, ...] = (), shard: int = 0
    ) -> ServerSettings:
        """What a server core needs of them; it starts when ``workers`` (default: all) have joined.

        ``weight_decay``, one a parameter group, is known where the server is in the optimizer's own process.
        """
        return ServerSettings(
            algorithm=self.algorithm,
            workers=self.workers if workers is None else workers,
            digest=self.digest,
            lr_correction=self.lr_correction,
            weight_decay=weight_decay,
            sync_period=self.sync_period,
            hyperparameters=self.hyperparameters,
            wire_view=self.wire_view,
            gap_every=self.gap_every,
            checkpoint_s=self.checkpoint_s,
            shard=shard,
            shards=self.server_shards,
            refuse_outliers=self.refuse_outliers,
        )

    def compressor(self, layout: Layout) -> Compressor | None:
        """What a worker compresses its pushes with, None if it does not."""
        if self.wire == "fp32":
            return None
        spans = chain.from_iterable(chunks_of_shards(layout.size, self.server_shards))
        return Compressor(push_codec(self.wire), list(spans), self.wire_warmup_epochs)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """The inverse of to_json. Raises ValueError for what is none of this version."""
        known = {field.name for field in fields(cls)}
        try:
            values: Any = json.loads(text)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError(f"DANAZ_SETTINGS is {text[:80]!r}, expected JSON: {FROM_LAUNCHER}")
        if set(values) - known:
            raise ValueError(f"DANAZ_SETTINGS holds {sorted(set(values) - known)}, which this version does not know")
        return cls(**values)


def gap_every(gap: str) -> int:
    """on, off or every:K as a number of updates; 0 is never."""
    return {"on": 1, "off": 0}[gap] if gap in ("on", "off") else int(gap.removeprefix("every:"))


@dataclass(frozen=True)
class RankInfo:
    """This process's place in the cluster."""

    worker: int = 0
    device: int = 0  # that this rank uses of its machine's
    local_rank: int = 0  # among the ranks of all workers on its machine
    local_size: int = 1
    incarnation: int = 1
    launched: bool = False  # by a launcher, which decides what all processes must agree on
    guest: bool = False  # it joined a run that goes on without it: when it is to end, it leaves in good order
    server: str | None = None  # tcp://host:port; None: train by all-reduce, or alone
    followers: tuple[str, ...] = ()  # the other shards' addresses, in order
    run: Path | None = None  # the run folder, for the process that writes it
    keys: WorkerKeys | None = None  # for a server that admits its run's workers alone


def server_variable(shard: int) -> str:
    """The variable that holds a shard's address."""
    return f"DANAZ_SERVER_{shard}" if shard else "DANAZ_SERVER"


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ValueError(f"{name} is {text!r}, expected a number: {FROM_LAUNCHER}")
    return int(text)


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ValueError(f"{name} is not set: {FROM_LAUNCHER}")
    return environment[name]


def from_environment(environment: MutableMapping[str, str] = os.environ) -> tuple[Settings, RankInfo]:
    """Read the launcher's variables; without them, one process trains alone. Raises ValueError for odd ones."""
    settings = Settings.from_json(environment["DANAZ_SETTINGS"]) if environment.get("DANAZ_SETTINGS") else Settings()
    run, server = environment.get("DANAZ_RUN"), environment.get("DANAZ_SERVER")
    others = range(1, settings.server_shards) if server else range(0)
    place = RankInfo(
        worker=_number(environment, "DANAZ_WORKER", 0),
        device=_number(environment, "DANAZ_LOCAL_DEVICE", 0),
        local_rank=_number(environment, "DANAZ_LOCAL_RANK", 0),
        local_size=_number(environment, "DANAZ_LOCAL_SIZE", 1),
        incarnation=_number(environment, "DANAZ_INCARNATION", 1),
        launched=bool(environment.get("DANAZ_SETTINGS")),
        guest="DANAZ_GUEST" in environment,
        server=server or None,
        followers=tuple(_text(environment, server_variable(shard)) for shard in others),
        run=Path(run) if run else None,
        keys=take_worker_keys(environment),
    )
    return settings, place
