"""Which variables other machines get, which machines may take part, and how the processes of a run are planned."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from danaz.launch.doctor import check_up, show
from danaz.launch.invitation import Task
from danaz.launch.options import RunOptions
from danaz.launch.prepare import Cluster, LaunchError, check_server_hosts, find_out, make_plan, policy_of
from danaz.launch.probe import versions
from danaz.launch.reach import (
    Reach,
    ReachError,
    find_machines,
    namesakes,
    parse_environment,
    parse_interfaces,
    replaced_here,
)
from danaz.run.settings import Settings
from launcher.hosts import Host, parse_hosts
from launcher.machine import Machine
from launcher.plan import ANNOUNCED, LAUNCHING_MACHINE, Plan, Workers, plan
from launcher.survey import ANY_HOST, Finding

HERE = versions()
HOSTS = parse_hosts("a:2,b")


def finding(address: str = "10.0.0.2", problem: str | None = None, **report: Any) -> Finding:
    all_is_well = {"versions": HERE, "unreachable": None, "horovod_problem": None}
    return Finding(Machine(4, 0, address, "eth0", {address: "eth0"}), {**all_is_well, **report}, problem)


class Surveyed(Reach):
    """A cluster without machines: the test supplies what they would report."""

    findings: dict[str, Finding]

    def survey(self, hosts: object, hub: Host) -> dict[str, Finding]:
        return self.findings


def reach(findings: dict[str, Finding], **options: Any) -> Reach:
    made = Surveyed(**options)
    object.__setattr__(made, "findings", findings)
    return made


def test_variables_and_their_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "from here")
    file = tmp_path / "env"
    file.write_text("# comment\n\nA=1\nexport B=two words # and all\nC=x=y\r\nEMPTY=\n")
    assert parse_environment(["HERE", "A=2", "NEW="], file) == {
        "A": "2",
        "B": "two words # and all",
        "C": "x=y",
        "EMPTY": "",
        "HERE": "from here",
        "NEW": "",
    }


@pytest.mark.parametrize(
    ("variables", "lines", "message"),
    [
        (["NOWHERE_SET"], None, "-x NOWHERE_SET: it is not set here; write -x NOWHERE_SET=VALUE"),
        (["=1"], None, "-x '=1': expected NAME or NAME=VALUE"),
        (["A B=1"], None, "-x 'A B=1': expected NAME"),
        (["DANAZ_RUN=/"], None, "DANAZ_RUN: what begins with DANAZ_ is set by danaz itself"),
        ([], "DANAZ_WORKER=1\n", "DANAZ_WORKER: what begins with DANAZ_ is set by danaz itself"),
        ([], "A=1\nB\n", "line 2: expected NAME=VALUE"),
        ([], "A='1\n", "line 1: '1 is not one quoted text; close the quote at the end"),
        ([], 'A="1" # one\n', 'line 1: "1" # one is not one quoted text'),
        ([], 'A="\\"\n', "is not one quoted text"),
        ([], "A-B=1\n", "line 1: expected NAME=VALUE"),
    ],
)
def test_wrong_variables(tmp_path: Path, variables: list[str], lines: str | None, message: str) -> None:
    file = None
    if lines is not None:
        file = tmp_path / "env"
        file.write_text(lines)
    with pytest.raises(ReachError) as error:
        parse_environment(variables, file)
    assert message in str(error.value)


def test_quotes_in_a_file_of_variables(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(r"""
A="two words"
export B='as $it stands \n'
C="a \"quote\" and a \\"
D=it's "half" quoted
E=
F=""
""")
    assert parse_environment([], file) == {
        "A": "two words",
        "B": r"as $it stands \n",
        "C": 'a "quote" and a \\',
        "D": 'it\'s "half" quoted',
        "E": "",
        "F": "",
    }


def test_an_interface_of_this_environment_that_ranks_here_do_not_get(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NCCL_SOCKET_IFNAME", "ib0"), ("GLOO_SOCKET_IFNAME", "lo")):
        monkeypatch.setenv(name, value)
    here = Reach(only_here=True)

    def lay(env: dict[str, str]) -> Plan:
        return plan(parse_hosts("localhost:2"), Workers(["train"]), env=env, cwd="/")

    [note] = replaced_here(lay({}), here)
    assert note.startswith("NCCL_SOCKET_IFNAME is ib0 here, but ranks get lo")
    assert replaced_here(lay(parse_environment(["NCCL_SOCKET_IFNAME"], None)), here) == []


def test_a_missing_env_file(tmp_path: Path) -> None:
    with pytest.raises(ReachError, match="cannot be read"):
        parse_environment([], tmp_path / "none")


def test_interfaces() -> None:
    assert parse_interfaces(["eth0", "b=ens5", "localhost=lo"], HOSTS) == {
        ANY_HOST: "eth0",
        "b": "ens5",
        "localhost": "lo",
    }
    for wrong in ("c=eth0", "a=", ""):
        with pytest.raises(ReachError, match=r"expected NIC or HOST=NIC with one of a, b, localhost"):
            parse_interfaces([wrong], HOSTS)


def cluster(findings: dict[str, Finding], **options: Any) -> Cluster:
    return Cluster(HOSTS, collective="horovod", reach=reach(findings, cwd="/there", **options))


WELL = {"a": finding(), "b": finding("10.0.0.3"), "localhost": finding("10.0.0.1")}
TRAIN = Task(["train"])
DANA, SSGD = Settings("dana", workers=2), Settings("ssgd", workers=2)


def test_a_server_beyond_this_machine_admits_the_keys_of_this_run_alone() -> None:
    found, notes = find_out(cluster(WELL), DANA)
    assert notes == []
    plan = make_plan(TRAIN, DANA, found, Path("/run"), RunOptions())[0]
    [server] = plan.services
    assert server.argv[-2:] == ("--bind", "tcp://10.0.0.1:*")
    keys = [json.loads(rank.secret) for rank in plan.ranks if rank.secret]
    assert server.secret is not None
    assert json.loads(server.secret)["workers"] == [key["public"] for key in keys]
    assert len({key["secret"] for key in keys}) == 2
    for secret in (json.loads(server.secret)["secret"], *(key["secret"] for key in keys)):
        assert secret not in plan.describe()
        assert secret not in repr(plan)


def test_on_this_machine_alone_there_are_keys_too() -> None:
    """Users of other accounts on this machine can reach loopback."""
    here = Cluster(parse_hosts("localhost:2"), workers_per_host=2)
    found, notes = find_out(here, DANA)
    assert notes == []
    plan, [guest] = make_plan(TRAIN, DANA, found, Path("/run"), RunOptions(invite=1))
    [server] = plan.services
    assert server.argv[-2:] == ("--bind", "tcp://127.0.0.1:*")
    assert server.secret is not None
    keys = [json.loads(rank.secret)["public"] for rank in plan.ranks if rank.secret]
    assert guest.keys is not None
    assert json.loads(server.secret)["workers"] == [*keys, guest.keys.public]
    assert len(set(keys)) == 2


def test_on_this_machine_alone_keys_are_left_out_if_asked() -> None:
    here = Cluster(parse_hosts("localhost:2"), workers_per_host=2, reach=Reach(insecure=True))
    found, notes = find_out(here, DANA)
    assert notes == ["INSECURE: the server listens on 127.0.0.1, unencrypted, and believes whoever connects"]
    plan, [guest] = make_plan(TRAIN, DANA, found, Path("/run"), RunOptions(invite=1))
    assert [process.secret for process in (*plan.services, *plan.ranks)] == [None] * 3
    assert guest.keys is None


def test_a_server_that_believes_everyone_is_to_be_wanted() -> None:
    found, notes = find_out(cluster(WELL, insecure=True), DANA)
    assert notes == ["INSECURE: the server listens on 10.0.0.1, unencrypted, and believes whoever connects"]
    plan = make_plan(TRAIN, DANA, found, Path("/run"), RunOptions())[0]
    [server] = plan.services
    assert server.argv[-3:] == ("--bind", "tcp://10.0.0.1:*", "--insecure")
    assert (server.host.name, server.returns, plan.env["DANAZ_RUN"]) == ("localhost", None, "/run")
    assert (plan.cwd, server.cwd) == ("/there", str(Path.cwd()))


def test_what_is_written_elsewhere_is_returned() -> None:
    found, notes = find_out(cluster(WELL), SSGD)
    assert notes == []
    plan = make_plan(TRAIN, SSGD, found, Path("/run"), RunOptions())[0]
    assert [rank.returns and rank.returns.variable for rank in plan.ranks] == ["DANAZ_RUN", None, None]
    assert "DANAZ_RUN" not in plan.env
    assert plan.worlds[0].address == "10.0.0.2"
    there = cluster(WELL, insecure=True, server=HOSTS[1], server_port=5555)
    [server] = make_plan(TRAIN, DANA, find_out(there, DANA)[0], Path("/run"), RunOptions(record=True))[0].services
    assert server.argv[-4:] == ("--bind", "tcp://10.0.0.3:5555", "--insecure", "--record")
    assert server.returns is not None
    assert (server.host.name, server.returns.variable, server.cwd) == ("b", "DANAZ_RUN", "/there")


def test_shards_on_several_machines_in_turn() -> None:
    there = cluster(WELL, server=Host("localhost"), more_servers=[HOSTS[1]], server_port=5555)
    servers = make_plan(TRAIN, DANA, find_out(there, DANA)[0], Path("/run"), RunOptions(server_shards=3))[0].services
    assert [server.host.name for server in servers] == ["localhost", "b", "localhost"]
    binds = [server.argv[server.argv.index("--bind") + 1] for server in servers]
    assert binds == ["tcp://10.0.0.1:5555", "tcp://10.0.0.3:*", "tcp://10.0.0.1:*"]
    assert [server.announces for server in servers] == ["DANAZ_SERVER", "DANAZ_SERVER_1", "DANAZ_SERVER_2"]
    assert [server.returns and server.returns.variable for server in servers] == [None, "DANAZ_RUN", None]
    assert all(server.again[-1] == "--resume" for server in servers)
    assert len({server.secret for server in servers}) == 1


def known_as(identity: str | None) -> Finding:
    return replace(finding(), machine=replace(finding().machine, identity=identity))


def test_a_machine_under_two_names() -> None:
    here = known_as("the launching one")
    hosts = parse_hosts("a:2,b,c")
    findings = {"a": known_as("one"), "b": known_as("two"), "c": known_as("one"), "localhost": here}
    with pytest.raises(ReachError) as error:
        find_machines(hosts, reach(findings), hub=LAUNCHING_MACHINE, collective="torch")
    assert "c (--hosts entry 3) and a (--hosts entry 1) are one machine; name it once, with all" in str(error.value)
    assert list(namesakes(hosts, {name: each.machine for name, each in findings.items()})) == ["c"]
    for unknown in ({**findings, "c": known_as(None)}, {**findings, "c": known_as("three")}):
        find_machines(hosts, reach(unknown), hub=LAUNCHING_MACHINE, collective="torch")
    # The server may run on a machine that also trains under another name.
    server = reach({**findings, "c": known_as("three")}, server=hosts[2], more_servers=[hosts[0]])
    find_machines(hosts[:2], server, hub=hosts[2], collective="torch")


@pytest.mark.parametrize("names", ["localhost,127.0.0.1", "{},localhost", "127.0.0.1,[::1]"])
def test_this_machine_under_two_names(names: str) -> None:
    hosts = parse_hosts(names.format(os.uname().nodename))
    with pytest.raises(ReachError, match=r"\(--hosts entry 2\) and .* \(--hosts entry 1\) are one machine"):
        find_machines(hosts, Reach(), hub=LAUNCHING_MACHINE, collective="torch")


def test_more_servers_than_shards() -> None:
    with pytest.raises(LaunchError, match="names 2 machines, more than there are shards; use --server-shards 2"):
        check_server_hosts(Reach(more_servers=[HOSTS[1]]), RunOptions())


def test_nothing_of_this_environment_travels_but_what_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "secret")
    found, _ = find_out(cluster(WELL, env={"GIVEN": "1"}), SSGD)
    assert make_plan(TRAIN, SSGD, found, Path("/run"), RunOptions())[0].env.keys() == {"GIVEN", "DANAZ_SETTINGS"}


def test_slots_are_the_gpus_there_for_all_who_count_them() -> None:
    findings = {**WELL, "b": Finding(Machine(gpus=8, address="10.0.0.3"), WELL["b"].report)}
    found, _ = find_out(cluster(findings), SSGD)
    assert found.ranks_per_worker == 8
    assert len(make_plan(TRAIN, SSGD, found, Path("/run"), RunOptions())[0].ranks) == 10


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"danaz": "0.0.1"}, f"b: danaz 0.0.1 there, {HERE['danaz']} here; install the same there"),
        ({"torch": None}, f"b: torch is not installed there; pip install torch=={HERE['torch']}"),
        (
            {"horovod": None},
            "b: Horovod is not installed there; run `danaz horovod install` there, or use --collective",
        ),
    ],
)
def test_a_machine_that_lacks_something_is_named(there: dict[str, str | None], message: str) -> None:
    with pytest.raises(ReachError) as error:
        find_out(cluster({**WELL, "b": finding(versions={**HERE, **there})}), SSGD)
    assert str(error.value).startswith(message)


def test_all_that_cannot_be_reached_are_named_at_once() -> None:
    findings = {**WELL, "a": Finding(problem="a: one thing"), "b": Finding(problem="b: another")}
    with pytest.raises(ReachError, match=r"^a: one thing\nb: another$"):
        find_out(cluster(findings), SSGD)


def test_differences_that_do_no_harm_are_told() -> None:
    findings = {**WELL, "b": finding(versions={**HERE, "torch": "2.13.0"})}
    assert find_out(cluster(findings), SSGD)[1] == [f"b: torch 2.13.0 there, {HERE['torch']} here"]


@pytest.mark.parametrize(
    ("report", "problem"),
    [
        ({}, None),
        ({"versions": {**HERE, "torch": "2.13.0"}}, f"b: torch 2.13.0 there, {HERE['torch']} here; install the same"),
        ({"horovod_problem": "Horovod was built for torch 1"}, "b: Horovod was built for torch 1"),
        ({"free_disk_bytes": 5e8}, "b: 0.5 GB are free on the disk of its working directory"),
    ],
)
def test_what_the_doctor_minds(report: dict[str, Any], problem: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"round_trip_ms": 0.1, "bandwidth_mb_s": 100.0, "clock_ahead_s": 0.0, "free_disk_bytes": 5e10}
    checkup = check_up(HOSTS[1], finding(**{**measured, **report}), "horovod")
    assert list(checkup.problems) == ([problem] if problem else [])
    assert show([checkup]) == (1 if problem else 0)
    said = capsys.readouterr().out
    assert (f"✗ {problem}" if problem else "All hosts can take part.") in said


def test_what_the_doctor_mentions() -> None:
    report = {"versions": {**HERE, "python": "3.10.0"}, "clock_ahead_s": -3.0}
    found = Finding(Machine(gpus=2), finding(**report).report)
    checkup = check_up(Host("b", 4), found, "horovod")
    assert checkup.problems == []
    assert checkup.warnings == [
        f"b: Python 3.10.0 there, {HERE['python']} here",
        "b: its clock is 3.000 s behind; times in logs will not agree",
        "b: 4 slots for 2 GPUs; several ranks will share one",
    ]


def test_a_server_is_started_again_where_it_was() -> None:
    found, _ = find_out(cluster(WELL, insecure=True), DANA)
    [server] = make_plan(TRAIN, DANA, found, Path("/run"), RunOptions(record=True))[0].services
    assert server.again[3:] == ("serve", "--bind", ANNOUNCED, "--insecure", "--record", "--resume")
    assert "--resume" not in server.argv
    [server] = make_plan(TRAIN, DANA, found, Path("/run"), RunOptions(resume=Path("/run")))[0].services
    assert server.argv[-1] == "--resume"


def test_each_invitation_is_a_key_of_its_own() -> None:
    found, _ = find_out(cluster(WELL), DANA)
    plan, invitations = make_plan(Task(["train"], {"A": "1"}), DANA, found, Path("/run"), RunOptions(invite=2))
    assert [invitation.worker for invitation in invitations] == [2, 3]
    [server] = plan.services
    assert server.secret is not None
    admitted = json.loads(server.secret)["workers"]
    assert len(admitted) == 4
    assert [invitation.keys.public for invitation in invitations if invitation.keys] == admitted[2:]
    assert invitations[0].task.env.keys() == {"A", "DANAZ_SETTINGS"}, "but not DANAZ_RUN, a folder of this machine"
    assert [invitation.keys and invitation.keys.secret in repr(invitation) for invitation in invitations] == [False] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            RunOptions(on_worker_failure="restart"),
            "under ssgd all machines are one Horovod world, in which any failure",
        ),
        (
            RunOptions(on_worker_failure="continue"),
            "use an asynchronous algorithm, such as dana, or --on-worker-failure",
        ),
        (RunOptions(invite=1), "under ssgd, which has no server, nobody can join later"),
        (RunOptions(resume=Path("/run")), "under ssgd, which has no server, nothing is kept to go on from"),
    ],
)
def test_one_world_over_all_machines_survives_no_failure(options: RunOptions, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        policy_of(options, SSGD)


def test_what_follows_a_failure_unless_said_otherwise() -> None:
    assert policy_of(RunOptions(), SSGD).on_failure == "stop"
    assert policy_of(RunOptions(), DANA).on_failure == "restart"
    assert policy_of(RunOptions(on_worker_failure="stop"), DANA).on_failure == "stop"


def test_horovod_speaks_no_ipv6() -> None:
    only_6 = {"a": finding("fd77::2"), "b": finding("fd77::3"), "localhost": finding("fd77::1")}
    with pytest.raises(LaunchError, match="ssgd needs IPv4 between the machines"):
        find_out(cluster(only_6), SSGD)
    found, _ = find_out(cluster(only_6), DANA)
    [server] = make_plan(TRAIN, DANA, found, Path("/run"), RunOptions())[0].services
    assert server.argv[-1] == "tcp://[fd77::1]:*"
