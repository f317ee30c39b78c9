"""Hosts -> processes. Pure: the same arguments give the same plan, and nothing is started or looked up.

A *world* is the set of ranks that form one Horovod world: the ranks of one worker, or those of all workers.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import PurePosixPath
from typing import NamedTuple

from launcher.hosts import Host
from launcher.machine import Machine, is_loopback

__all__ = [
    "ANNOUNCED",
    "INTERFACE_VARIABLES",
    "LAUNCHING_MACHINE",
    "PREFIX",
    "PYTHON",
    "Plan",
    "PlanError",
    "Process",
    "Returns",
    "Service",
    "Unit",
    "Workers",
    "World",
    "plan",
    "slots_of",
]

LAUNCHING_MACHINE = Host("localhost")
# As the first word of a command, it stands for the Python that runs the agent there. `{python} -m MODULE` runs one of
# our modules, without importing anything from the working directory.
PYTHON = "{python}"
INTERFACE_VARIABLES = ("HOROVOD_GLOO_IFACE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")  # `env` wins
FOUND_LATER = ("HOROVOD_GLOO_RENDEZVOUS_PORT", "MASTER_PORT")
PREFIX = "LAUNCHER_"  # of the variables that neither Horovod nor torchrun has
ANNOUNCED = "{announced}"  # in the command that restarts a service: the value it first announced


class PlanError(ValueError):
    """Hosts, workers and command do not fit together; the message says why and what to change."""


@dataclass(frozen=True)
class Returns:
    """The files that a process brings into the run folder. It leaves them in a folder that `variable` names to it.

    Each of `files` is a regular expression for a whole path within the run folder. No other files are accepted.
    """

    variable: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Service:
    """A process that runs beside the ranks and is started before them.

    When `announces` is a name, such as SERVER, the service must print a line `SERVER=value` on stdout, and
    every rank finds that value in its environment. With `returns`, the files that it leaves in a folder of its own on
    its machine are brought into the run folder. The service reads `secret` from the file descriptor that
    LAUNCHER_SECRET_FD names; the secret is sent to its machine and is only ever held in memory. `again` is the command
    that continues from where the service was killed. With it, the service can be restarted during a run: it gets the
    same folder, and ANNOUNCED in the command is replaced by the value it first announced. Services of one `group` fail
    and restart together, and those on one machine return their files in one folder. When `begins` is a name, the run
    begins when the service prints a line `NAME=…` on stdout; until then it waits for all workers.
    """

    name: str
    command: Sequence[str]
    announces: str | None = None
    returns: Returns | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    host: Host = LAUNCHING_MACHINE
    cwd: str | None = None  # None: the plan's
    secret: str | None = field(default=None, repr=False)
    again: Sequence[str] = ()
    begins: str | None = None
    group: str = ""  # by default the service is a group by itself


@dataclass(frozen=True)
class Workers:
    """The workers of a run. Their ranks all run one command.

    The slots of each host form `per_host` workers, and their numbers start at `first`. With `one_world`, all ranks form
    a single world. `returns` is like `Service.returns`, for rank 0. `secrets` are like `Service.secret`, one for the
    first rank of each world. `milestones` maps each milestone to the words for a rank that did not reach it: a rank
    that ends with exit code 0 has failed unless it reached all of them.
    """

    command: Sequence[str]
    per_host: int = 1
    one_world: bool = False
    first: int = 0
    returns: Returns | None = None
    secrets: Sequence[str] = field(default=(), repr=False)
    milestones: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """The ranks of one Horovod world meet on the machine of its first rank, and the agent there finds free ports."""

    index: int
    host: Host
    address: str
    size: int


@dataclass(frozen=True)
class Process:
    """One process to start. Its environment is that of its machine's agent, plus `Plan.env`, plus `env`."""

    name: str  # "rank.3", or a service's name: unique in the run
    host: Host
    argv: tuple[str, ...]
    env: Mapping[str, str]
    rank: int | None = None  # on the whole cluster; None: a service
    worker: int | None = None
    world: int | None = None
    announces: str | None = None
    returns: Returns | None = None
    cwd: str | None = None
    defaults: Mapping[str, str] = field(default_factory=dict)  # its machine may override these
    secret: str | None = field(default=None, repr=False)
    again: tuple[str, ...] = ()
    begins: str | None = None
    group: str = ""  # of services; its unit's name
    milestones: Mapping[str, str] = field(default_factory=dict)  # in order; milestone -> what to say if missing

    def missing(self, reached: Collection[str]) -> str | None:
        """Return the words for the first milestone that it has not reached, or None."""
        return next((words for milestone, words in self.milestones.items() if milestone not in reached), None)

    @property
    def label(self) -> str:
        """The prefix of its lines on the terminal: host:rank."""
        return f"{self.host.name}:{self.name if self.rank is None else self.rank}"

    @property
    def log_folder(self) -> PurePosixPath:
        """The folder of its stdout and stderr, relative to the run folder."""
        return PurePosixPath("logs", self.host.name, self.name)


