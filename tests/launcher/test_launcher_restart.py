"""A run goes on although its processes are killed: which are restarted, with what, and what the user is told."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from launcher.hosts import Host, parse_hosts
from launcher.logs import quiet
from launcher.plan import ANNOUNCED, Returns, Service, Workers, plan
from launcher.run import Outcome, Timeouts, run
from launcher.supervisor import Policy
from launcher.transport import local_agent_command

QUICK = Policy("restart", backoff_s=0.05)

# Every rank writes which life it lives, as `<worker>.<rank>.<life>`, and then does what its worker's line says.
RANK = """
import os, signal, sys, time
worker, rank = os.environ["LAUNCHER_WORKER"], os.environ["RANK"]
def at(name): return os.path.join(os.environ["FOLDER"], name)
life = 1
while os.path.exists(at(f"{worker}.{rank}.{life}")): life += 1
with open(at("new" + worker + rank), "w") as file:
    file.write(os.environ["LAUNCHER_INCARNATION"] + " " + str(os.getpid()))
os.rename(at("new" + worker + rank), at(f"{worker}.{rank}.{life}"))
def until(condition):
    while not condition(): time.sleep(0.005)
def exists(name): return os.path.exists(at(name))
def die(): os.kill(os.getpid(), signal.SIGKILL)
"""


def play(
    folder: Path,
    story: str,
    *,
    hosts: str = "localhost:2",
    workers_per_host: int = 2,
    services: Sequence[Service] = (),
    policy: Policy = QUICK,
    one_world: bool = False,
    **options: object,
) -> tuple[Outcome, list[str]]:
    """Return the outcome, and the sentences that the user was told."""
    env = {**os.environ, "FOLDER": str(folder)}
    command = [sys.executable, "-c", RANK + story]
    laid = plan(parse_hosts(hosts), Workers(command, workers_per_host, one_world), services, env=env, cwd="/")
    told: list[str] = []
    arguments: dict[str, object] = {"echo": quiet, "tell": told.append, "timeouts": Timeouts(grace_s=1.0), **options}
    outcome = run(laid, folder, policy=policy, **arguments)  # type: ignore[arg-type]
    return outcome, told


def lives(folder: Path, worker: int, rank: int = 0) -> list[int]:
    """Return the incarnation of each life."""
    files = sorted(folder.glob(f"{worker}.{rank}.*"), key=lambda path: int(path.suffix[1:]))
    return [int(path.read_text().split()[0]) for path in files]


def test_a_killed_rank_comes_back_with_all_of_its_worker(tmp_path: Path) -> None:
    story = """
if worker == "1":
    if life == 1:
        if rank == "0": until(lambda: exists("1.1.1")); die()
        until(lambda: False)
    until(lambda: exists("1.0.2") and exists("1.1.2"))
    open(at("back"), "w")
until(lambda: exists("back"))
"""
    outcome, told = play(tmp_path, story, hosts="localhost:4")
    assert outcome == Outcome(0, events=("worker 1 was restarted once",))
    assert told == [
        "worker 1 on localhost: rank 2 was killed by SIGKILL; restart 1 of 3 in 0.05 s",
        "worker 1 on localhost: started again",
    ]
    assert len(lives(tmp_path, 0)) == 1, "the other worker went on"
    for rank in range(2):
        first, second = lives(tmp_path, 1, rank)
        assert second > first


def test_a_killed_tree_leaves_nobody_behind(tmp_path: Path) -> None:
    """Children and daemons of a worker's first life are gone before its second life begins."""
    story = """
if life == 1:
    if os.fork() == 0:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with open(at("new"), "w") as file: file.write(str(os.getpid()))
        os.rename(at("new"), at("daemon"))
        while True: signal.pause()
    until(lambda: exists("daemon"))
    die()
daemon = int(open(at("daemon")).read())
try:
    os.kill(daemon, 0)
except ProcessLookupError:
    sys.exit(0)
sys.exit("the daemon lives")
"""
    outcome, _ = play(tmp_path, story, hosts="localhost:1", workers_per_host=1, timeouts=Timeouts(grace_s=0.2))
    assert outcome == Outcome(0, events=("worker 0 was restarted once",))


