"""While a run trains, its processes listen only on the addresses that they need: inside a machine, on loopback."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import live
import pytest
from namespaces import Namespaces

DEADLINE_S = 120.0
LISTEN = "0A"  # <net/tcp_states.h>

# Trains until it may end.
SCRIPT = f"""
import sys, time
from pathlib import Path
out = Path(sys.argv[1])
{live.SMALL_SCRIPT}\
        (out / f"trains.{{danaz.rank()}}").touch()
        while not (out / "go").exists():
            time.sleep(0.01)
"""


def processes_below(pid: int) -> Iterator[int]:
    yield pid
    for children in Path("/proc", str(pid), "task").glob("*/children"):
        for child in children.read_text().split():
            yield from processes_below(int(child))


def listens_on(pid: int) -> list[str]:
    """Return the addresses of all sockets on which a process accepts TCP connections."""
    inodes = {path.readlink().name for path in Path("/proc", str(pid), "fd").iterdir() if path.is_symlink()}
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path("/proc", str(pid), "net", table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTEN and f"socket:[{rest[5]}]" in inodes:
                words = bytes.fromhex(local.partition(":")[0])
                # in words of 32 bits, each with its last byte first
                network = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                found.append(socket.inet_ntop(family, network))
    return found


def until_trains(launcher: subprocess.Popen[str], folder: Path) -> None:
    """Wait until two ranks have done a step. They go on when `go` exists."""
    deadline = time.monotonic() + DEADLINE_S
    while len(list(folder.glob("trains.*"))) < 2:
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end(launcher: subprocess.Popen[str]) -> None:
    if launcher.poll() is None:
        launcher.send_signal(signal.SIGINT)
        launcher.communicate()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(240)
@pytest.mark.parametrize("collective", ["torch", "horovod"])
def test_a_world_over_machines_listens_between_them_alone(network: Namespaces, tmp_path: Path, collective: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    options = ["--hosts", "a:1,b:1", "--algorithm", "ssgd", "--collective", collective, "--out", str(tmp_path / "run")]
    script = ["--", "python", str(tmp_path / "script.py"), str(tmp_path)]
    launcher = network.danaz("launch", *options, *script)
    try:
        until_trains(launcher, tmp_path)
        pids = {name: network.processes(name) for name in ("a", "b")}
        found = {name: {address for pid in pids[name] for address in listens_on(pid)} for name in pids}
        (tmp_path / "go").touch()
        output, _ = launcher.communicate(timeout=DEADLINE_S)
    finally:
        end(launcher)
    assert launcher.returncode == 0, output
    assert found["a"] == {network["a"].address}, "where rank 0 is"
    assert found["b"] <= {network["b"].address}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "collective"), [("dana", "torch"), ("ssgd", "torch"), ("dana", "horovod"), ("ssgd", "horovod")]
)
def test_a_run_on_one_machine_listens_on_loopback_alone(tmp_path: Path, algorithm: str, collective: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    options = ["--hosts", "localhost:2", "--algorithm", algorithm, "--collective", collective]
    launcher = live.start(*options, out=tmp_path / "run", script=[str(script), str(tmp_path)])
    try:
        until_trains(launcher, tmp_path)
        found = {address for pid in processes_below(launcher.pid) for address in listens_on(pid)}
        (tmp_path / "go").touch()
        output, _ = launcher.communicate(timeout=DEADLINE_S)
    finally:
        end(launcher)
    assert launcher.returncode == 0, output
    assert found == {"127.0.0.1"}