@dataclass(frozen=True)
class Unit:
    """Processes that start, fail and restart together: a service, a group of services, or the ranks of one world."""

    name: str  # "server", "worker 1": unique in the run
    processes: tuple[Process, ...]
    world: World | None = None  # None: a service

    @property
    def hosts(self) -> tuple[Host, ...]:
        return tuple({process.host.name: process.host for process in self.processes}.values())

    @property
    def label(self) -> str:
        """Its name, with its machine if all its processes are on one."""
        return f"{self.name} on {self.hosts[0].name}" if len(self.hosts) == 1 else self.name


@dataclass(frozen=True)
class Plan:
    """All processes of one run, in the order in which they start."""

    services: tuple[Process, ...]
    ranks: tuple[Process, ...]
    worlds: tuple[World, ...]
    cwd: str
    env: Mapping[str, str] = field(repr=False)  # may hold secrets: never printed
    run_id: str = ""  # unique on every machine; it begins the names of the folders of returned files there
    prefix: str = PREFIX

    @property
    def workers(self) -> int:
        """The number of workers."""
        return len({rank.worker for rank in self.ranks})

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units, services first."""
        groups: dict[str, list[Process]] = {}
        for process in self.services:
            groups.setdefault(process.group, []).append(process)
        services = [Unit(name, tuple(processes)) for name, processes in groups.items()]
        return (*services, *(self._unit(world) for world in self.worlds))

    def _unit(self, world: World) -> Unit:
        ranks = tuple(rank for rank in self.ranks if rank.world == world.index)
        workers = {rank.worker for rank in ranks}
        return Unit(f"worker {ranks[0].worker}" if len(workers) == 1 else "the world of all workers", ranks, world)

    @property
    def concludes(self) -> frozenset[str]:
        """The processes that conclude the run: it is over when the first of them ends well.

        These are the services. Without services, it is the first rank, provided that it has milestones, which tell a
        good end from an early one.
        """
        first = {rank.name for rank in self.ranks[:1] if rank.milestones}
        return frozenset({service.name for service in self.services} or first)

    @property
    def hosts(self) -> tuple[Host, ...]:
        """Every machine that runs a process, each once."""
        return tuple({process.host.name: process.host for process in (*self.services, *self.ranks)}.values())

    def describe(self) -> str:
        """Describe the plan for a reader: every process, its command, and the variables that the plan adds."""
        worlds = "one Horovod world over all" if len(self.worlds) == 1 else "a Horovod world per worker"
        ranks = [{**rank.defaults, **rank.env, **self._found_later(rank)} for rank in self.ranks]
        common = {name: value for name, value in ranks[0].items() if all(env.get(name) == value for env in ranks)}
        lines = [f"{_count(self.workers, 'worker')}, {_count(len(self.ranks), 'rank')}, {worlds}", f"in {self.cwd}"]
        lines += ["every rank gets", *_indented(common)]
        own = [{name: value for name, value in env.items() if name not in common} for env in ranks]
        envs = [*(service.env for service in self.services), *own]
        for process, env in zip((*self.services, *self.ranks), envs, strict=True):
            lines += ["", f"[{process.label}] {shlex.join(process.argv)}"]
            lines += [f"    announces {process.announces}"] if process.announces else []
            lines += _indented(env)
        return "\n".join(lines)

    def _found_later(self, process: Process) -> dict[str, str]:
        if process.world is None:
            return {}
        port = f"<free port on {self.worlds[process.world].host.name}>"
        announced = {service.announces: f"<from {service.name}>" for service in self.services if service.announces}
        incarnation = {f"{self.prefix}INCARNATION": "<from the clock>"}
        return {"HOROVOD_GLOO_RENDEZVOUS_PORT": port, "MASTER_PORT": port, **announced, **incarnation}


class _Seat(NamedTuple):
    """A rank's place as far as it does not depend on the rank's world."""

    host: Host
    worker: int  # on the cluster
    slot: int  # on the host
    slots: int  # of the host


def plan(
    hosts: Sequence[Host],
    workers: Workers,
    services: Sequence[Service] = (),
    *,
    env: Mapping[str, str],
    cwd: str,
    machines: Mapping[str, Machine] | None = None,
    run_id: str = "",
    prefix: str = PREFIX,
) -> Plan:
    """Put one rank into every slot of every host.

    `env` is sent to every process; it may choose network interfaces, but not set a process's place. `machines` says by
    name what is known about each host (cores, GPUs, address). `run_id` names the run on other machines. `prefix`
    replaces LAUNCHER_ in the names of the launcher's own variables. A rank finds the number of its worker in
    LAUNCHER_WORKER, and its place on its host in LAUNCHER_LOCAL_RANK, LAUNCHER_LOCAL_SIZE and LAUNCHER_LOCAL_DEVICE.
    LAUNCHER_INCARNATION grows with each start. Raises PlanError.
    """
    _check_complete(hosts, workers, services)
    known = machines or {}
    seats = _seats(hosts, workers, known)
    groups = [seats] if workers.one_world else [[*group] for _, group in groupby(seats, key=lambda seat: seat.worker)]
    ranks: list[Process] = []
    worlds = []
    for index, members in enumerate(groups):
        world = _world(index, members, known)
        worlds.append(world)
        for rank, seat in enumerate(members):
            place = {**_worker_env(seat, prefix), **_world_env(rank, members, world), **_meeting_env(seat, world)}
            _check_is_free(env, {*place, *FOUND_LATER, f"{prefix}INCARNATION", f"{prefix}SECRET_FD"}, services)
            way = {name: value for name, value in _way_env(seat, world, known).items() if name not in env}
            ranks.append(
                Process(
                    f"rank.{len(ranks)}",
                    seat.host,
                    tuple(workers.command),
                    {**place, **way},
                    rank=len(ranks),
                    worker=seat.worker,
                    world=index,
                    returns=None if ranks else workers.returns,
                    defaults=_defaults(seat, known),
                    secret=workers.secrets[index] if workers.secrets and rank == 0 else None,
                    milestones=workers.milestones,
                )
            )
    return Plan(tuple(map(_service_process, services)), tuple(ranks), tuple(worlds), cwd, dict(env), run_id, prefix)


def slots_of(host: Host, machines: Mapping[str, Machine]) -> int:
    """Return how many ranks a host gets: the number the user wrote, or the number of its GPUs, or 1."""
    if host.slots is not None:
        return host.slots
    slots = max(1, machines.get(host.name, Machine()).gpus)
    return slots if host.max_slots is None else min(slots, host.max_slots)


def _check_complete(hosts: Sequence[Host], workers: Workers, services: Sequence[Service]) -> None:
    """Raise PlanError if something is missing, or has a wrong name or number, whatever the machines are."""
    if not workers.command:
        raise PlanError("there is no command to run; write it after --, for example: -- python train.py")
    if not hosts:
        raise PlanError("there are no hosts; expected at least one, for example localhost:1")
    if workers.per_host < 1:
        raise PlanError(f"workers per host is {workers.per_host}; expected at least 1")
    names = [service.name for service in services]
    if len(set(names)) < len(names) or any(name.startswith("rank.") for name in names):
        raise PlanError(f"services need names of their own, other than rank.N; got {', '.join(names)}")
    for service in services:
        if not service.command:
            raise PlanError(f"the service {service.name} has no command")


def _seats(hosts: Sequence[Host], workers: Workers, machines: Mapping[str, Machine]) -> list[_Seat]:
    seats: list[_Seat] = []
    for number, host in enumerate(hosts):
        slots, parts = slots_of(host, machines), workers.per_host
        if parts > slots:
            raise PlanError(
                f"{host.name} has {_count(slots, 'slot')}, too few for {parts} workers of one rank or more; "
                f"give it more slots ({host.name}:{parts}) or ask for fewer workers per host"
            )
        for slot in range(slots):
            # The slots are split among the workers as evenly as possible, and the larger parts come first.
            small, larger = divmod(slots, parts)
            within = slot // (small + 1) if slot < larger * (small + 1) else (slot - larger) // small
            seats.append(_Seat(host, workers.first + number * parts + within, slot, slots))
    return seats


def _world(index: int, members: Sequence[_Seat], machines: Mapping[str, Machine]) -> World:
    first = members[0].host
    if _within_one_machine(members):
        return World(index, first, "127.0.0.1", len(members))
    return World(index, first, machines.get(first.name, Machine()).address or first.name, len(members))


def _within_one_machine(members: Sequence[_Seat]) -> bool:
    names = {seat.host.name for seat in members}
    return len(names) == 1 or all(is_loopback(name) for name in names)


def _worker_env(seat: _Seat, prefix: str) -> dict[str, str]:
    return {
        f"{prefix}WORKER": str(seat.worker),
        f"{prefix}LOCAL_RANK": str(seat.slot),
        f"{prefix}LOCAL_SIZE": str(seat.slots),
        f"{prefix}LOCAL_DEVICE": str(seat.host.devices[seat.slot] if seat.host.devices else seat.slot),
    }


def _world_env(rank: int, members: Sequence[_Seat], world: World) -> dict[str, str]:
    """Return a rank's place in its world, in the variables of Horovod and of torchrun."""
    seat = members[rank]
    local: dict[str, list[int]] = {}  # host name -> its ranks in this world
    for other, member in enumerate(members):
        local.setdefault(member.host.name, []).append(other)
    here = local[seat.host.name]
    local_rank = here.index(rank)
    across = [name for name, ranks in local.items() if len(ranks) > local_rank]  # hosts with this local rank
    return {
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(len(members)),
        "HOROVOD_LOCAL_RANK": str(local_rank),
        "HOROVOD_LOCAL_SIZE": str(len(here)),
        "HOROVOD_CROSS_RANK": str(across.index(seat.host.name)),
        "HOROVOD_CROSS_SIZE": str(len(across)),
        "RANK": str(rank),
        "WORLD_SIZE": str(len(members)),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(len(here)),
        "MASTER_ADDR": world.address,
    }


