"""A comparison consists of cells. Each cell is one run of the same experiment, and differs in what is compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from danaz.files.plain_yaml import YamlError, parse_yaml
from danaz.files.reading import read_yaml
from danaz.launch.prepare import Cluster
from danaz.rules import find_algorithm
from danaz.run.config import Config, ConfigError, load_config
from danaz.run.fit import check_workers
from danaz.run.settings import Settings
from danaz.worker.group import choose_collective
from launcher.hosts import parse_hostfile, parse_hosts

BASELINE = "baseline"  # with one worker, every algorithm is this one
COMPARED = ("algorithm", "workers", "schedule", "seed")  # the config keys in which cells may differ


class ComparisonError(ValueError):
    """This comparison cannot be run; the message says why, and what to do."""


class Grid(BaseModel):
    """All combinations of some algorithms, numbers of workers and seeds: simulated, or live on some hosts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    algorithms: tuple[str, ...] = Field(min_length=1)
    workers: tuple[int, ...] = ()  # simulated workers; empty: one worker, and the config's number
    seeds: int = Field(1, ge=1)  # number of seeds, counted from the config's seed
    schedule: str | None = None  # order of simulated workers; None: the config's
    hosts: str | None = None  # as in `danaz launch`; without hosts and hostfile, cells are simulated
    hostfile: Path | None = None
    workers_per_host: int = Field(1, ge=1)
    collective: str = "auto"

    @model_validator(mode="after")
    def _live_or_simulated(self) -> Grid:
        if self.is_live and (self.workers or self.schedule):
            raise ValueError(
                "a live cell takes its workers from hosts and workers_per_host, and has no schedule: leave out workers "
                "and schedule"
            )
        if self.hosts is not None and self.hostfile is not None:
            raise ValueError("give either hosts or a hostfile, not both")
        if any(workers < 1 for workers in self.workers):
            raise ValueError(f"workers should be 1 or more each, not {', '.join(map(str, self.workers))}")
        return self

    @property
    def is_live(self) -> bool:
        return self.hosts is not None or self.hostfile is not None


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    config: Config
    cluster: Cluster | None = None  # the machines of a live cell; None: simulated

    @property
    def name(self) -> str:
        """The name of its folder, which also identifies it in the comparison."""
        config, cluster = self.config, self.cluster
        if cluster is not None:
            how = f"live-{cluster.workers}x{cluster.ranks_per_worker}"
        else:
            how = f"{config.workers}-{config.schedule}" if config.workers > 1 else "1"
        return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{config.algorithm}-{how}-seed{config.seed}")

    @property
    def variant(self) -> str:
        """What else distinguishes this cell, as a prefix for messages, such as "lr 0.1, "; usually empty."""
        return ""

    def facts(self) -> dict[str, Any]:
        """Return the entries of summary.json that are known before the cell has run."""
        return {
            "algorithm": self.config.algorithm,
            "workers": self.config.workers,
            "ranks_per_worker": self.cluster.ranks_per_worker if self.cluster else 1,
            "schedule": "live" if self.cluster else self.config.schedule,
            "seed": self.config.seed,
        }


@dataclass(frozen=True)
class Comparison:
    """An experiment, and the cells that it consists of."""

    name: str
    config: Config  # shared by all cells; the compared keys have their defaults
    cells: tuple[Cell, ...]


def is_plan(path: Path) -> bool:
    """Return whether a YAML file describes a comparison by its cells, and not one experiment."""
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YamlError):
        return False  # load_config reports the error
    return isinstance(content, Mapping) and "cells" in content


def read_plan(path: Path, overrides: Sequence[str] = (), seeds: int | None = None) -> Comparison:
    """Read a comparison from YAML: ``config`` (a path relative to the file) and ``cells`` (a list of grids).

    ``seeds``, if given, replaces the number of seeds of every grid.

    Raises ComparisonError, ConfigError, UnreadableError and UnknownAlgorithmError.
    """
    content = read_yaml(path)
    if set(content) != {"config", "cells"} or not isinstance(content["cells"], list):
        raise ComparisonError(
            f"{path}: expected the keys config (a path) and cells (a list), found {', '.join(content)}"
        )
    changes = {} if seeds is None else {"seeds": seeds}
    grids = [make_grid(f"{path}, cell {number}", values, changes) for number, values in enumerate(content["cells"], 1)]
    return make_comparison(path.parent / str(content["config"]), grids, overrides, name=path.stem)


def make_grid(where: str, values: Any, changes: Mapping[str, Any] | None = None) -> Grid:
    """Check the values of a grid. Raises ComparisonError, whose message begins with ``where``."""
    if not isinstance(values, Mapping):
        raise ComparisonError(f"{where}: expected keys and values, found {values!r}")
    try:
        return Grid.model_validate({**values, **(changes or {})})
    except ValidationError as error:
        problems = [_explain(where, problem) for problem in error.errors()]
        raise ComparisonError("\n".join(problems)) from None


def make_comparison(path: Path, grids: Iterable[Grid], overrides: Sequence[str], name: str | None = None) -> Comparison:
    """Return the comparison of all ``grids`` on the experiment in the file ``path``; a cell of two grids is run once.

    Raises the errors that read_plan raises.
    """
    for override in overrides:
        if override.partition("=")[0].strip() in COMPARED[:3]:
            where = "use --algorithms, --workers and --schedule" if name is None else "edit the cells in the YAML"
            raise ConfigError(f"--set {override}: cells are compared by this key, so it cannot be set for all; {where}")
    base = load_config(path, overrides)
    cells: dict[str, Cell] = {}
    for grid in grids:
        for cell in _expand(grid, base, path, overrides):
            cells.setdefault(cell.name, cell)
    common = base.model_copy(update={key: Config.model_fields[key].default for key in COMPARED})
    return Comparison(name or base.name, common, tuple(cells.values()))


def _expand(grid: Grid, base: Config, path: Path, overrides: Sequence[str]) -> Iterator[Cell]:
    """Yield the cells of a grid, seed by seed: a comparison that is stopped early has run every algorithm."""
    cluster = _cluster(grid)
    numbers = (cluster.workers,) if cluster else grid.workers or (1, base.workers)
    seeds = range(base.seed, base.seed + grid.seeds)
    for seed, workers, algorithm in product(seeds, numbers, grid.algorithms):
        only_one = find_algorithm(algorithm).rule().max_workers == 1
        chosen = {"algorithm": algorithm, "workers": workers, "schedule": grid.schedule or base.schedule, "seed": seed}
        if cluster is None and (only_one or workers == 1):
            chosen |= {"algorithm": BASELINE, "workers": 1, "schedule": Config.model_fields["schedule"].default}
        config = load_config(path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in chosen.items())])
        check_workers(Settings.of(config, schedule="live" if cluster else config.schedule, collective="none"))
        yield Cell(config, cluster)


def _cluster(grid: Grid) -> Cluster | None:
    if not grid.is_live:
        return None
    collective, _ = choose_collective(grid.collective)
    hosts = parse_hostfile(grid.hostfile) if grid.hostfile is not None else parse_hosts(grid.hosts or "")
    return Cluster(hosts, grid.workers_per_host, collective)


def _explain(where: str, problem: Mapping[str, Any]) -> str:
    key = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r}. Known keys: {', '.join(Grid.model_fields)}"
    return f"{where}: {key} = {problem['input']!r}: {message}" if key else f"{where}: {message}"
