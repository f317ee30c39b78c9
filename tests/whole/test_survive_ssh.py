"""Runs over several machines whose processes are killed and whose connections are cut: some go on, some come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import live
import pytest
from namespaces import Namespaces
from waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(240)]

DEADLINE_S = 60.0
TRAINING_S = 200.0

# Runs a plan over ssh without any training, in a process of its own: a server here, a worker on each host.
LAUNCHER = """
import json, sys
from launcher import agents, ssh
from launcher.connections import SharedConnections
from launcher.hosts import parse_hosts
from launcher.logs import quiet
from launcher.plan import ANNOUNCED, Returns, Service, Workers, plan
from launcher.run import Timeouts, run
from launcher.supervisor import Policy

folder, policy, silence_s, server_host, *command = sys.argv[1:]
silence_s = float(silence_s)
if silence_s:
    agents.SILENCE_S, agents.PING_S = silence_s, silence_s / 6
    ssh.OPTIONS |= {"ServerAliveInterval": str(round(silence_s / 6)), "ConnectTimeout": str(round(silence_s / 2))}
serve = 'echo DANAZ_SERVER=tcp://there:4711; echo "$0" >> $KEPT/lives; exec sleep 2000'
server = Service("server", ["sh", "-c", serve, "first"], announces="DANAZ_SERVER", again=["sh", "-c", serve, ANNOUNCED],
                 host=parse_hosts(server_host)[0], returns=Returns("KEPT", ("lives",)))
laid = plan(parse_hosts("a:1,b:1"), Workers(command), [server], env={}, cwd="/")
told = open(folder + "/told", "w", buffering=1)
outcome = run(laid, folder, echo=quiet, tell=lambda sentence: print(sentence, file=told),
              agent_command=ssh.Ssh(connections=SharedConnections()), timeouts=Timeouts(grace_s=1.0, finish_s=1.0),
              policy=Policy(**json.loads(policy)))
print(json.dumps([outcome.exit_code, str(outcome.failure), outcome.events]))
"""

# A rank with a daemon in a session of its own.
RANK = "(setsid sleep 1001 &); exec sleep 1000"
QUICK = {"on_failure": "restart", "backoff_s": 0.1}


class Playing:
    """A run in progress, with a rank and its daemon on each machine."""

    def __init__(
        self, network: Namespaces, folder: Path, silence_s: float = 0.0, server: str = "localhost", **policy: object
    ) -> None:
        self.network, self.folder = network, folder
        folder.mkdir()
        arguments = [str(folder), json.dumps({**QUICK, **policy}), str(silence_s), server, "sh", "-c", RANK]
        self.launcher = network.popen([sys.executable, "-c", LAUNCHER, *arguments])
        sleeps = [(name, seconds) for name in ("a", "b") for seconds in (1000, 1001)]
        until(lambda: all(self.find(*sleep) for sleep in sleeps), "the ranks and their daemons are there")

    def find(self, name: str, seconds: int) -> list[int]:
        """Return the processes that sleep for this long: 1000 is a rank, 1001 its daemon, 2000 the server."""
        return [pid for pid, line in self.network.processes(name).items() if line == f"sleep {seconds}"]

    @property
    def told(self) -> list[str]:
        return (self.folder / "told").read_text().splitlines()

    def wait_for_second_life(self, before: dict[int, str]) -> None:
        """Wait until b has a new rank and a new daemon, and nothing of its first life."""
        until(lambda: self.told and self.told[-1] == "worker 1 on b: started again", "b is back")
        until(lambda: self.find("b", 1000) and self.find("b", 1001), "with its daemon")
        assert not self.network.processes("b").keys() & before.keys()
        assert [len(self.find("b", seconds)) for seconds in (1000, 1001)] == [1, 1]

    def outcome(self) -> tuple[int, str, list[str]]:
        output, _ = self.launcher.communicate(timeout=DEADLINE_S)
        exit_code, failure, events = json.loads(output)
        return exit_code, failure, events

    def interrupt(self) -> list[str]:
        """Press Ctrl-C; return the events that the run survived."""
        self.launcher.send_signal(signal.SIGINT)
        exit_code, _, events = self.outcome()
        assert exit_code == 130
        return events


@pytest.fixture
def play(network: Namespaces, tmp_path: Path) -> Iterator[Callable[..., Playing]]:
    playing: list[Playing] = []

    def start(**options: object) -> Playing:
        playing.append(Playing(network, tmp_path / "run", **options))  # type: ignore[arg-type]
        return playing[-1]

    yield start
    network.link("b", "up")
    for each in playing:
        each.launcher.kill()
        each.launcher.communicate()
    until(network.is_idle, "everything has ended with its launcher")


def kill_ssh(network: Namespaces, name: str) -> None:
    """Kill the agents' ssh processes to a machine, and the process that holds the connection that they share."""
    lines = network.processes("launching").items()
    agents = {pid: line for pid, line in lines if line.startswith("ssh ") and f" -- {name} " in line}
    sockets = {word.partition("=")[2] for line in agents.values() for word in line.split() if "ControlPath=" in word}
    shared = [pid for pid, line in lines if line in {f"ssh: {socket} [mux]" for socket in sockets}]
    assert len(shared) == 1
    for pid in (*agents, *shared):
        os.kill(pid, signal.SIGKILL)