def _meeting_env(seat: _Seat, world: World) -> dict[str, str]:
    """Return where Horovod's ranks find each other."""
    return {
        "HOROVOD_HOSTNAME": seat.host.name,
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": world.address,
    }


def _way_env(seat: _Seat, world: World, machines: Mapping[str, Machine]) -> dict[str, str]:
    """Return the variables that name the network interface to the other ranks. gloo and NCCL also listen on it.

    Inside one machine, that is loopback. Without a name, gloo would resolve the host's name, often to 127.0.1.1.
    """
    across = not is_loopback(world.address)
    interface = machines.get(seat.host.name, Machine()).interface if across else "lo"
    return dict.fromkeys(INTERFACE_VARIABLES, interface) if interface else {}


def _check_is_free(env: Mapping[str, str], own: Collection[str], services: Sequence[Service]) -> None:
    """Raise PlanError if `env` would set a variable that each process is told for itself, such as its place."""
    announced = {service.announces for service in services if service.announces}
    taken = sorted(env.keys() & {*own, *announced})
    if taken:
        raise PlanError(
            f"{', '.join(taken)}: the launcher gives each process its own value; do not give one value to all of them "
            "(-x, --env-file)"
        )


def _defaults(seat: _Seat, machines: Mapping[str, Machine]) -> dict[str, str]:
    """Return variables that a machine may override: threads for a fair share of its cores, and unbuffered output.

    Without the first, torch would start a thread per core in every rank.
    """
    cores = machines.get(seat.host.name, Machine()).cores
    return {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(max(1, cores // seat.slots))}


def _service_process(service: Service) -> Process:
    return Process(
        service.name,
        service.host,
        tuple(service.command),
        dict(service.env),
        announces=service.announces,
        returns=service.returns,
        cwd=service.cwd,
        defaults={"PYTHONUNBUFFERED": "1"},
        secret=service.secret,
        again=tuple(service.again),
        begins=service.begins,
        group=service.group or service.name,
    )


def _indented(env: Mapping[str, str]) -> list[str]:
    return [f"    {name}={value}" for name, value in env.items()]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
