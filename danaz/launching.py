"""A live run: from what was asked for to processes on machines, and back to a summary."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from danaz.config import Config
from danaz.keys import ServerKeys, make_keys, to_json
from danaz.reach import Reach, find_machines
from danaz.rules import Rule
from danaz.run_folder import free_run_folder, read_summary, write_settings
from danaz.settings import Settings
from launcher.hosts import Host
from launcher.logs import Echo
from launcher.machine import Machine, is_loopback
from launcher.plan import PYTHON, Plan, Service, plan, slots_of
from launcher.run import Outcome, run


class LaunchError(ValueError):
    """What was asked for cannot be launched."""


@dataclass(frozen=True)
class Cluster:
    """Where to run."""

    hosts: Sequence[Host]
    workers_per_host: int = 1
    collective: str = "horovod"
    reach: Reach = field(default_factory=Reach)
    machines: Mapping[str, Machine] = field(default_factory=dict)  # what `find_out` learnt of them, by name

    @property
    def workers(self) -> int:
        return len(self.hosts) * self.workers_per_host

    @property
    def ranks_per_worker(self) -> int:
        """Of the largest worker."""
        slots = max(slots_of(host, self.machines) for host in self.hosts)
        return -(-slots // self.workers_per_host)


@dataclass(frozen=True)
class Launch:
    """A run that is ready to start. Nothing has been written yet."""

    run: Path
    settings: Mapping[str, Any]  # of config.yaml
    plan: Plan
    reach: Reach
    notes: Sequence[str] = ()  # what the user should be told


def prepare_config(config: Config, cluster: Cluster, out: Path | None, record: bool = False) -> Launch:
    """Choose the run folder of a config, and make the plan whose ranks train it."""
    config = config.model_copy(update={"workers": cluster.workers})
    settings = Settings.of(config, schedule="live", collective=cluster.collective)
    check_workers(settings)
    cluster, notes = find_out(cluster, settings)
    settings = replace(settings, ranks_per_worker=cluster.ranks_per_worker)
    run_folder = free_run_folder(out, f"{config.name}-{config.algorithm}")
    values = config.model_dump(mode="json")
    # A machine of the run need not see this folder.
    env = {"DANAZ_CONFIG": json.dumps(values)}
    command = [PYTHON, "-m", "danaz", "work"]
    todo = make_plan(command, settings, cluster, run_folder, record, env)
    return Launch(run_folder, values, todo, cluster.reach, notes)


def prepare_script(
    command: Sequence[str], settings: Settings, cluster: Cluster, out: Path | None, record: bool = False
) -> Launch:
    """Choose the run folder of a user's own script, and make the plan whose ranks run it."""
    settings = replace(settings, workers=cluster.workers, collective=cluster.collective)
    check_workers(settings)
    cluster, notes = find_out(cluster, settings)
    settings = replace(settings, ranks_per_worker=cluster.ranks_per_worker)
    name = next((Path(word).stem for word in command if word.endswith(".py")), Path(command[0]).name)
    run_folder = free_run_folder(out, f"{name}-{settings.algorithm}")
    todo = make_plan(command, settings, cluster, run_folder, record)
    return Launch(run_folder, {**asdict(settings), "command": list(command)}, todo, cluster.reach, notes)


def check_workers(settings: Settings) -> None:
    """Raises LaunchError if the algorithm cannot train on so many workers or not live, UnknownAlgorithmError if there
    is none, UnsupportedPeriodError."""
    rule = settings.for_server().rule(momentum=0.9)
    if settings.schedule == "live" and not rule.live:
        raise LaunchError(f"{settings.algorithm} has no server, and runs in the simulator only: danaz simulate …")
    _check_wire(settings, rule)
    limit = rule.max_workers
    if limit is not None and settings.workers > limit:
        raise LaunchError(
            f"{settings.algorithm} trains on {limit} worker, {settings.workers} were asked for; "
            "use --hosts localhost:1, or another --algorithm"
        )


