"""Runs over several machines and real ssh: what they compute, send and print, and that they leave nothing running."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from namespaces import Namespaces
from plays import LAUNCHER
from waiting import ended, until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(240)]

SECRET = "a secret of the launching machine"
SENT = "a variable that is sent along"

# A rank that ignores signals, with a daemon in a session of its own.
STUBBORN = "trap '' TERM INT HUP; (setsid sleep 1001 &); while :; do sleep 1000; done"


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# two machines\r\na slots=2\tmax_slots=4\r\n\r\nroot@b:2  ssh_port=22 # the other\r\n")
    return path


def train(network: Namespaces, folder: Path, *arguments: str) -> dict[str, Any]:
    env = {**os.environ, "SECRET": SECRET, "OMP_NUM_THREADS": "1"}
    schedule = [
        "--set",
        "epochs=5",
        "--set",
        "lr_schedule.milestones=[3]",
    ]  # batch norm settles when the rate has fallen
    config = ["configs/digits.yaml", *schedule, "--out", str(folder)]
    process = network.danaz("launch", *config, *arguments, env=env)
    output = ended(process)
    assert process.returncode == 0, output
    assert network.is_idle()
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def test_dana_trains_over_two_machines(network: Namespaces, hostfile: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    summary = train(network, folder, "--hostfile", str(hostfile))
    assert (summary["workers"], summary["ranks_per_worker"], summary["collective"]) == (2, 2, "horovod")
    assert summary["test_error_percent"] < 6
    updates = [json.loads(line) for line in (folder / "updates.jsonl").read_text().splitlines()]
    assert [update["version"] for update in updates] == list(range(1, len(updates) + 1))
    assert {update["worker"] for update in updates} == {0, 1}
    assert {path.parent.name for path in folder.glob("logs/*/rank.*")} == {"a", "b"}


@pytest.mark.parametrize("servers", ["localhost,b", "a,b"])
def test_shards_on_two_machines(network: Namespaces, tmp_path: Path, servers: str) -> None:
    folder, shards = tmp_path / "run", ["--server-host", servers, "--server-shards", "2"]
    summary = train(network, folder, "--hosts", "a:1,b:1", "--collective", "torch", *shards)
    assert summary["complete"]
    assert summary["test_error_percent"] < 6
    first, second = (
        folder / "logs" / host / name for host, name in zip(servers.split(","), ("server", "server.1"), strict=True)
    )
    assert (first / "stdout").read_text().startswith("DANAZ_SERVER=tcp://10.77.0.")
    assert (second / "stdout").read_text().startswith("DANAZ_SERVER_1=tcp://10.77.0.3:")
    assert (folder / "parameters.safetensors").exists()


def test_dana_trains_over_ipv6(network: Namespaces, tmp_path: Path) -> None:
    """The machines see the launching machine at its IPv6 address, so its server listens there."""
    folder = tmp_path / "run"
    summary = train(network, folder, "--hosts", "[fd77::2]:2,[fd77::3]:1")
    assert summary["workers"] == 2
    assert (folder / "logs/localhost/server/stdout").read_text().startswith("DANAZ_SERVER=tcp://[fd77::1]:")
    assert {path.parent.name for path in folder.glob("logs/*/rank.*")} == {"fd77::2", "fd77::3"}


def test_ssgd_meets_by_ipv4_though_hosts_are_named_by_ipv6(network: Namespaces) -> None:
    process = network.danaz(
        "launch", "configs/digits.yaml", "--hosts", "[fd77::2]:1,[fd77::3]:1", "-a", "ssgd", "--dry-run"
    )
    output = ended(process)
    assert process.returncode == 0, output
    assert "HOROVOD_GLOO_RENDEZVOUS_ADDR=10.77.0.2" in output


def test_ssgd_is_one_world_though_host_names_resolve_to_loopback(
    network: Namespaces, hostfile: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        said = ended(network.popen(["ssh", name, "getent hosts $(hostname)"]))
        assert said.split() == ["127.0.1.1", f"node-{name}"]
    folder = tmp_path / "run"
    summary = train(network, folder, "--hostfile", str(hostfile), "--algorithm", "ssgd")
    assert (summary["workers"], summary["ranks_per_worker"], summary["mean_lag"]) == (2, 2, 0)
    assert summary["test_error_percent"] < 6
    # Rank 0 ran on another machine, and what it wrote there has come here.
    assert len((folder / "updates.jsonl").read_text().splitlines()) == summary["updates"]
    assert (folder / "parameters.safetensors").stat().st_size > 10_000


def test_ssgd_and_dana_are_compared_on_the_same_machines(network: Namespaces, hostfile: Path, tmp_path: Path) -> None:
    folder = tmp_path / "comparison"
    arguments = ["configs/digits.yaml", "--live", "--hostfile", str(hostfile), "--algorithms", "ssgd,dana"]
    schedule = ["--set", "epochs=5", "--set", "lr_schedule.milestones=[3]"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = network.danaz("compare", *arguments, *schedule, "--out", str(folder), env=env)
    output = ended(process)
    assert process.returncode == 0, output
    assert network.is_idle()
    results = {row["algorithm"]: row for row in csv.DictReader((folder / "results.csv").read_text().splitlines())}
    assert {name: (row["schedule"], row["workers"], row["ranks_per_worker"]) for name, row in results.items()} == {
        "ssgd": ("live", "2", "2"),
        "dana": ("live", "2", "2"),
    }
    assert all(float(row["test_error_percent"]) < 6 and float(row["wall_seconds"]) > 0 for row in results.values())
    assert (folder / "error-by-time.png").exists()


SCRIPT = """
import json, os
import torch
import horovod.torch as hvd
hvd.init()
total = hvd.allreduce(torch.tensor([10.0 ** hvd.rank()]), op=hvd.Sum).item()
names = hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), hvd.cross_rank(), hvd.cross_size()
keys = "DANAZ_LOCAL_DEVICE", "HOROVOD_GLOO_IFACE", "SECRET", "GIVEN", "FROM_FILE"
print(json.dumps([total, names, os.uname().nodename, os.getcwd(), [os.environ.get(key) for key in keys]]))
from danaz.run.milestones import MISSING, reach
for milestone in MISSING:
    reach(milestone)  # or the first rank to end would end the others
