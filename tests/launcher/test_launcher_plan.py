"""Plans: which rank runs on which host, and which variables tell it so."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.hosts import Host, parse_hosts
from launcher.machine import Machine
from launcher.plan import Plan, PlanError, Returns, Service, Workers, plan

FOLDER = Returns("FOLDER", ("summary.json",))


def lay(hosts: str, per_host: int = 1, *, one_world: bool = False, **options: object) -> Plan:
    arguments: dict[str, object] = {"env": {}, "cwd": "/here", **options}
    return plan(parse_hosts(hosts), Workers(["train"], per_host, one_world), **arguments)  # type: ignore[arg-type]


def column(laid: Plan, name: str) -> list[str | None]:
    return [rank.env.get(name) for rank in laid.ranks]


def test_a_world_per_worker() -> None:
    laid = lay("a:2,b:1")
    assert [(world.host.name, world.address, world.size) for world in laid.worlds] == [
        ("a", "127.0.0.1", 2),
        ("b", "127.0.0.1", 1),
    ]
    assert [rank.label for rank in laid.ranks] == ["a:0", "a:1", "b:2"]
    assert column(laid, "LAUNCHER_WORKER") == ["0", "0", "1"]
    assert column(laid, "HOROVOD_RANK") == column(laid, "RANK") == ["0", "1", "0"]
    assert column(laid, "HOROVOD_SIZE") == column(laid, "WORLD_SIZE") == ["2", "2", "1"]
    assert column(laid, "HOROVOD_CROSS_SIZE") == ["1", "1", "1"]
    for name in ("HOROVOD_GLOO_IFACE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        assert column(laid, name) == ["lo", "lo", "lo"]
    assert column(laid, "HOROVOD_HOSTNAME") == ["a", "a", "b"]
    assert [str(rank.log_folder) for rank in laid.ranks] == ["logs/a/rank.0", "logs/a/rank.1", "logs/b/rank.2"]


def test_one_world_over_unequal_hosts() -> None:
    machines = {"a": Machine(address="10.0.0.1", interface="eth0"), "b": Machine(interface="ens5")}
    laid = lay("a:2,b:3", one_world=True, machines=machines)
    assert [(world.host.name, world.address, world.size) for world in laid.worlds] == [("a", "10.0.0.1", 5)]
    assert column(laid, "HOROVOD_RANK") == column(laid, "RANK") == ["0", "1", "2", "3", "4"]
    assert column(laid, "HOROVOD_LOCAL_RANK") == column(laid, "LOCAL_RANK") == ["0", "1", "0", "1", "2"]
    assert column(laid, "HOROVOD_LOCAL_SIZE") == column(laid, "LOCAL_WORLD_SIZE") == ["2", "2", "3", "3", "3"]
    assert column(laid, "HOROVOD_CROSS_RANK") == ["0", "0", "1", "1", "0"]
    assert column(laid, "HOROVOD_CROSS_SIZE") == ["2", "2", "2", "2", "1"]
    for name in ("HOROVOD_GLOO_IFACE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        assert column(laid, name) == ["eth0", "eth0", "ens5", "ens5", "ens5"]
    assert column(laid, "MASTER_ADDR") == column(laid, "HOROVOD_GLOO_RENDEZVOUS_ADDR") == ["10.0.0.1"] * 5
    assert column(laid, "LAUNCHER_WORKER") == ["0", "0", "1", "1", "1"]


def test_what_travels_chooses_interfaces_but_no_place() -> None:
    machines = {"a": Machine(address="10.0.0.1", interface="eth0"), "b": Machine(interface="ens5")}
    laid = lay("a:1,b:1", one_world=True, machines=machines, env={"NCCL_SOCKET_IFNAME": "ib0"})
    assert [{**laid.env, **rank.env}["NCCL_SOCKET_IFNAME"] for rank in laid.ranks] == ["ib0", "ib0"]
    assert column(laid, "GLOO_SOCKET_IFNAME") == ["eth0", "ens5"]
    server = Service("server", ["serve"], announces="SERVER")
    for name in ("RANK", "MASTER_PORT", "HOROVOD_CONTROLLER", "SERVER"):
        with pytest.raises(PlanError, match=f"^{name}: the launcher gives each process its own value; do not"):
            lay("a:1", env={name: "1"}, services=[server])


def test_its_own_variables_have_the_callers_prefix() -> None:
    laid = lay("a:1", prefix="MINE_")
    own = {"MINE_WORKER", "MINE_LOCAL_RANK", "MINE_LOCAL_SIZE", "MINE_LOCAL_DEVICE"}
    assert {name for name in laid.ranks[0].env if name.startswith(("MINE_", "LAUNCHER_"))} == own
    assert "    MINE_INCARNATION=<from the clock>" in laid.describe()
    for name in ("MINE_WORKER", "MINE_INCARNATION", "MINE_SECRET_FD"):
        with pytest.raises(PlanError, match=f"^{name}: the launcher gives each process its own value"):
            lay("a:1", prefix="MINE_", env={name: "1"})


def test_a_host_split_into_workers() -> None:
    laid = lay("a:5", 2)
    assert column(laid, "LAUNCHER_WORKER") == ["0", "0", "0", "1", "1"]
    assert column(laid, "HOROVOD_LOCAL_RANK") == ["0", "1", "2", "0", "1"]
    assert column(laid, "LAUNCHER_LOCAL_DEVICE") == ["0", "1", "2", "3", "4"]
    assert [world.size for world in laid.worlds] == [3, 2]
    together = lay("a:5", 2, one_world=True)
    assert column(together, "LAUNCHER_WORKER") == column(laid, "LAUNCHER_WORKER")
    assert column(together, "HOROVOD_LOCAL_RANK") == ["0", "1", "2", "3", "4"]
    assert [world.size for world in together.worlds] == [5]


def test_slots_left_out_are_the_gpus_there_else_one() -> None:
    machines = {"a": Machine(gpus=8), "b": Machine(gpus=0)}
    assert len(lay("a,b", machines=machines).ranks) == 9
    capped = plan([Host("a", max_slots=4)], Workers(["train"]), env={}, cwd="/", machines=machines)
    assert len(capped.ranks) == 4


@pytest.mark.parametrize(("cores", "threads"), [(16, "4"), (6, "1"), (2, "1")])
def test_cores_are_shared_among_the_ranks(cores: int, threads: str) -> None:
    laid = lay("a:4", machines={"a": Machine(cores=cores)})
    assert [rank.defaults["OMP_NUM_THREADS"] for rank in laid.ranks] == [threads] * 4


def test_the_users_own_environment_is_kept() -> None:
    laid = lay("a:1", env={"OMP_NUM_THREADS": "3", "PYTHONUNBUFFERED": "", "CUDA_VISIBLE_DEVICES": "1"})
    assert laid.env == {"OMP_NUM_THREADS": "3", "PYTHONUNBUFFERED": "", "CUDA_VISIBLE_DEVICES": "1"}
    assert laid.ranks[0].env.keys() & laid.env.keys() == set()


def test_chosen_slots_are_the_devices() -> None:
    laid = plan([Host("a", 2, devices=(1, 3))], Workers(["train"]), env={}, cwd="/")
    assert column(laid, "LAUNCHER_LOCAL_DEVICE") == ["1", "3"]
    assert column(laid, "HOROVOD_LOCAL_RANK") == ["0", "1"]


def test_the_first_rank_may_return_files() -> None:
    laid = plan(parse_hosts("a:2"), Workers(["train"], one_world=True, returns=FOLDER), env={}, cwd="/")
    assert [rank.returns for rank in laid.ranks] == [FOLDER, None]


def test_services_come_first_and_tell_their_address() -> None:
    server = Service("server", ["serve", "--port", "0"], announces="SERVER", env={"KEY": "value"})
    laid = lay("a:1", services=[server])
    assert [host.name for host in laid.hosts] == ["localhost", "a"]
    assert laid.services[0].env == {"KEY": "value"}
    assert str(laid.services[0].log_folder) == "logs/localhost/server"
    assert laid.services[0].label == "localhost:server"


def test_the_description_shows_everything_but_the_environment_of_the_user() -> None:
    server = Service("server", ["serve", "two words"], announces="SERVER")
    text = lay("a:2", services=[server], env={"TOKEN": "secret"}).describe()
    assert text.splitlines()[:2] == ["1 worker, 2 ranks, one Horovod world over all", "in /here"]
    assert "[localhost:server] serve 'two words'\n    announces SERVER" in text
    assert "[a:1] train\n    LAUNCHER_LOCAL_RANK=1\n    LAUNCHER_LOCAL_DEVICE=1\n    HOROVOD_RANK=1" in text
    assert "    MASTER_PORT=<free port on a>\n    SERVER=<from server>" in text
    assert "secret" not in text
    assert "secret" not in repr(lay("a:2", env={"TOKEN": "secret"}))


@pytest.mark.parametrize(
    ("hosts", "options", "message"),
    [
        ("a:2", {"per_host": 3}, r"a has 2 slots, too few for 3 workers of one rank or more; .* \(a:3\)"),
        ("a:2", {"per_host": 0}, "workers per host is 0; expected at least 1"),
        ("a:1", {"services": [Service("s", ["x"]), Service("s", ["y"])]}, "services need names of their own"),
        ("a:1", {"services": [Service("rank.0", ["x"])]}, "services need names of their own"),
        ("a:1", {"services": [Service("server", [])]}, "the service server has no command"),
    ],
)
def test_what_does_not_fit(hosts: str, options: Mapping[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        lay(hosts, **options)  # type: ignore[arg-type]


def test_nothing_to_run() -> None:
    with pytest.raises(PlanError, match="there is no command to run; write it after --"):
        plan(parse_hosts("a:1"), Workers([]), env={}, cwd="/")
    with pytest.raises(PlanError, match="there are no hosts"):
        plan([], Workers(["train"]), env={}, cwd="/")


@given(slots=st.lists(st.integers(1, 9), min_size=1, max_size=6), parts=st.integers(1, 9), one_world=st.booleans())
def test_every_slot_has_its_rank(slots: list[int], parts: int, one_world: bool) -> None:
    parts = min(parts, *slots)
    hosts = [Host(f"h{number}", count) for number, count in enumerate(slots)]
    laid = plan(hosts, Workers(["train"], parts, one_world), env={}, cwd="/")
    assert len(laid.ranks) == sum(slots)
    assert laid.workers == len(slots) * parts
    assert [rank.rank for rank in laid.ranks] == list(range(sum(slots)))
    workers = [int(worker or "") for worker in column(laid, "LAUNCHER_WORKER")]
    assert workers == sorted(workers)
    assert set(workers) == set(range(laid.workers))
    sizes = [workers.count(worker) for worker in range(laid.workers)]
    for number, count in enumerate(slots):
        of_host = sizes[number * parts : (number + 1) * parts]
        assert sum(of_host) == count
        assert max(of_host) - min(of_host) <= 1
    for world in laid.worlds:
        members = [rank for rank in laid.ranks if rank.world == world.index]
        assert [rank.env["HOROVOD_RANK"] for rank in members] == [str(rank) for rank in range(world.size)]
        seats = {(rank.env["HOROVOD_CROSS_RANK"], rank.env["HOROVOD_LOCAL_RANK"]) for rank in members}
        assert len(seats) == world.size
    devices = {(rank.host.name, rank.env["LAUNCHER_LOCAL_DEVICE"]) for rank in laid.ranks}
    assert len(devices) == sum(slots)