@pytest.mark.parametrize("whom", ["agent", "guardian"])
def test_a_killed_agent_is_connected_again(tmp_path: Path, whom: str) -> None:
    story = f"""
def parent(pid): return int(open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[1])
if life == 1:
    agent = os.getppid()
    os.kill(agent if {whom!r} == "agent" else parent(agent), signal.SIGKILL)
    until(lambda: False)
"""
    outcome, told = play(tmp_path, story, hosts="localhost:1", workers_per_host=1, timeouts=Timeouts(grace_s=0.1))
    assert outcome == Outcome(0, events=("worker 0 was restarted once",))
    assert told[0].startswith("worker 0 on localhost: the agent "), told
    assert told[0].endswith("; restart 1 of 3 in 1.1 s"), "what the agent had started may need its grace to end"


def test_continue_leaves_a_worker_behind(tmp_path: Path) -> None:
    story = """
if worker == "1": die()
until(lambda: exists("1.0.1"))
time.sleep(0.2)
"""
    outcome, told = play(tmp_path, story, policy=Policy("continue"))
    assert outcome == Outcome(0, events=("worker 1 was lost",))
    assert told == ["worker 1 on localhost: rank 1 was killed by SIGKILL; the others go on"]


def test_stop_ends_the_run(tmp_path: Path) -> None:
    outcome, told = play(tmp_path, 'die() if worker == "1" else until(lambda: False)', policy=Policy("stop"))
    assert (outcome.exit_code, outcome.events, told) == (137, (), [])
    assert str(outcome.failure).startswith("rank 1 on localhost was killed by SIGKILL")


def test_a_worker_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    story = """
if worker == "1": die()
until(lambda: exists("1.0.3"))
time.sleep(0.5)
"""
    outcome, told = play(tmp_path, story, policy=Policy("restart", max_restarts=2, backoff_s=0.05))
    assert outcome == Outcome(0, events=("worker 1 was restarted 2 times", "worker 1 was lost"))
    assert told[-1].endswith("SIGKILL; no more than 2 restarts are made within 60 min; the others go on")
    assert len(lives(tmp_path, 1)) == 3


def test_the_run_fails_with_its_first_failure_when_nobody_is_left(tmp_path: Path) -> None:
    story = """
print(f"words of life {life}", file=sys.stderr)
until(lambda: exists("0.0.1") and exists("1.0.1"))
die() if worker == "1" else os.kill(os.getpid(), signal.SIGABRT)
"""
    outcome, told = play(tmp_path, story, policy=Policy("restart", max_restarts=1, backoff_s=0.05))
    assert told[-1] == "no worker is left"
    assert outcome.failure is not None
    assert outcome.failure.last_lines == ("words of life 1",)
    assert outcome.exit_code in (134, 137)
    assert [len(lives(tmp_path, worker)) for worker in (0, 1)] == [2, 2]


def test_a_script_that_fails_on_every_worker_is_not_tried_again(tmp_path: Path) -> None:
    slow = Policy("restart", backoff_s=60.0)
    outcome, told = play(tmp_path, 'raise SystemExit("no such file")', policy=slow)
    assert outcome.exit_code == 1
    assert outcome.failure is not None
    assert outcome.failure.last_lines == ("no such file",)
    assert told[-1] == "every worker failed by itself at once, which no restart would cure"


SERVER = """
import os, signal, sys, time
from pathlib import Path
def until(condition):
    while not condition(): time.sleep(0.005)
folder, kept = Path(os.environ["FOLDER"]), Path(os.environ.get("KEPT", os.environ["FOLDER"]))
again = sys.argv[1:]
print("SERVER=tcp://here:" + (again[0].rpartition(":")[2] if again else "4711"), flush=True)
if not again:
    (kept / "checkpoint").write_text("half")
    until((folder / "0.0.1").exists)
    os.kill(os.getpid(), signal.SIGKILL)
(folder / "server.again").write_text(" ".join(again))
(kept / "checkpoint").write_text((kept / "checkpoint").read_text() + " and half")
"""


KEPT = Returns("KEPT", ("checkpoint", "asked"))