def kill_tree(network: Namespaces, name: str) -> None:
    for pid in network.processes(name):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("what", ["a rank", "the tree", "its ssh"])
def test_a_worker_comes_back_and_the_other_goes_on(
    play: Callable[..., Playing], network: Namespaces, what: str
) -> None:
    playing = play()
    a, b = network.processes("a"), network.processes("b")
    match what:
        case "a rank":
            os.kill(playing.find("b", 1000)[0], signal.SIGKILL)
        case "the tree":
            kill_tree(network, "b")
        case "its ssh":
            kill_ssh(network, "b")
    playing.wait_for_second_life(b)
    reason = "rank 1 was killed by SIGKILL" if what == "a rank" else "the agent ended although nobody asked it to"
    assert playing.told[0].startswith(f"worker 1 on b: {reason}")
    assert "; restart 1 of 3 in " in playing.told[0]
    assert network.processes("a") == a
    assert playing.interrupt() == ["worker 1 was restarted once"]


def test_a_worker_is_left_behind(play: Callable[..., Playing], network: Namespaces) -> None:
    playing = play(on_failure="continue")
    a = network.processes("a")
    kill_ssh(network, "b")
    until(lambda: not network.processes("b"), "the tree ends with its connection")
    until(lambda: playing.told, "it is told")
    assert playing.told[0].endswith("; the others go on")
    assert network.processes("a") == a
    assert playing.interrupt() == ["worker 1 was lost"]


def test_a_network_away_for_half_a_minute_ends_nothing(play: Callable[..., Playing], network: Namespaces) -> None:
    """The timeouts are the real ones."""
    playing = play()
    before = network.processes("a"), network.processes("b")
    network.link("b", "down")
    time.sleep(30.0)  # away for a while: what is tested is the time itself
    network.link("b", "up")
    # The next sign of life passes both ways: the far end still takes orders.
    os.kill(playing.find("b", 1000)[0], signal.SIGKILL)
    until(lambda: playing.told, "what happens on b is heard again")
    assert playing.told[0].startswith("worker 1 on b: rank 1 was killed by SIGKILL; restart 1 of 3")
    assert before[0] == network.processes("a")
    playing.wait_for_second_life(before[1])
    assert playing.interrupt() == ["worker 1 was restarted once"]


def test_a_network_away_for_long_ends_a_worker_which_comes_back_with_it(
    play: Callable[..., Playing], network: Namespaces
) -> None:
    playing = play(silence_s=6.0)
    a, b = network.processes("a"), network.processes("b")
    network.link("b", "down")
    until(lambda: not network.processes("b"), "the tree on b ends, for nothing is heard of the launcher")
    until(lambda: any("; next try in" in sentence for sentence in playing.told), "b cannot be reached")
    network.link("b", "up")
    playing.wait_for_second_life(b)
    assert network.processes("a") == a
    assert playing.interrupt() == ["worker 1 was restarted once"]


def test_a_machine_that_never_comes_back_is_given_up(play: Callable[..., Playing], network: Namespaces) -> None:
    playing = play(unreachable_s=3.0)
    a = network.processes("a")
    config = network.ssh_config()
    before = config.read_text()
    config.write_text("Host b\n Port 2\n" + before)
    try:
        kill_ssh(network, "b")
        late = "; it was out of reach for 3 s; the others go on"
        until(lambda: any(said.endswith(late) for said in playing.told), "it gives up")
    finally:
        config.write_text(before)
    assert any("Connection refused" in sentence for sentence in playing.told)
    assert network.processes("a") == a
    assert playing.interrupt() == ["worker 1 was lost"]


def test_ctrl_c_while_a_machine_is_away(play: Callable[..., Playing], network: Namespaces) -> None:
    playing = play(silence_s=6.0)
    network.link("b", "down")
    until(lambda: any("; next try in" in sentence for sentence in playing.told), "b cannot be reached")
    playing.interrupt()
    assert not network.processes("a")