hvd.shutdown()
"""


def test_a_script_on_unequal_slots_and_what_travels(network: Namespaces, hostfile: Path, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "variables").write_text("# for all ranks\nexport FROM_FILE=two words\n")
    where = ["--hostfile", str(hostfile), "--include", "a:0,1@b:1", "--chdir", str(tmp_path)]
    variables = ["-x", "GIVEN=yes", "--env-file", str(tmp_path / "variables")]
    process = network.danaz(
        *["launch", *where, *variables, "-a", "ssgd", "--out", str(tmp_path / "run"), "--", "python", "script.py"],
        env={**os.environ, "SECRET": SECRET},
    )
    output = ended(process)
    assert process.returncode == 1, "nothing was trained"
    assert "danaz: " not in output, output
    said = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("run/logs/*/rank.*/stdout"))]
    assert said == [
        [111.0, [0, 3, 0, 2, 0, 2], "node-a", str(tmp_path), ["0", "eth2", None, "yes", "two words"]],
        [111.0, [1, 3, 1, 2, 0, 1], "node-a", str(tmp_path), ["1", "eth2", None, "yes", "two words"]],
        [111.0, [2, 3, 0, 1, 1, 2], "node-b", str(tmp_path), ["1", "eth3", None, "yes", "two words"]],
    ], output


class Playing:
    """A launcher and its two stubborn ranks, one on each machine."""

    def __init__(self, network: Namespaces, folder: Path, silence_s: float = 90.0) -> None:
        self.network = network
        arguments = [str(folder), "a:1,b:1", str(silence_s), "sh", "-c", STUBBORN]
        env = {**os.environ, "SECRET": SECRET, "SENT": SENT}
        self.launcher = network.popen([sys.executable, "-c", LAUNCHER, *arguments], env=env)
        sleeps = [(name, f"sleep {seconds}") for name in ("a", "b") for seconds in (1000, 1001)]
        until(lambda: all(self.find(*sleep) for sleep in sleeps), "the ranks and their daemons are there")

    def find(self, name: str, words: str) -> int | None:
        return next((pid for pid, line in self.network.processes(name).items() if line.startswith(words)), None)

    def pid(self, name: str, words: str) -> int:
        pid = self.find(name, words)
        assert pid is not None
        return pid

    def outcome(self) -> tuple[int, str]:
        exit_code, failure = json.loads(ended(self.launcher))
        return exit_code, failure


@pytest.fixture
def play(network: Namespaces, tmp_path: Path) -> Iterator[Callable[..., Playing]]:
    playing: list[Playing] = []

    def start(**options: float) -> Playing:
        playing.append(Playing(network, tmp_path / "run", **options))
        return playing[-1]

    yield start
    for each in playing:
        each.launcher.kill()
        each.launcher.communicate()
    until(lambda: network.is_idle(), "everything has ended with its launcher")


def test_ctrl_c_ends_all_machines(play: Callable[..., Playing], network: Namespaces) -> None:
    playing = play()
    playing.launcher.send_signal(signal.SIGINT)
    assert playing.outcome() == (130, "None")
    assert network.is_idle()


def test_a_rank_killed_on_another_machine(play: Callable[..., Playing], network: Namespaces) -> None:
    playing = play()
    os.kill(playing.pid("b", "sh -c"), signal.SIGKILL)
    exit_code, failure = playing.outcome()
    assert exit_code == 137
    assert failure.startswith("rank 1 on b was killed by SIGKILL")
    assert network.is_idle()


def test_a_killed_ssh_takes_its_tree_along(play: Callable[..., Playing], network: Namespaces) -> None:
    playing = play()
    [ssh] = [
        pid for pid, line in network.processes("launching").items() if line.startswith("ssh ") and " -- b " in line
    ]
    os.kill(ssh, signal.SIGKILL)
    exit_code, failure = playing.outcome()
    assert exit_code == 1
    assert failure.startswith("the agent on b ended although nobody asked it to")
    until(lambda: network.is_idle(), "both machines are empty")


def test_a_killed_launcher_leaves_nothing(play: Callable[..., Playing], network: Namespaces) -> None:
    play().launcher.kill()
    until(lambda: network.is_idle(), "both machines are empty")


def test_nothing_but_the_order_reaches_another_machine(play: Callable[..., Playing], network: Namespaces) -> None:
    playing = play()
    for name in ("a", "b"):
        environments = [Path("/proc", str(pid), "environ").read_bytes() for pid in network.processes(name)]
        assert SECRET.encode() not in b"".join(environments)
        shell = Path("/proc", str(playing.pid(name, "sh -c")), "environ").read_bytes().split(b"\0")
        assert f"TRAVELS={SENT}".encode() in shell
    # No command line shows it: every user of a machine could read it there.
    lines = [line for name in network.nodes for line in network.processes(name).values()]
    assert not [line for line in lines if SENT in line]
    assert [
        line for line in lines if line.startswith("ssh ") and line.endswith(f"exec {sys.executable} -m launcher.agent")
    ]


def test_a_network_that_is_away_for_a_while_and_for_good(play: Callable[..., Playing], network: Namespaces) -> None:
    playing = play(silence_s=6.0)
    before = network.processes("b")
    network.link("b", "down")
    time.sleep(2.0)  # away for a while: what is tested is the time itself
    network.link("b", "up")
    time.sleep(2.0)
    assert network.processes("b") == before
    network.link("b", "down")
    try:
        until(lambda: not network.processes("b"), "the tree on b ends, for nothing is heard of the launcher")
        assert network.processes("a"), "a is still heard"
        playing.launcher.kill()
    finally:
        network.link("b", "up")


def test_machines_that_cannot_be_reached(network: Namespaces, tmp_path: Path) -> None:
    """Several cannot be reached. Each is named, with a cure."""
    a, b = network["a"], network["b"]
    known = network.known_hosts()
    keys = [f"{name} {(node.folder / 'host_key.pub').read_text()}" for name, node in (("changed", b), ("nokey", a))]
    known.write_text(known.read_text() + "".join(keys))
    config = network.ssh_config()
    before = config.read_text()
    aliases = {
        "refused": "Port 2",
        "changed": "HostKeyAlias changed",
        "stranger": "HostKeyAlias stranger",
        "nokey": "HostKeyAlias nokey\n PubkeyAuthentication no",
    }
    lines = [f"Host {name}\n HostName {a.address}\n {line}\n" for name, line in aliases.items()]
    config.write_text("".join(lines) + before)
    try:
        names = ",".join(["a", *aliases, "nowhere"])
        process = network.danaz("launch", "--hosts", names, "-a", "ssgd", "--dry-run", "--", "true")
        output = ended(process)
    finally:
        config.write_text(before)
        network.learn_host_keys()
    assert process.returncode == 2
    said = {line.removeprefix("danaz: ").partition(":")[0]: line for line in output.splitlines()}
    expected = {
        "refused": ("Connection refused", "nothing listens at its ssh port"),
        "changed": ("Host key verification failed", "ssh-keygen -R changed"),
        "stranger": ("Host key verification failed", "run `ssh stranger true` once by hand"),
        "nokey": ("Permission denied (publickey)", "ssh-copy-id nokey"),
        "nowhere": ("Could not resolve hostname", "check its spelling"),
    }
    for name, words in expected.items():
        for word in words:
            assert word in said[name], output
    assert "a" not in said
    assert network.is_idle()


@pytest.mark.parametrize("lacks", ["python", "danaz", "the same danaz", "its directory"])
def test_a_machine_that_lacks_something(network: Namespaces, tmp_path: Path, lacks: str) -> None:
    other = tmp_path / "old" / "danaz-0.0.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: danaz\nVersion: 0.0.9\n")
    old_python, bare_python = tmp_path / "old-python", tmp_path / "bare-python"
    old_python.write_text(f'#!/bin/sh\nPYTHONPATH={other.parent} exec {sys.executable} "$@"\n')
    bare_python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    for script in (old_python, bare_python):
        script.chmod(0o755)
    options, message = {
        "python": (
            ["--remote-python", "/no/python"],
            "a: bash: line 1: /no/python: No such file or directory; there is",
        ),
        "danaz": (["--remote-python", str(bare_python)], f"; this program is not installed in {bare_python} there"),
        "the same danaz": (["--remote-python", str(old_python)], "a: danaz 0.0.9 there, 0.1.0 here; install the same"),
        "its directory": (["--chdir", "/no/directory"], "a: cannot start: [Errno 2] No such file or directory"),
    }[lacks]
    process = network.danaz("doctor", "--hosts", "a", "--chdir", str(tmp_path), *options)
    output = ended(process)
    assert process.returncode == 1, output
    assert message in output
    assert "1 of 1 hosts cannot take part." in output


@pytest.mark.parametrize("command", [["doctor"], ["launch", "configs/digits.yaml", "--dry-run"]])
def test_a_machine_under_two_names(network: Namespaces, command: list[str]) -> None:
    process = network.danaz(*command, "--hosts", "a,b,[fd77::2]")
    output = " ".join(ended(process).split())
    assert process.returncode in (1, 2), output
    assert "fd77::2 (--hosts entry 3) and a (--hosts entry 1) are one machine; name it once" in output
    assert network.is_idle()


def test_this_machine_by_its_own_address(network: Namespaces) -> None:
    """It has no sshd, and needs none."""
    process = network.danaz("doctor", "--hosts", network["launching"].address)
    output = ended(process)
    assert process.returncode == 0, output


def test_the_doctor_finds_all_well(network: Namespaces) -> None:
    process = network.danaz("doctor", "--hosts", "a:2,b")
    output = ended(process)
    assert process.returncode == 0, output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert rows["a"][1] == rows["b"][1] == "yes"
    assert "10.77.0.2 (eth2)" in " ".join(rows["a"])
    assert "10.77.0.3 (eth3)" in " ".join(rows["b"])
    assert rows["All"] == ["All", "hosts", "can", "take", "part."]
