"""What the launcher tells each process of a run: how the cluster trains, and the place of the process in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from danaz.options.shared import Servers, Training
from danaz.protocol.keys import WorkerKeys, take_worker_keys
from danaz.run.config import Config
from danaz.server.settings import CommonSettings, ServerSettings
from danaz.vectors.codecs import Compressor, push_codec
from danaz.vectors.cutting import chunks_of_shards
from danaz.vectors.layout import Layout

FROM_LAUNCHER = "`danaz launch` sets it; unset all DANAZ_ variables to train without"


@dataclass(frozen=True)
class Settings(Servers, CommonSettings):
    """The settings of a run, which all its processes share. They travel as JSON in DANAZ_SETTINGS."""

    algorithm: str = "baseline"  # of a process that nobody launched, and which trains alone
    warmup_epochs: float = 0.0
    collective: str = "none"  # horovod or torch; none: a process alone
    ranks_per_worker: int = 1
    schedule: str = "live"

    @classmethod
    def of(cls, config: Config, *, schedule: str, collective: str) -> Settings:
        """Return the settings of a run of ``config``."""
        return cls(
            **{field.name: getattr(config, field.name) for field in fields(Training)},
            warmup_epochs=config.lr_schedule.warmup_epochs,
            gap_every=gap_every(config.gap),
            digest=config.digest(),
            collective=collective,
            schedule=schedule,
        )

    def facts(self) -> dict[str, Any]:
        """Return the entries of summary.json that these settings give."""
        names = ("algorithm", "workers", "ranks_per_worker", "schedule", "seed", "collective")
        return {name: getattr(self, name) for name in names}

    def for_server(
        self, workers: int | None = None, weight_decay: tuple[float, ...] = (), shard: int = 0
    ) -> ServerSettings:
        """Return the settings of a server core, which starts when ``workers`` (default: all) have joined.

        ``weight_decay``, one a parameter group, is known where the server is in the optimizer's own process.
        """
        values = {field.name: getattr(self, field.name) for field in fields(CommonSettings)}
        if workers is not None:
            values["workers"] = workers
        return ServerSettings(**values, weight_decay=weight_decay, shard=shard, shards=self.server_shards)

    def compressor(self, layout: Layout) -> Compressor | None:
        """Return what a worker compresses its pushes with; None if they travel as they are."""
        if self.wire == "fp32":
            return None
        spans = chain.from_iterable(chunks_of_shards(layout.size, self.server_shards))
        return Compressor(push_codec(self.wire), list(spans), self.wire_warmup_epochs)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Invert to_json. Raises ValueError for text that this version did not write."""
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
    """Return on, off or every:K as a number of updates; 0 means never."""
    return {"on": 1, "off": 0}[gap] if gap in ("on", "off") else int(gap.removeprefix("every:"))


@dataclass(frozen=True)
class RankInfo:
    """This process's place in the cluster."""

    worker: int = 0
    device: int = 0  # index of the GPU of its machine that this rank uses
    local_rank: int = 0  # among the ranks of all workers on its machine
    local_size: int = 1
    incarnation: int = 1
    launched: bool = False  # a launcher started it, which decides what all processes must agree on
    guest: bool = False  # it joined a running job, which goes on without it; told to end, it leaves in good order
    server: str | None = None  # tcp://host:port; None: train by all-reduce, or alone
    followers: tuple[str, ...] = ()  # addresses of the other shards, in order
    run: Path | None = None  # the run folder, for the process that writes it
    keys: WorkerKeys | None = None  # None: the server believes whoever connects


def server_variable(shard: int) -> str:
    """Return the name of the variable that holds a shard's address."""
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
    """Read the launcher's variables. Without them, one process trains alone. Raises ValueError for bad values."""
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