@pytest.mark.parametrize(("what", "where"), [("the server", "localhost"), ("the server", "a"), ("its ssh", "a")])
def test_the_server_comes_back_with_its_files(
    play: Callable[..., Playing], network: Namespaces, where: str, what: str
) -> None:
    playing = play(server=where)
    [server] = playing.find("launching" if where == "localhost" else where, 2000)
    b = network.processes("b")
    if what == "the server":
        os.kill(server, signal.SIGKILL)
    else:
        kill_ssh(network, "a")
    until(lambda: f"server on {where}: started again" in playing.told, "the server is back")
    assert network.processes("b") == b
    playing.interrupt()
    assert (playing.folder / "lives").read_text() == "first\ntcp://there:4711\n"


def test_training_goes_on_though_a_rank_is_killed(network: Namespaces, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["configs/digits.yaml", "--set", "epochs=25", "--hosts", "a:2,b:1", "--out", str(folder)]
    process = network.danaz("launch", *arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})

    until(lambda: len(live.read_updates(folder)) > 20, "it trains", TRAINING_S)
    [rank] = [pid for pid, line in network.processes("b").items() if line.endswith("danaz work")]
    os.kill(rank, signal.SIGKILL)
    try:
        output, _ = process.communicate(timeout=TRAINING_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        pytest.fail(process.communicate()[0])
    assert process.returncode == 0, output
    assert "worker 1 on b: rank 2 was killed by SIGKILL; restart 1 of 3 in 2 s" in output
    versions = [update["version"] for update in live.read_updates(folder)]
    assert versions == list(range(1, len(versions) + 1))
    assert json.loads((folder / "summary.json").read_text())["test_error_percent"] < 6


def test_shards_on_another_machine_go_on_together(network: Namespaces, tmp_path: Path) -> None:
    """Their files stay there, in one folder, until the run is complete."""
    folder = tmp_path / "run"
    arguments = ["configs/digits.yaml", "--set", "epochs=25", "--hosts", "a:1,b:1", "--out", str(folder)]
    shards = ["--server-host", "a", "--server-shards", "2", "--checkpoint-seconds", "0.5"]
    process = network.danaz("launch", *arguments, *shards, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        kept = "danaz-*-server/checkpoints.1/00000[3-9].json"
        until(lambda: [*Path(tempfile.gettempdir()).glob(kept)] or process.poll() is not None, "it trains", TRAINING_S)
        [shard] = [pid for pid, line in network.processes("a").items() if "danaz serve" in line and "--shard" in line]
        os.kill(shard, signal.SIGKILL)
        output, _ = process.communicate(timeout=TRAINING_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 0, output
    assert "server on a: server.1 was killed by SIGKILL; restart 1 of 3 in 2 s" in output
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["complete"], summary["restarts"]) == (True, 1)
    assert summary["test_error_percent"] < 6
    assert [update["version"] for update in live.read_updates(folder)] == list(range(1, 25 * 45 + 1))
    assert (folder / "parameters.safetensors").exists()


def test_a_machine_joins_with_a_key_and_none_without(network: Namespaces, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["configs/quadratic.yaml", "--set", "epochs=100000", "--hosts", "a", "--invite", "1"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = network.danaz("launch", *arguments, "--server-port", "5555", "--out", str(folder), env=env)

    def workers() -> set[int]:
        return {update["worker"] for update in live.read_updates(folder)}

    until(lambda: workers() == {0} or run.poll() is not None, "it trains", TRAINING_S)
    key = folder / "invitations" / "worker-1.json"
    forged = tmp_path / "forged.json"
    forged.write_text(json.dumps({**json.loads(key.read_text()), "worker": 7, "keys": None}))
    forged.chmod(0o600)
    join = [sys.executable, "-m", "danaz", "work", "--join", "launching:5555", "--slots", "1"]
    stranger = network.popen([*join, "--key", str(forged), "--out", str(tmp_path / "stranger")], on="a", env=env)
    joined = network.popen([*join, "--key", str(key), "--out", str(tmp_path / "joined")], on="b", env=env)
    try:
        until(lambda: workers() == {0, 1} or joined.poll() is not None, "b takes part", TRAINING_S)
        until(lambda: (tmp_path / "stranger/logs/localhost/rank.0").exists(), "the stranger asks in vain", TRAINING_S)
        for process in (joined, stranger):
            process.send_signal(signal.SIGTERM)
        assert [process.wait(DEADLINE_S) for process in (joined, stranger)] == [143, 143], joined.communicate()[0]
        assert not network.processes("b")
        assert run.poll() is None
        run.send_signal(signal.SIGINT)
        assert run.wait(DEADLINE_S) == 130
    finally:
        for process in (joined, stranger, run):
            process.kill()
            process.communicate()
    assert workers() == {0, 1}