def _check_wire(settings: Settings, rule: Rule) -> None:
    """Raises LaunchError if vectors of this rule cannot be sent in the codecs that were asked for."""
    codecs = {"wire": settings.wire, "wire_view": settings.wire_view}
    asked = " and ".join(f"{key} {name}" for key, name in codecs.items() if name != "fp32")
    if asked and rule.pushes == "parameters":
        raise LaunchError(
            f"{settings.algorithm} cannot train with {asked}: its workers push parameters, and the model itself would "
            "be rounded each time, and not a step of it. Use fp32, or an algorithm that pushes gradients or "
            "displacements, such as dana"
        )
    if asked and rule.all_reduce and settings.schedule == "live":
        raise LaunchError(
            f"{settings.algorithm} has no use for {asked}: live, its workers average by all-reduce, and "
            "nothing is sent to a server. Use fp32, or an algorithm with a server, such as dana"
        )


def is_all_reduce(settings: Settings) -> bool:
    """Whether one Horovod world over all machines does everything, without a server."""
    from danaz.rules import find_algorithm

    return find_algorithm(settings.algorithm).rule().all_reduce


def find_out(cluster: Cluster, settings: Settings) -> tuple[Cluster, list[str]]:
    """The cluster with what must be known of its machines, and what the user should be told.

    Raises ReachError for a machine that cannot take part.
    """
    reach, needs_server = cluster.reach, not is_all_reduce(settings)
    hub = reach.server if needs_server else cluster.hosts[0]
    machines, notes = find_machines(cluster.hosts, reach, hub=hub, collective=cluster.collective)
    cluster = replace(cluster, machines=machines)
    address = server_address(cluster)
    if needs_server and reach.insecure and not is_loopback(address):
        notes.append(f"INSECURE: the server listens on {address}, unencrypted, and believes whoever connects")
    return cluster, notes


def server_address(cluster: Cluster) -> str:
    """Where the server is for all machines of the cluster."""
    return cluster.machines.get(cluster.reach.server.name, Machine()).address or "127.0.0.1"


def make_plan(
    command: Sequence[str],
    settings: Settings,
    cluster: Cluster,
    run_folder: Path,
    record: bool,
    env: Mapping[str, str] | None = None,
) -> Plan:
    """One Horovod world over everything for an all-reduce algorithm; else a server, and a world for each worker."""
    all_reduce, reach = is_all_reduce(settings), cluster.reach
    travels = {**reach.env, "DANAZ_SETTINGS": settings.to_json(), **(env or {})}
    writer = cluster.hosts[0] if all_reduce else reach.server
    if reach.is_direct(writer):
        travels["DANAZ_RUN"] = str(run_folder.resolve())
    returns = None if reach.is_direct(writer) else "DANAZ_RUN"
    guarded = not all_reduce and not is_loopback(server_address(cluster)) and not reach.insecure
    server_keys, worker_keys = make_keys(cluster.workers) if guarded else (None, [])
    return plan(
        cluster.hosts,
        command,
        one_world=all_reduce,
        env=travels,
        cwd=reach.cwd,
        workers_per_host=cluster.workers_per_host,
        services=[] if all_reduce else [_server(cluster, record, returns, server_keys)],
        first_rank_returns=returns if all_reduce else None,
        secrets=[to_json(keys) for keys in worker_keys],
        machines=cluster.machines,
    )


def _server(cluster: Cluster, record: bool, returns: str | None, keys: ServerKeys | None) -> Service:
    reach, address = cluster.reach, server_address(cluster)
    command = [PYTHON, "-m", "danaz", "serve", "--bind", f"tcp://{address}:{reach.server_port or '*'}"]
    command += ["--insecure"] * reach.insecure + ["--record"] * record
    cwd = os.getcwd() if reach.is_direct(reach.server) else reach.cwd
    return Service(
        "server",
        command,
        announces="DANAZ_SERVER",
        returns=returns,
        host=reach.server,
        cwd=cwd,
        secret=None if keys is None else to_json(keys),
    )


def execute(launch: Launch, echo: Echo | None = None) -> tuple[Outcome, dict[str, Any] | None]:
    """Run to the end; returns how it ended and, if it ended well and something was trained, its summary."""
    launch.run.mkdir(parents=True, exist_ok=True)
    write_settings(launch.run, launch.settings)
    outcome = run(launch.plan, launch.run, echo=echo, agent_command=launch.reach.agent_command)
    trained = (launch.run / "summary.json").exists()
    return outcome, read_summary(launch.run) if outcome.exit_code == 0 and trained else None
