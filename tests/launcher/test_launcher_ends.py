"""Ranks that leave too early with exit code 0, and processes that hang after the end of a run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.hosts import parse_hosts
from launcher.logs import quiet
from launcher.plan import Service, Workers, plan
from launcher.run import Outcome, Timeouts, run
from launcher.supervisor import Policy

# Every rank begins with these lines. A milestone is a line in the file that the agent names.
RANK = """
import os, signal, sys, time
worker, rank = os.environ["LAUNCHER_WORKER"], os.environ["RANK"]
def at(name): return os.path.join(os.environ["FOLDER"], name)
def until(condition):
    while not condition(): time.sleep(0.005)
def exists(name): return os.path.exists(at(name))
def touch(name): open(at(name), "w").close()
def reach(*words):
    for word in words: open(os.environ["LAUNCHER_MILESTONES"], "a").write(word + "\\n")
def hang(): os.kill(os.getpid(), signal.SIGSTOP)
"""
# A server that ends as soon as the ranks say so.
SERVE = """
import os, time
print("SERVER=x", flush=True)
while not os.path.exists(os.environ["FOLDER"] + "/over"): time.sleep(0.005)
"""
QUICK = Timeouts(grace_s=0.5)
MILESTONES = {"init": "it never began", "finish": "it left early"}


def play(
    folder: Path,
    story: str,
    *,
    hosts: str = "localhost:2",
    workers_per_host: int = 2,
    one_world: bool = False,
    serve: str | None = SERVE,
    policy: Policy | None = None,
    milestones: dict[str, str] = MILESTONES,
    timeouts: Timeouts = QUICK,
    **options: Any,
) -> tuple[Outcome, list[str]]:
    """Return the outcome, and the sentences that the user was told."""
    services: Sequence[Service] = ()
    if serve is not None:
        services = [Service("server", [sys.executable, "-c", serve], announces="SERVER")]
    workers = Workers(
        [sys.executable, "-c", RANK + story], per_host=workers_per_host, one_world=one_world, milestones=milestones
    )
    laid = plan(parse_hosts(hosts), workers, services, env={**os.environ, "FOLDER": str(folder)}, cwd="/")
    told: list[str] = []
    arguments: dict[str, Any] = {"echo": quiet, "tell": told.append, "timeouts": timeouts, **options}
    return run(laid, folder, policy=policy or Policy("restart", backoff_s=0.05), **arguments), told


# ---- who leaves early ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reached", "words"),
    [((), "it never began"), (("init",), "it left early"), (("finish",), "it never began")],
)
@pytest.mark.parametrize("on_failure", ["restart", "continue", "stop"])
def test_a_script_that_reaches_too_little_fails_at_once(
    tmp_path: Path, reached: tuple[str, ...], words: str, on_failure: str
) -> None:
    """The exit code is 1. There is no restart, because the script would do the same again."""
    policy = Policy(on_failure, backoff_s=600.0)  # type: ignore[arg-type]
    outcome, told = play(tmp_path, f"reach(*{reached!r})", policy=policy)
    assert outcome.exit_code == 1
    assert outcome.failure is not None
    assert outcome.failure.reason.endswith(f" on localhost ended with exit code 0, but {words}")
    assert not [sentence for sentence in told if "restart" in sentence and "no restart" not in sentence]


def test_who_reaches_all_ends_well(tmp_path: Path) -> None:
    outcome, _ = play(tmp_path, 'reach("init", "whatever", "finish")\ntouch("over")')
    assert outcome == Outcome(0)


def test_without_milestones_an_exit_code_is_all(tmp_path: Path) -> None:
    outcome, _ = play(tmp_path, 'assert "LAUNCHER_MILESTONES" not in os.environ', milestones={}, serve=None)
    assert outcome == Outcome(0)


def test_the_others_go_on_without_who_left_early_and_the_run_says_so(tmp_path: Path) -> None:
    story = """
