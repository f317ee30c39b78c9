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

# Surveys the machines, then plays a plan on them, as `danaz launch` does.
LAUNCHER = """
import os, sys
from launcher.connections import SharedConnections
from launcher.hosts import parse_hosts
from launcher.logs import quiet
from launcher.plan import Workers, plan
from launcher.run import Timeouts, run
from launcher.ssh import Ssh
from launcher.survey import survey

folder, hosts, workers, *command = sys.argv[1:]
hosts, ssh = parse_hosts(hosts), Ssh(connections=SharedConnections())
found = survey(hosts, ssh, hub=hosts[0], cwd="/")
assert not [finding.problem for finding in found.values() if finding.problem], found
laid = plan(hosts, Workers(command, int(workers)), env={}, cwd="/")
outcome = run(laid, folder, echo=quiet, agent_command=ssh, timeouts=Timeouts(grace_s=0.2))
print([outcome.exit_code, str(outcome.failure), len(laid.ranks)])
"""


def connections(log: Path) -> int:
    return log.read_text().count("Accepted publickey")


def sockets(folder: Path) -> list[Path]:
    return list(folder.glob("launcher-ssh-*/*"))


def start(network: Namespaces, folder: Path, hosts: str, workers: int, *command: str) -> subprocess.Popen[str]:
    """Start the launcher with `folder` as its folder for temporary files."""
    arguments = [str(folder / "run"), hosts, str(workers), *command]
    return network.popen([sys.executable, "-c", LAUNCHER, *arguments], env={**os.environ, "TMPDIR": str(folder)})


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
    until(lambda: any("sleep" in line for line in network.processes("b").values()), "the ranks run")
    assert len(sockets(short)) == 2
    launcher.send_signal(signum)
    launcher.communicate(timeout=30.0)
    until(lambda: not network.processes("a") and not network.processes("b"), "nothing is left there")
    until(lambda: not list(short.glob("launcher-ssh-*")), "the keeper removes the folder")
    here = f"{short}/"
    until(
        lambda: not [line for line in network.processes("launching").values() if here in line],
        "no connection is left here",
        deadline_s=30.0,  # 20 s after the launcher, as docs/security.md says
    )


def test_an_sshd_that_takes_few_sessions_gets_more_connections(network: Namespaces, short: Path) -> None:
    alias = f"Host alias*\n HostName {network['a'].address}\n Port {PORT}\n HostKeyAlias a\n"
    with another_sshd(network, short, "MaxSessions 2"), ssh_config(network, alias):
        said = ended(start(network, short, f"alias:{WORKERS}", WORKERS, "true"), 60.0)
    assert said == f"[0, 'None', {WORKERS}]\n"
    assert 1 < connections(short / "sshd.log") < WORKERS
