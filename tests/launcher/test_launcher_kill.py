"""Whichever process is killed, nothing of the run is left, and no other process is touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEADLINE_S = 20.0

# Runs the plan that its arguments describe, in a process of its own so that it can be killed.
LAUNCHER = """
import dataclasses, json, os, sys
from launcher.hosts import parse_hosts
from launcher.logs import quiet
from launcher.plan import Service, Workers, plan
from launcher.run import Timeouts, run

folder, hosts, grace_s, *command = sys.argv[1:]
server = Service("server", command, announces="SERVER", env={"NAME": "server"})
laid = plan(parse_hosts(hosts), Workers(command, one_world=True), [server], env=dict(os.environ), cwd=folder)
outcome = run(laid, folder, echo=quiet, timeouts=Timeouts(grace_s=float(grace_s), finish_s=0.1))
print(json.dumps({"exit_code": outcome.exit_code, "failure": str(outcome.failure)}))
sys.exit(outcome.exit_code)
"""

# A rank (or service) that ignores SIGTERM, with a child and a double-forked daemon that ignore it too.
STUBBORN = """
import os, select, signal, time
note = lambda name: open(name, "w").close()
signal.signal(signal.SIGTERM, lambda *_: note("terminated"))
signal.signal(signal.SIGINT, lambda *_: note("interrupted"))
print("SERVER=tcp://127.0.0.1:5555", flush=True)
name = os.environ.get("NAME") or "rank." + os.environ.get("RANK", "bystander")
def pause():
    while True: signal.pause()
if os.fork() == 0:
    os.setsid()
    os._exit(0) if os.fork() else pause()
os.wait()
os.fork() or pause()
with open(name + ".new", "w") as file: file.write(str(os.getpid()))
os.rename(name + ".new", name + ".ready")
while os.environ.get("FLOOD"):
    if not select.select([], [1], [], 0.2)[1]: note("full")
    os.write(1, bytes(1 << 12))