reach("init")
if worker == "1": touch("left"); sys.exit(0)
until(lambda: exists("left"))
time.sleep(0.3)
reach("finish")
touch("over")
"""
    outcome, told = play(tmp_path, story)
    assert (outcome.exit_code, outcome.events) == (1, ("worker 1 was lost",))
    assert str(outcome.failure).startswith("rank 1 on localhost ended with exit code 0, but it left early")
    assert told == ["worker 1 on localhost: rank 1 ended with exit code 0, but it left early; the others go on"]


def test_the_last_one_that_leaves_early_ends_the_run(tmp_path: Path) -> None:
    """The server would wait for ever."""
    outcome, told = play(tmp_path, 'reach("init")', hosts="localhost:1", workers_per_host=1)
    assert outcome.exit_code == 1
    assert told[-1] == "every worker failed by itself at once, which no restart would cure"


def test_who_left_in_silence_is_blamed_and_not_who_failed_for_want_of_it(tmp_path: Path) -> None:
    """Horovod holds the rank that exits until the other one has failed."""
    story = """
reach("init")
if rank == "1":
    reach("leave")
    touch("leaves")
    until(lambda: exists("failed"))
    time.sleep(0.2)
    os._exit(0)
until(lambda: exists("leaves"))
try:
    raise RuntimeError("the other rank is gone")
finally:
    touch("failed")
"""
    outcome, _ = play(tmp_path, story, workers_per_host=1, one_world=True, serve=None, policy=Policy("stop"))
    assert outcome.exit_code == 1
    assert str(outcome.failure).startswith("rank 1 on localhost ended with exit code 0, but it left early")


def test_who_raised_is_blamed_and_not_who_left_for_want_of_it(tmp_path: Path) -> None:
    story = """
reach("init")
if rank == "0":
    try:
        raise ValueError("the cause")
    finally:
        import traceback; traceback.print_exc(); sys.stderr.flush()
        touch("failed")
        until(lambda: exists("left"))
until(lambda: exists("failed"))
time.sleep(0.1)
reach("leave")
touch("left")
os._exit(0)
"""
    outcome, _ = play(tmp_path, story, workers_per_host=1, one_world=True, serve=None, policy=Policy("stop"))
    assert "ValueError: the cause" in str(outcome.failure)
    assert str(outcome.failure).startswith("rank 0 on localhost ended with exit code 1")


# ---- who hangs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hanging", [("0",), ("1",), ("0", "1")])
def test_a_run_that_is_over_ends_though_ranks_hang(tmp_path: Path, hanging: tuple[str, ...]) -> None:
    story = f"""
reach("init")
touch("there." + worker)
until(lambda: exists("there.0") and exists("there.1"))
if worker in {hanging!r}: touch("hangs." + worker); hang()
until(lambda: all(exists("hangs." + each) for each in {hanging!r}))
reach("finish")
"""
    serve = f"""
import os, time
print("SERVER=x", flush=True)
there = lambda each: os.path.exists(os.environ["FOLDER"] + "/hangs." + each)
while not all(there(each) for each in {hanging!r}): time.sleep(0.005)
"""
    outcome, told = play(tmp_path, story, serve=serve, timeouts=replace(QUICK, overtime_s=0.3))
    late = "did not end within 0.3 s of the end of the run, and what is left of it is ended"
    assert sorted(told) == [f"worker {each} on localhost: rank {each} {late}" for each in hanging]
    assert outcome == Outcome(0, events=tuple(f"worker {each} did not end by itself" for each in hanging))


def test_a_world_without_a_server_ends_though_ranks_hang(tmp_path: Path) -> None:
    """It is over when the first rank, which writes the results, has ended well."""
    story = """
reach("init")
if rank == "1": touch("hangs"); hang()
until(lambda: exists("hangs"))
reach("finish")
"""
    outcome, told = play(
        tmp_path,
        story,
        workers_per_host=1,
        one_world=True,
        serve=None,
        policy=Policy("stop"),
        timeouts=replace(QUICK, overtime_s=0.3),
    )
    assert outcome == Outcome(0, events=("worker 0 did not end by itself",))
    assert told[0].startswith("worker 0 on localhost: rank 1 did not end within 0.3 s of the end of the run")


def test_nobody_waits_for_a_restart_when_the_run_is_over(tmp_path: Path) -> None:
    story = """
