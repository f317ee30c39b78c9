"""Plans a live run, starts its processes on the machines, and reads its summary at the end."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import sqrt
from pathlib import Path
from typing import Any, cast, get_args

from danaz.launch.invitation import Invitation, Task, write_invitations
from danaz.launch.options import RunOptions
from danaz.launch.reach import PREFIX, Reach, find_machines, replaced_here
from danaz.launch.resume import write_options
from danaz.protocol.keys import ServerKeys, make_keys, to_json
from danaz.run.config import Config
from danaz.run.fit import check_workers, is_all_reduce
from danaz.run.folder import read_summary, write_settings
from danaz.run.lock import RunFolderError
from danaz.run.milestones import MISSING
from danaz.run.settings import Settings, server_variable
from danaz.serving.checkpoint import delete_checkpoints, folder_of
from launcher.hosts import Host
from launcher.logs import Echo
from launcher.machine import Machine, in_url
from launcher.plan import ANNOUNCED, PYTHON, Plan, Returns, Service, Workers, plan, slots_of
from launcher.run import Outcome, Tell, run
from launcher.supervisor import OnFailure, Policy

BEGINS = "DANAZ_TRAINS"  # the server prints it with the first update
# Files that may be fetched from another machine. They are never executed, and never decide what is executed: only this
# machine writes config.yaml and launch.yaml.
RESULTS = (r"updates\.jsonl", r"summary\.json", r"parameters\.safetensors")
RECORDINGS = (r"recording\.bin", r"recording\.until-restart\.bin")


class LaunchError(ValueError):
    """The run that the user asked for cannot be launched; the message says why."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a run, and how they are divided into workers."""

    hosts: Sequence[Host]
    workers_per_host: int = 1
    collective: str = "horovod"
    reach: Reach = field(default_factory=Reach)
    machines: Mapping[str, Machine] = field(default_factory=dict)  # by name; `find_out` fills it

    @property
    def workers(self) -> int:
        return len(self.hosts) * self.workers_per_host

    @property
    def ranks_per_worker(self) -> int:
        """The number of ranks of the largest worker."""
        slots = max(slots_of(host, self.machines) for host in self.hosts)
        return -(-slots // self.workers_per_host)


def policy_of(options: RunOptions, settings: Settings) -> Policy:
    """Return what the launcher does after a failure. Raises LaunchError for what the algorithm cannot do."""
    wanted = options.on_worker_failure
    if wanted not in (None, *get_args(OnFailure)):
        raise LaunchError(f"--on-worker-failure {wanted}: expected {', '.join(get_args(OnFailure))}")
    if not is_all_reduce(settings):
        return Policy(cast("OnFailure", wanted or "restart"), max_restarts=options.max_restarts)
    if wanted in ("restart", "continue"):
        raise LaunchError(
            f"--on-worker-failure {wanted}: under {settings.algorithm} all machines are one Horovod world, in "
            "which any failure ends the run; use an asynchronous algorithm, such as dana, or "
            "--on-worker-failure stop"
        )
    if options.invite or options.resumes:
        what = "nobody can join later" if options.invite else "nothing is kept to go on from"
        raise LaunchError(f"under {settings.algorithm}, which has no server, {what}; use an asynchronous algorithm")
    return Policy("stop")


@dataclass(frozen=True)
class Launch:
    """A run that is ready to start. Nothing has been written yet."""

    run: Path
    settings: Mapping[str, Any]  # written to config.yaml
    plan: Plan
    reach: Reach
    policy: Policy = field(default_factory=Policy)
    notes: Sequence[str] = ()  # what the user should be told
    invitations: Sequence[Invitation] = ()
    resumes: bool = False  # it continues what is in its folder
    options: Mapping[str, Any] = field(default_factory=dict)  # written to launch.yaml

    @property
    def shards_elsewhere(self) -> list[int]:
        """The shards that do not write into the run folder themselves."""
        return [shard for shard, service in enumerate(self.plan.services) if service.returns]


def name_of(task: Config | Settings, command: Sequence[str] = ()) -> str:
    """Return the name for the folder of a run: the config or the script, and the algorithm."""
    if isinstance(task, Config):
        return f"{task.name}-{task.algorithm}"
    script = next((Path(word).stem for word in command if word.endswith(".py")), Path(command[0]).name)
    return f"{script}-{task.algorithm}"


def prepare_config(config: Config, cluster: Cluster, run: Path, options: RunOptions | None = None) -> Launch:
    """Return the launch whose ranks train a config in the run folder ``run``."""
    options = options or RunOptions()
    if not options.resumes:  # a resumed run keeps its number, however many machines there are now
        config = config.model_copy(update={"workers": cluster.workers})
    settings = Settings.of(config, schedule="live", collective=cluster.collective)
    values = config.model_dump(mode="json")
    # The config travels in the environment, for a machine need not see the run folder.
    env = {"DANAZ_CONFIG": json.dumps(values)}
    command = [PYTHON, "-m", "danaz", "work"]
    return _prepare(Task(command, env), settings, cluster, run, options, values)


def prepare_script(
    command: Sequence[str], settings: Settings, cluster: Cluster, run: Path, options: RunOptions | None = None
) -> Launch:
    """Return the launch whose ranks run a user's own script in the run folder ``run``."""
    options = options or RunOptions()
    if not options.resumes:
        settings = replace(settings, workers=cluster.workers)
    settings = replace(settings, collective=cluster.collective)
    return _prepare(Task(command), settings, cluster, run, options, {"command": list(command)})


def _prepare(
    task: Task, settings: Settings, cluster: Cluster, run: Path, options: RunOptions, values: Mapping[str, Any]
) -> Launch:
    settings = replace(settings, **options.serving)
    check_workers(settings)
    check_shards(settings, options)
    check_server_hosts(cluster.reach, options)
    policy = policy_of(options, settings)
    cluster, notes = find_out(cluster, settings)
    settings = replace(settings, ranks_per_worker=cluster.ranks_per_worker)
    plan, invitations = make_plan(task, settings, cluster, run, options)
    if "command" in values:
        values = {**asdict(settings), **values}
    notes += [*replaced_here(plan, cluster.reach), *rate_notes(settings)]
    return Launch(run, values, plan, cluster.reach, policy, notes, invitations, options.resumes)


def rate_notes(settings: Settings) -> list[str]:
    """Return sentences that say how the cluster changes the learning rate of the script or config."""
    workers, epochs = settings.workers, settings.warmup_epochs
    notes = []
    if is_all_reduce(settings) and workers > 1 and settings.lr_scaling != "none":
        by_n, by_root = f"{workers}, the number of workers", f"{sqrt(workers):.3g}, the root of their number"
        factor = {
            "linear": by_n,
            "sqrt": by_root,
            "auto": f"{by_n}; with an adaptive optimizer, such as Adam, by {by_root}",
        }
        notes.append(f"learning rate: {settings.algorithm} multiplies it by {factor[settings.lr_scaling]}")
    if epochs and workers > 1:
        notes.append(f"learning rate: it rises from 1/{workers} to its full size over the first {epochs:g} epochs")
    return notes


def check_shards(settings: Settings, options: RunOptions) -> None:
    """Raise LaunchError if the run cannot be cut into slices with a server each."""
    if options.server_shards == 1:
        return
    rule, shards = settings.for_server().rule(), f"--server-shards {options.server_shards}"
    if rule.all_reduce:
        raise LaunchError(f"{shards}: {settings.algorithm} has no server; use an asynchronous algorithm, such as dana")
    if rule.barrier or rule.per_layer or rule.gossips:
        raise LaunchError(
            f"{shards}: {settings.algorithm} cannot be cut into slices, for its rounds, layers or neighbours must be "
            "the same in all of them; use an elementwise asynchronous algorithm, such as dana"
        )
    unfit = {
        "a recording is of one server; leave out --record": options.record,
        "a push would be an outlier in one slice and not in another; leave out --refuse-outliers": (
            options.refuse_outliers
        ),
        "an invitation names one server; leave out --invite": options.invite,
    }
    for reason in [reason for reason, asked in unfit.items() if asked]:
        raise LaunchError(f"{shards}: {reason}")


def check_server_hosts(reach: Reach, options: RunOptions) -> None:
    """Raise LaunchError if --server-host names more machines than there are shards."""
    machines = 1 + len(reach.more_servers)
    if machines > options.server_shards:
        raise LaunchError(
            f"--server-host names {machines} machines, more than there are shards; use --server-shards {machines}"
        )


def find_out(cluster: Cluster, settings: Settings) -> tuple[Cluster, list[str]]:
    """Survey the machines. Return the cluster with what was found, and notes for the user.

    Raises ReachError for a machine that cannot take part.
    """
    reach, needs_server = cluster.reach, not is_all_reduce(settings)
    hub = reach.server if needs_server else cluster.hosts[0]
    machines, notes = find_machines(cluster.hosts, reach, hub=hub, collective=cluster.collective)
    cluster = replace(cluster, machines=machines)
    address = server_address(cluster)
    if not needs_server and ":" in (machines.get(hub.name, Machine()).address or ""):
        raise LaunchError(
            f"{settings.algorithm} needs IPv4 between the machines, for Horovod speaks nothing else; name hosts by "
            "IPv4 addresses, or a network interface with one by --interface"
        )
    if needs_server and reach.insecure:
        notes.append(f"INSECURE: the server listens on {address}, unencrypted, and believes whoever connects")
    return cluster, notes


def server_address(cluster: Cluster, shard: int = 0) -> str:
    """Return the address at which all machines of the cluster reach the server, or another shard of it."""
    return cluster.machines.get(cluster.reach.server_of(shard).name, Machine()).address or "127.0.0.1"


def make_plan(
    task: Task, settings: Settings, cluster: Cluster, run_folder: Path, options: RunOptions
) -> tuple[Plan, list[Invitation]]:
    """Return the plan of all processes, and the invitations for workers that join later.

    An all-reduce algorithm has one Horovod world over all ranks; others have a server, and a world for each worker.
    """
    all_reduce, reach, shards = is_all_reduce(settings), cluster.reach, options.server_shards
    travels = {**reach.env, "DANAZ_SETTINGS": settings.to_json(), **task.env}
    writer = cluster.hosts[0] if all_reduce else reach.server
    run_env = {"DANAZ_RUN": str(run_folder.resolve())} if reach.is_direct(writer) else {}
    returns = None if reach.is_direct(writer) else Returns("DANAZ_RUN", RESULTS)
    guarded = not all_reduce and not reach.insecure  # on one machine too: others may have accounts there
    server_keys, worker_keys = make_keys(cluster.workers + options.invite) if guarded else (None, [])
    workers = Workers(
        task.command,
        per_host=cluster.workers_per_host,
        one_world=all_reduce,
        returns=returns if all_reduce else None,
        secrets=[to_json(keys) for keys in worker_keys[: cluster.workers]],
        milestones=MISSING,
    )
    laid = plan(
        cluster.hosts,
        workers,
        [_server(cluster, options, shard, server_keys) for shard in range(0 if all_reduce else shards)],
        env={**travels, **run_env},
        cwd=reach.cwd,
        machines=cluster.machines,
        run_id=run_id_of(run_folder),
        prefix=PREFIX,
    )
    guests = range(cluster.workers, cluster.workers + options.invite)
    keys = [worker_keys[number] if guarded else None for number in guests]
    task = replace(task, env=travels)
    return laid, [Invitation(number, task, key) for number, key in zip(guests, keys, strict=True)]


def run_id_of(run_folder: Path) -> str:
    """Return what names the run on other machines. A resumed run has the same, and finds what its server left there."""
    place = f"{socket.gethostname()}:{run_folder.resolve()}"
    return f"danaz-{hashlib.sha256(place.encode()).hexdigest()[:16]}"


def _server(cluster: Cluster, options: RunOptions, shard: int, keys: ServerKeys | None) -> Service:
    """Return a shard of the server as a service. If one of several shards ends, all of them are started again."""
    reach, host = cluster.reach, cluster.reach.server_of(shard)
    serve, flags = [PYTHON, "-m", "danaz", "serve", "--bind"], [*["--insecure"] * reach.insecure]
    flags += ["--record"] * options.record + ["--shard", str(shard)] * (shard > 0)
    port = reach.server_port if shard == 0 else 0
    bind = f"tcp://{in_url(server_address(cluster, shard))}:{port or '*'}"
    return Service(
        f"server.{shard}" if shard else "server",
        [*serve, bind, *flags, *["--resume"] * options.resumes],
        announces=server_variable(shard),
        returns=None if reach.is_direct(host) and reach.is_direct(reach.server) else _returns_of(shard),
        host=host,
        cwd=os.getcwd() if reach.is_direct(host) else reach.cwd,
        secret=None if keys is None else to_json(keys),
        again=[*serve, ANNOUNCED, *flags, "--resume"],
        begins=None if shard else BEGINS,
        group="server",
    )


def _returns_of(shard: int) -> Returns:
    """Return what is fetched from a shard's folder on another machine: checkpoints, and from shard 0 the results."""
    # A checkpoint that was being written when its process was killed ends in .part.
    checkpoints = rf"{re.escape(folder_of(Path(), shard).name)}/[0-9]{{6,9}}\.(?:json|safetensors|part)"
    return Returns("DANAZ_RUN", (checkpoints, *(() if shard else RESULTS + RECORDINGS)))


def write_folder(launch: Launch) -> None:
    """Write what must be in the run folder before any process starts. Raises RunFolderError if that fails."""
    try:
        if not launch.resumes:  # a resumed run keeps its settings
            write_settings(launch.run, launch.settings)
        if launch.options:
            write_options(launch.run, launch.options)
        write_invitations(launch.run, launch.invitations)
        (launch.run / "summary.json").unlink(missing_ok=True)  # the one of the part before a resume
    except OSError as error:
        raise RunFolderError(f"the run folder {launch.run} cannot be written: {error.strerror}") from None


def execute(
    launch: Launch, echo: Echo | None = None, tell: Tell | None = None
) -> tuple[Outcome, dict[str, Any] | None]:
    """Run to the end. Return how the run ended and, if it ended well and something was trained, its summary."""
    write_folder(launch)
    agent_command = launch.reach.agent_command
    outcome = run(launch.plan, launch.run, policy=launch.policy, echo=echo, tell=tell, agent_command=agent_command)
    trained = (launch.run / "summary.json").exists()
    summary = read_summary(launch.run) if outcome.exit_code == 0 and trained else None
    if summary is not None and summary["complete"]:
        for shard, _ in enumerate(launch.plan.services):  # one that did not hear of the end has left its checkpoints
            delete_checkpoints(folder_of(launch.run, shard))
    return outcome, summary