def server(**options: object) -> Service:
    command = [sys.executable, "-c", SERVER]
    again = [*command, "--bind", ANNOUNCED, "--resume"]
    return Service("server", command, announces="SERVER", again=again, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("on_failure", ["restart", "continue"])
def test_a_killed_server_goes_on_at_the_same_place_with_its_files(tmp_path: Path, on_failure: str) -> None:
    story = 'until(lambda: exists("server.again"))\nprint(os.environ["SERVER"])'
    policy = Policy(on_failure, backoff_s=0.05)  # type: ignore[arg-type]
    outcome, told = play(tmp_path, story, services=[server(returns=KEPT)], policy=policy)
    assert outcome == Outcome(0, events=("server was restarted once",))
    assert told == [
        "server on localhost: server was killed by SIGKILL; restart 1 of 3 in 0.05 s",
        "server on localhost: started again",
    ]
    assert (tmp_path / "server.again").read_text() == "--bind tcp://here:4711 --resume"
    assert (tmp_path / "checkpoint").read_text() == "half and half"
    assert (tmp_path / "logs/localhost/rank.0/stdout").read_text() == "tcp://here:4711\n"
    assert [len(lives(tmp_path, worker)) for worker in (0, 1)] == [1, 1]


def test_the_failure_that_ends_a_run_is_told_and_not_one_that_was_survived(tmp_path: Path) -> None:
    """A server is killed, comes back, and then cannot go on."""
    code = "import sys\n" + SERVER.replace('(folder / "server.again")', 'sys.exit(2)\n(folder / "server.again")')
    command = [sys.executable, "-c", code]
    service = Service("server", command, announces="SERVER", again=[*command, "--bind", ANNOUNCED])
    outcome, _ = play(tmp_path, "until(lambda: False)", services=[service])
    assert str(outcome.failure).startswith("server on localhost ended with exit code 2")
    assert outcome.exit_code == 2


@pytest.mark.parametrize(("host", "label"), [("localhost", "both on localhost"), ("127.0.0.1", "both")])
def test_services_of_one_group_start_again_together_with_their_files(tmp_path: Path, host: str, label: str) -> None:
    """One is killed. The other ends well when it is asked to, and then finds its files again, even with its own agent.

    On one machine they have one folder.
    """
    other = """
import os, signal, sys
folder, kept = os.environ["FOLDER"], os.environ["KEPT"]
def end(*_):
    open(kept + "/asked", "w"); os._exit(0)
signal.signal(signal.SIGTERM, end)
print("OTHER=" + (sys.argv[1] if len(sys.argv) > 1 else "there"), flush=True)
if len(sys.argv) == 1: signal.pause()
open(folder + "/other.again", "w").write(" ".join(os.listdir(kept)))
"""
    command = [sys.executable, "-c", other]
    again, [there] = [*command, ANNOUNCED], parse_hosts(host)
    services = [
        server(returns=KEPT, group="both"),
        Service("other", command, announces="OTHER", again=again, returns=KEPT, group="both", host=there),
    ]
    story = 'until(lambda: exists("server.again") and exists("other.again"))\nprint(os.environ["OTHER"])'
    outcome, told = play(tmp_path, story, services=services)
    assert outcome == Outcome(0, events=("both was restarted once",))
    assert told[0] == f"{label}: server was killed by SIGKILL; restart 1 of 3 in 0.05 s"
    assert (tmp_path / "checkpoint").read_text() == "half and half"
    assert (tmp_path / "asked").exists()
    found = {"asked", "checkpoint"} if host == "localhost" else {"asked"}
    assert set((tmp_path / "other.again").read_text().split()) >= found
    assert (tmp_path / "logs/localhost/rank.0/stdout").read_text() == "there\n"
    assert [len(lives(tmp_path, worker)) for worker in (0, 1)] == [1, 1]


def test_a_server_that_is_killed_again_and_again_ends_the_run(tmp_path: Path) -> None:
    code = """
import os, time
print("SERVER=x", flush=True)
at = lambda name: os.path.join(os.environ["FOLDER"], name)
life = 1
while os.path.exists(at(f"server.{life}")): life += 1
open(at(f"server.{life}"), "w")
while not os.path.exists(at("0.0.1") if life == 1 else at(f"told.{life}")): time.sleep(0.005)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", code]
    service = Service("server", command, announces="SERVER", again=command)
    told: list[str] = []

    def tell(sentence: str) -> None:
        told.append(sentence)
        starts = sum(each.endswith("started again") for each in told)
        (tmp_path / f"told.{starts + 1}").touch()

    outcome, _ = play(tmp_path, "until(lambda: False)", services=[service], tell=tell)
    assert outcome.exit_code == 137
    assert str(outcome.failure).startswith("server on localhost was killed by SIGKILL")
    assert len([sentence for sentence in told if sentence.endswith("started again")]) == 3
    assert told[-1].endswith("; no more than 3 restarts are made within 60 min; the run ends")


def test_nobody_is_given_up_before_training_began(tmp_path: Path) -> None:
    """The server would wait for the lost worker, and the others with it."""
    code = 'import time; print("SERVER=x", flush=True); time.sleep(60)'
    service = Service("server", [sys.executable, "-c", code], announces="SERVER", begins="TRAINS")
    story = 'die() if worker == "1" else until(lambda: False)'
    outcome, told = play(tmp_path, story, services=[service], policy=Policy("continue"))
    assert (outcome.exit_code, told[-1]) == (137, "training had not begun, and waits for all workers")


def test_who_comes_back_too_late_is_ended_without_blame(tmp_path: Path) -> None:
    story = """
if worker == "0": until(lambda: exists("1.0.2")); sys.exit(0)
if life == 1: die()
until(lambda: False)
"""
    code = """
import os, time
print("SERVER=x", flush=True)
while not os.path.exists(os.environ["FOLDER"] + "/1.0.2"): time.sleep(0.005)
"""
    service = Service("server", [sys.executable, "-c", code], announces="SERVER")
    outcome, told = play(tmp_path, story, services=[service], timeouts=Timeouts(grace_s=1.0, overtime_s=0.5))
    assert outcome == Outcome(0, events=("worker 1 was restarted once", "worker 1 did not end by itself"))
    late = "rank 1 did not end within 0.5 s of the end of the run, and what is left of it is ended"
    assert told[-1] == f"worker 1 on localhost: {late}"


def refusing(tries: int) -> Callable[[Host], Sequence[str]]:
    """Return an agent command that works once, then fails ``tries`` times, and then works again."""
    calls = 0

    def agent_command(host: Host) -> Sequence[str]:
        nonlocal calls
        calls += 1
        refused = ["sh", "-c", "echo connect to host localhost port 22: Connection refused >&2; exit 255"]
        return refused if 1 < calls <= 1 + tries else local_agent_command(host)

    return agent_command


def test_a_machine_that_refuses_is_tried_again(tmp_path: Path) -> None:
    options = {"hosts": "localhost:1", "workers_per_host": 1, "agent_command": refusing(2)}
    outcome, told = play(tmp_path, "if life == 1: die()", **options)  # type: ignore[arg-type]
    assert outcome == Outcome(0, events=("worker 0 was restarted once",)), told
    assert [line.rpartition("; ")[2] for line in told[1:3]] == ["next try in 0.1 s", "next try in 0.2 s"]
    assert "Connection refused" in told[1]


def test_a_machine_that_refuses_for_too_long_is_given_up(tmp_path: Path) -> None:
    policy = Policy("restart", backoff_s=0.05, unreachable_s=0.3)
    options = {"hosts": "localhost:1", "workers_per_host": 1, "agent_command": refusing(1000)}
    outcome, told = play(tmp_path, "die()", policy=policy, **options)  # type: ignore[arg-type]
    assert outcome.exit_code == 137, "the first failure is what is told in the end"
    assert "; it was out of reach for 0.3 s; the others go on" in told[-2]
    assert told[-1] == "no worker is left"


@pytest.mark.parametrize("phase", ["waiting", "starting"])
def test_ctrl_c_during_a_restart(tmp_path: Path, phase: str) -> None:
    """Whatever a worker is doing at that moment, the whole run ends."""
    policy = Policy("restart", backoff_s=0.05 if phase == "starting" else 600.0)
    answers = 0

    def agent_command(host: Host) -> Sequence[str]:
        nonlocal answers
        answers += 1
        return local_agent_command(host) if answers <= 2 else ["sleep", "1000"]

    interrupt = (
        f"os.kill({os.getpid()}, signal.SIGINT)"
        if phase == "waiting"
        else f"time.sleep(0.5); os.kill({os.getpid()}, signal.SIGINT)"
    )
    story = f"""
if worker == "1": die()
until(lambda: exists("1.0.1"))
time.sleep(0.5)
{interrupt}
until(lambda: False)
"""
    began_s = time.monotonic()
    outcome, told = play(tmp_path, story, policy=policy, agent_command=agent_command)
    assert outcome.signum == signal.SIGINT, told
    assert time.monotonic() - began_s < 60
    [pid] = [int(path.read_text().split()[1]) for path in tmp_path.glob("0.0.1")]
    assert not Path(f"/proc/{pid}").exists()


def test_one_world_over_all_cannot_lose_a_part(tmp_path: Path) -> None:
    outcome, _ = play(tmp_path, 'die() if rank == "1" else until(lambda: False)', one_world=True, policy=Policy("stop"))
    assert outcome.exit_code == 137