reach("init", "finish")
if worker == "1": os.kill(os.getpid(), signal.SIGKILL)
touch("over")
"""
    outcome, _ = play(tmp_path, story, policy=Policy("restart", backoff_s=600.0, longest_backoff_s=600.0))
    assert outcome == Outcome(0, events=("worker 1 was lost",))


@pytest.mark.parametrize("deaf", ["signal.signal(signal.SIGTERM, signal.SIG_IGN)", "hang()"])
def test_a_service_that_hangs_is_ended_and_told(tmp_path: Path, deaf: str) -> None:
    serve = f"""
import os, signal, time
def hang(): os.kill(os.getpid(), signal.SIGSTOP)
print("SERVER=x", flush=True)
{deaf}
time.sleep(600)
"""
    outcome, told = play(tmp_path, 'reach("init", "finish")', serve=serve, timeouts=replace(QUICK, finish_s=0.3))
    assert outcome == Outcome(0)
    assert told == ["server on localhost did not end by itself after the ranks, and is ended"]


@pytest.mark.parametrize("whom", ["agent", "guardian", "both"])
def test_a_run_that_is_over_ends_though_an_agent_hangs(
    tmp_path: Path, whom: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the run is left on this machine."""
    monkeypatch.setattr("launcher.life.AGENT_END_S", 1.0)
    story = f"""
def parent(pid): return int(open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[1])
reach("init", "finish")
if worker == "1":
    agent = os.getppid()
    with open(at("pids.new"), "w") as file: file.write(f"{{os.getpid()}} {{agent}} {{parent(agent)}}")
    os.rename(at("pids.new"), at("pids"))
    for pid in {{"agent": [agent], "guardian": [parent(agent)], "both": [agent, parent(agent)]}}[{whom!r}]:
        os.kill(pid, signal.SIGSTOP)
    touch("over")
    while True: signal.pause()
"""
    outcome, told = play(tmp_path, story, timeouts=replace(QUICK, overtime_s=0.3))
    assert outcome == Outcome(0, events=("worker 1 did not end by itself",)), told
    for pid in (tmp_path / "pids").read_text().split():
        assert not _is_alive(int(pid)), "something of it is left"


def _is_alive(pid: int) -> bool:
    """Return whether a process is alive. A zombie that init has not reaped is not."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- what is said of a kill ------------------------------------------------------------------------------------------


def test_a_bare_sigkill_comes_with_a_hint(tmp_path: Path) -> None:
    story = "os.kill(os.getpid(), signal.SIGKILL)"
    outcome, _ = play(tmp_path, story, hosts="localhost:1", workers_per_host=1, serve=None, policy=Policy("stop"))
    assert outcome.exit_code == 128 + signal.SIGKILL
    first, second, *_ = str(outcome.failure).splitlines()
    assert first == "rank 0 on localhost was killed by SIGKILL"
    assert "may have run out of memory" in second


def test_a_kill_for_want_of_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel counts such kills. Here the rank itself writes the file with the count."""
    stand_in = tmp_path / "vmstat"
    stand_in.write_text("nr_free_pages 7\noom_kill 3\n")
    (tmp_path / "sitecustomize.py").write_text(
        f"import launcher.processes as processes\nprocesses.VMSTAT = {str(stand_in)!r}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    story = f"""
open({str(stand_in)!r}, "w").write("nr_free_pages 7\\noom_kill 4\\n")
os.kill(os.getpid(), signal.SIGKILL)
"""
    outcome, _ = play(tmp_path, story, hosts="localhost:1", workers_per_host=1, serve=None, policy=Policy("stop"))
    assert str(outcome.failure).startswith("rank 0 on localhost was killed by SIGKILL, out of memory\n")