while not os.path.exists("finish"): time.sleep(0.01)
os._exit(0)
"""


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.01)


def alive(token: str) -> set[int]:
    """Return all processes that inherited this token, wherever in the tree they are."""
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            environment = Path("/proc", entry, "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if token.encode() in environment:
            found.add(int(entry))
    return found


def parent(pid: int) -> int:
    return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])


class Launched:
    """A launcher with two ranks and a service. All ignore SIGTERM, and all are marked with a token."""

    def __init__(self, folder: Path, grace_s: float = 0.2, **env: str) -> None:
        self.folder, self.token = folder, f"TOKEN={uuid.uuid4()}"
        folder.mkdir()
        arguments = [str(folder), "localhost:2", str(grace_s), sys.executable, "-c", STUBBORN]
        self.launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, *arguments],
            env={**os.environ, **env, "MARK": self.token},
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def wait_until_ready(self) -> None:
        files = [self.folder / f"{name}.ready" for name in ("server", "rank.0", "rank.1")]
        until(lambda: all(file.exists() for file in files), "all are ready")

    def pid(self, who: str) -> int:
        if who == "launcher":
            return self.launcher.pid
        if who == "agent":
            return parent(self.pid("rank.0"))
        if who == "guardian":
            return parent(self.pid("agent"))
        return int((self.folder / f"{who}.ready").read_text())

    def outcome(self) -> dict[str, object]:
        output, _ = self.launcher.communicate(timeout=DEADLINE_S)
        outcome: dict[str, object] = json.loads(output)
        assert self.launcher.returncode == outcome["exit_code"]
        return outcome

    def clean_up(self) -> None:
        end_all(self.token)
        self.launcher.communicate()


def end_all(token: str) -> None:
    for pid in alive(token):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    all_launched: list[Launched] = []

    def start(name: str = "run", **options: object) -> Launched:
        all_launched.append(Launched(tmp_path / name, **options))  # type: ignore[arg-type]
        return all_launched[-1]

    yield start
    for launched in all_launched:
        launched.clean_up()


@pytest.fixture
def bystander(tmp_path: Path) -> Iterator[str]:
    """Start three processes that have the command line of a rank but belong to no run; yield their token."""
    token = f"TOKEN={uuid.uuid4()}"
    env = {**os.environ, "MARK": token}
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    until((tmp_path / "rank.bystander.ready").exists, "the bystander is ready")
    yield token
    end_all(token)
    process.wait(DEADLINE_S)


@pytest.mark.parametrize(
    ("victim", "exit_code", "message"),
    [
        ("rank.1", 137, "rank 1 on localhost was killed by SIGKILL"),
        ("server", 137, "server on localhost was killed by SIGKILL"),
        ("agent", 1, "the agent on localhost ended although nobody asked it to"),
        ("guardian", 1, "the agent on localhost stopped: it got SIGTERM"),
        ("launcher", None, None),
    ],
)
def test_nothing_is_left_and_nobody_else_touched(
    launch: Callable[..., Launched],
    bystander: str,
    victim: str,
    exit_code: int | None,
    message: str | None,
) -> None:
    launched = launch()
    launched.wait_until_ready()
    # the launcher; guardian and agent of the server and of the ranks; these three with a child and a daemon each
    assert len(alive(launched.token)) == 1 + 2 * 2 + 3 * 3
    os.kill(launched.pid(victim), signal.SIGKILL)
    if message is not None:
        outcome = launched.outcome()
        assert outcome["exit_code"] == exit_code
        assert str(outcome["failure"]).startswith(message)
        assert alive(launched.token) == set(), "the launcher returned before all had ended"
    launched.launcher.wait(DEADLINE_S)
    until(lambda: not alive(launched.token), "all have ended")
    assert len(alive(bystander)) == 3


def test_ranks_die_with_their_agent_though_its_guardian_sleeps(launch: Callable[..., Launched]) -> None:
    launched = launch()
    launched.wait_until_ready()
    ranks = {launched.pid("rank.0"), launched.pid("rank.1")}
    guardian, agent = launched.pid("guardian"), launched.pid("agent")
    os.kill(guardian, signal.SIGSTOP)
    os.kill(agent, signal.SIGKILL)
    until(lambda: not alive(launched.token) & ranks, "the kernel has ended the ranks")
    os.kill(guardian, signal.SIGCONT)
    until(lambda: not alive(launched.token), "the guardian has ended the rest")


def test_a_launcher_that_no_longer_listens_and_dies(launch: Callable[..., Launched]) -> None:
    launched = launch(FLOOD="1")
    launched.wait_until_ready()
    os.kill(launched.launcher.pid, signal.SIGSTOP)
    until((launched.folder / "full").exists, "all pipes are full")
    os.kill(launched.launcher.pid, signal.SIGKILL)
    until(lambda: not alive(launched.token), "all have ended")


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_the_run(launch: Callable[..., Launched], signum: signal.Signals, exit_code: int) -> None:
    launched = launch()
    launched.wait_until_ready()
    assert os.getpgid(launched.pid("agent")) != os.getpgid(launched.launcher.pid)
    os.killpg(launched.launcher.pid, signum)  # as a terminal does it: to the launcher's whole group
    assert launched.outcome() == {"exit_code": exit_code, "failure": "None"}
    assert alive(launched.token) == set()
    assert not (launched.folder / "interrupted").exists(), "Ctrl-C reached a rank past the launcher"


def test_a_second_ctrl_c_ends_the_grace(launch: Callable[..., Launched]) -> None:
    launched = launch(grace_s=1000.0)
    launched.wait_until_ready()
    os.kill(launched.launcher.pid, signal.SIGINT)
    until((launched.folder / "terminated").exists, "the ranks were asked to end")
    os.kill(launched.launcher.pid, signal.SIGINT)
    assert launched.outcome()["exit_code"] == 130
    assert alive(launched.token) == set()


def test_two_runs_do_not_disturb_each_other(launch: Callable[..., Launched]) -> None:
    first, second = launch("first"), launch("second")
    first.wait_until_ready()
    second.wait_until_ready()
    before = alive(second.token)
    os.kill(first.pid("rank.0"), signal.SIGKILL)
    assert first.outcome()["exit_code"] == 137
    assert alive(first.token) == set()
    assert alive(second.token) == before
    (second.folder / "finish").touch()
    assert second.outcome() == {"exit_code": 0, "failure": "None"}
    assert alive(second.token) == set(), "daemons of ranks that ended well are left"
