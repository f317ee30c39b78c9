"""A live run: from what was asked for to processes on machines, and back to a summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from danaz.config import Config
from danaz.run_folder import new_run_folder, read_summary, write_settings
from danaz.settings import Settings
from launcher.hosts import Host
from launcher.logs import Echo
from launcher.machine import local_machines
from launcher.plan import Plan, Service, plan
from launcher.run import Outcome, run

SERVER_ADDRESS = "tcp://127.0.0.1:0"


class LaunchError(ValueError):
    """What was asked for cannot be launched."""


@dataclass(frozen=True)
class Cluster:
    """Where to run."""

    hosts: Sequence[Host]
    workers_per_host: int = 1
    collective: str = "horovod"

    @property
    def workers(self) -> int:
        return len(self.hosts) * self.workers_per_host

    @property
    def ranks_per_worker(self) -> int:
        """Of the largest worker."""
        slots = max(host.slots or 1 for host in self.hosts)
        return -(-slots // self.workers_per_host)


@dataclass(frozen=True)
class Launch:
    """A run that is ready to start."""

    run: Path
    plan: Plan


def prepare_config(config: Config, cluster: Cluster, out: Path | None, record: bool = False) -> Launch:
    """Make the run folder of a config, and the plan whose ranks train it."""
    config = config.model_copy(update={"workers": cluster.workers})
    settings = Settings.of(
        config, schedule="live", collective=cluster.collective, ranks_per_worker=cluster.ranks_per_worker
    )
    check_workers(settings)
    run_folder = new_run_folder(out, f"{config.name}-{config.algorithm}")
    write_settings(run_folder, config.model_dump(mode="json"))
    command = [sys.executable, "-m", "danaz", "work", str((run_folder / "config.yaml").resolve())]
    return Launch(run_folder, make_plan(command, settings, cluster, run_folder, record))


def prepare_script(
    command: Sequence[str], settings: Settings, cluster: Cluster, out: Path | None, record: bool = False
) -> Launch:
    """Make the run folder of a user's own script, and the plan whose ranks run it."""
    settings = replace(
        settings,
        workers=cluster.workers,
        collective=cluster.collective,
        ranks_per_worker=cluster.ranks_per_worker,
    )
    check_workers(settings)
    name = next((Path(word).stem for word in command if word.endswith(".py")), Path(command[0]).name)
    run_folder = new_run_folder(out, f"{name}-{settings.algorithm}")
    write_settings(run_folder, {**asdict(settings), "command": list(command)})
    return Launch(run_folder, make_plan(command, settings, cluster, run_folder, record))


def check_workers(settings: Settings) -> None:
    """Raises LaunchError if the algorithm cannot train on so many workers, UnknownAlgorithmError if there is none."""
    from danaz.rules import find_algorithm

    limit = find_algorithm(settings.algorithm).rule().max_workers
    if limit is not None and settings.workers > limit:
        raise LaunchError(
            f"{settings.algorithm} trains on {limit} worker, {settings.workers} were asked for; "
            "use --hosts localhost:1, or another --algorithm"
        )


def make_plan(command: Sequence[str], settings: Settings, cluster: Cluster, run_folder: Path, record: bool) -> Plan:
    """One Horovod world over everything for an all-reduce algorithm; else a server, and a world for each worker."""
    from danaz.rules import find_algorithm

    all_reduce = find_algorithm(settings.algorithm).rule().all_reduce
    env = {**os.environ, "DANAZ_SETTINGS": settings.to_json()}
    if all_reduce:
        env["DANAZ_RUN"] = str(run_folder.resolve())
    server = [sys.executable, "-m", "danaz", "serve", "--bind", SERVER_ADDRESS, "--run", str(run_folder.resolve())]
    return plan(
        cluster.hosts,
        command,
        one_world=all_reduce,
        env=env,
        cwd=os.getcwd(),
        workers_per_host=cluster.workers_per_host,
        services=[] if all_reduce else [Service("server", server + ["--record"] * record, announces="DANAZ_SERVER")],
        machines=local_machines(cluster.hosts),
    )


def execute(launch: Launch, echo: Echo | None = None) -> tuple[Outcome, dict[str, Any] | None]:
    """Run to the end; returns how it ended and, if it ended well, its summary."""
    outcome = run(launch.plan, launch.run, echo=echo)
    return outcome, read_summary(launch.run) if outcome.exit_code == 0 else None
