"""A command makes one ssh connection to each machine, as sshd's own log shows, and closes it at its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import Namespaces
from sshds import PORT, another_sshd, ssh_config
from waiting import ended, until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(240)]

WORKERS = 4  # on each machine

# Surveys the machines, then runs a plan on them, as `danaz launch` does.
LAUNCHER = """
import os, sys
from launcher.connections import SharedConnections
from launcher.hosts import parse_hosts
from launcher.logs import quiet
from launcher.plan import Workers, plan
from launcher.run import Timeouts, run
from launcher.ssh import Ssh
from launcher.survey import survey

folder, python, hosts, workers, *command = sys.argv[1:]
hosts, ssh = parse_hosts(hosts), Ssh(python=python, connections=SharedConnections())
found = survey(hosts, ssh, hub=hosts[0], cwd="/")
assert not [finding.problem for finding in found.values() if finding.problem], found
laid = plan(hosts, Workers(command, int(workers)), env={}, cwd="/")
outcome = run(laid, folder, echo=quiet, agent_command=ssh, timeouts=Timeouts(grace_s=0.2))
print([outcome.exit_code, str(outcome.failure), len(laid.ranks)])
"""


# Prints what happens to the connections of machine a when the launcher forgets the first of them.
FORGETTING = """
import os, re, subprocess, sys, time
from launcher.connections import SharedConnections
from launcher.hosts import Host
from launcher.ssh import Ssh, forget_connection, shared_connection

ssh = Ssh(connections=SharedConnections())
*words, _ = ssh(Host("a"))

def begin():
    agent = subprocess.Popen([*words, "echo up; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert agent.stdout.readline() == "up\\n"
    return agent

def holder():
    path = shared_connection(ssh(Host("a")))
    check = ["ssh", "-F", "none", "-o", "ControlPath=" + path, "-O", "check", "--", "a"]
    return re.search("pid=([0-9]+)", subprocess.run(check, capture_output=True, text=True).stderr)[1]

first = begin()
earlier = holder()
forget_connection(ssh(Host("a")))
second = begin()
print("another connection:", holder() != earlier)
print("the first goes on:", first.communicate("still there")[0])
while os.path.exists(f"/proc/{earlier}") and open(f"/proc/{earlier}/cmdline").read():
    time.sleep(0.02)
begin().communicate()
second.communicate()
"""


def connections(log: Path) -> int:
    return log.read_text().count("Accepted publickey")


def sockets(folder: Path) -> list[Path]:
    return list(folder.glob("launcher-ssh-*/*"))


def start(
    network: Namespaces, folder: Path, hosts: str, workers: int, *command: str, python: str = sys.executable
) -> subprocess.Popen[str]:
    """Start the launcher with `folder` as its folder for temporary files. `python` runs the agents."""
    arguments = [str(folder / "run"), python, hosts, str(workers), *command]
    return network.popen([sys.executable, "-c", LAUNCHER, *arguments], env={**os.environ, "TMPDIR": str(folder)})


def check_closed(network: Namespaces, folder: Path) -> None:
    """Check that the keeper closes all connections of a launcher that has ended."""
    until(lambda: not network.processes("a") and not network.processes("b"), "nothing is left there")
    until(lambda: not list(folder.glob("launcher-ssh-*")), "the keeper removes the folder")
    here = f"{folder}/"
    until(
        lambda: not [line for line in network.processes("launching").values() if here in line],
        "no connection is left here",
        deadline_s=10.0,  # a connection that the keeper misses stays for 15 s
    )


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path is short enough for a socket. Those of pytest are too long."""
    with tempfile.TemporaryDirectory(prefix="danaz-test-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_survey_and_a_run_share_one_connection_a_machine(network: Namespaces, short: Path) -> None:
    logs = [network[name].folder / "sshd.log" for name in ("a", "b")]
    before = [connections(log) for log in logs]
    said = ended(start(network, short, f"a:{WORKERS},b:{WORKERS}", WORKERS, "true"))
    assert said == f"[0, 'None', {2 * WORKERS}]\n"
    assert [connections(log) - count for log, count in zip(logs, before, strict=True)] == [1, 1]
    until(lambda: not list(short.glob("launcher-ssh-*")), "the keeper removes the folder")


def test_doctor_makes_one_connection_a_machine(network: Namespaces, tmp_path: Path) -> None:
    logs = [network[name].folder / "sshd.log" for name in ("a", "b")]
    before = [connections(log) for log in logs]
    said = ended(network.danaz("doctor", "--hosts", "a,b", "--chdir", str(tmp_path)), 120.0)
    assert "All hosts can take part." in said
    assert [connections(log) - count for log, count in zip(logs, before, strict=True)] == [1, 1]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_the_connection_ends_with_the_launcher(network: Namespaces, short: Path, signum: signal.Signals) -> None:
    launcher = start(network, short, "a:1,b:1", 1, "sleep", "1000")
    until(lambda: "sleep 1000" in network.processes("b").values(), "the ranks run")
    assert len(sockets(short)) == 2
    launcher.send_signal(signum)
    launcher.communicate(timeout=30.0)
    check_closed(network, short)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_a_connection_whose_agent_has_not_answered_ends_with_the_launcher(
    network: Namespaces, short: Path, signum: signal.Signals
) -> None:
    silent = short / "python"
    silent.write_text("#!/bin/sh\nexec cat\n")
    silent.chmod(0o755)
    launcher = start(network, short, "a:1,b:1", 1, "true", python=str(silent))
    until(lambda: all("cat" in network.processes(name).values() for name in ("a", "b")), "the agents come up")
    launcher.send_signal(signum)
    launcher.communicate(timeout=30.0)
    check_closed(network, short)


def test_a_connection_over_which_no_answer_came_is_used_no_more(network: Namespaces, short: Path) -> None:
    log = network["a"].folder / "sshd.log"
    before = connections(log)
    said = ended(network.popen([sys.executable, "-c", FORGETTING], env={**os.environ, "TMPDIR": str(short)}))
    assert said == "another connection: True\nthe first goes on: still there\n"
    assert connections(log) - before == 2, "the third agent shares the second's connection"
    check_closed(network, short)


def test_an_sshd_that_takes_few_sessions_gets_more_connections(network: Namespaces, short: Path) -> None:
    alias = f"Host alias*\n HostName {network['a'].address}\n Port {PORT}\n HostKeyAlias a\n"
    with another_sshd(network, short, "MaxSessions 2"), ssh_config(network, alias):
        said = ended(start(network, short, f"alias:{WORKERS}", WORKERS, "true"), 60.0)
    assert said == f"[0, 'None', {WORKERS}]\n"
    assert 1 < connections(short / "sshd.log") < WORKERS
