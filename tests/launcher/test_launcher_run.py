"""Real processes, started by a launcher in this process: what they see and leave, and what is said when one fails."""

from __future__ import annotations

import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher import life as life_module
from launcher.channel import wait_ready
from launcher.hosts import Host, parse_hosts
from launcher.logs import Logs, Terminal, quiet
from launcher.plan import PYTHON, Returns, Service, Workers, plan
from launcher.run import Outcome, Timeouts, run
from launcher.transport import AgentLink, local_agent_command


def play(
    folder: Path,
    command: Sequence[str],
    *,
    hosts: str = "localhost:2",
    one_world: bool = True,
    services: Sequence[Service] = (),
    cwd: str = "/",
    **options: object,
) -> Outcome:
    workers = Workers(command, one_world=one_world)
    laid = plan(parse_hosts(hosts), workers, services, env=dict(os.environ), cwd=cwd)
    arguments: dict[str, object] = {"echo": quiet, "timeouts": Timeouts(grace_s=1.0), **options}
    return run(laid, folder, **arguments)  # type: ignore[arg-type]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def written(folder: Path, name: str, stream: str = "stdout", host: str = "localhost") -> str:
    return (folder / "logs" / host / name / stream).read_text()


def test_all_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = play(tmp_path, ["sh", "-c", "echo rank $RANK of $WORLD_SIZE in $PWD"], cwd=str(tmp_path), echo=Terminal())
    assert outcome == Outcome(0)
    assert written(tmp_path, "rank.1") == f"rank 1 of 2 in {tmp_path}\n"
    assert f"[localhost:0] rank 0 of 2 in {tmp_path}\n" in capsys.readouterr().out


def test_every_rank_learns_its_ports(tmp_path: Path) -> None:
    names = ["HOROVOD_GLOO_RENDEZVOUS_PORT", "MASTER_PORT", "LAUNCHER_WORKER"]
    code = f"import os; print(*(os.environ[name] for name in {names}))"
    assert play(tmp_path, python(code), hosts="localhost:2,127.0.0.1:1", one_world=False).exit_code == 0
    first, second = written(tmp_path, "rank.0").split(), written(tmp_path, "rank.1").split()
    other = written(tmp_path, "rank.2", host="127.0.0.1").split()
    assert first == second
    assert other[2] == "1"
    assert len({*first[:2], *other[:2]}) == 4


@pytest.mark.parametrize(
    ("command", "exit_code", "reason"),
    [
        (["sh", "-c", "exit 7"], 7, "ended with exit code 7"),
        (["sh", "-c", "kill -KILL $$"], 137, "was killed by SIGKILL"),
        (["/does/not/exist"], 127, "cannot start: [Errno 2] No such file or directory: '/does/not/exist'"),
        (["/etc/passwd"], 126, "cannot start: [Errno 13] Permission denied: '/etc/passwd'"),
    ],
)
def test_exit_codes_are_passed_on(tmp_path: Path, command: list[str], exit_code: int, reason: str) -> None:
    outcome = play(tmp_path, command, hosts="localhost:1")
    assert outcome.exit_code == exit_code
    assert str(outcome.failure).startswith(f"rank 0 on localhost {reason}")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    outcome = play(tmp_path, ["true"], cwd=str(tmp_path / "nowhere"))
    assert outcome.exit_code == 127
    assert f"No such file or directory: '{tmp_path}/nowhere'" in str(outcome.failure)


def test_the_last_lines_of_the_rank_that_failed_are_shown(tmp_path: Path) -> None:
    code = """
import os, sys, time
if os.environ["RANK"] == "1":
    print("not this", file=sys.stdout)
    for n in range(100): print("line", n, file=sys.stderr)
    sys.exit(3)
print("noise", file=sys.stderr)
time.sleep(60)
"""
    outcome = play(tmp_path, python(code))
    assert outcome.failure is not None
    assert (outcome.exit_code, outcome.failure.host, outcome.failure.log_folder) == (
        3,
        "localhost",
        tmp_path / "logs" / "localhost" / "rank.1",
    )
    assert outcome.failure.process is not None
    assert outcome.failure.process.rank == 1
    assert outcome.failure.last_lines == tuple(f"line {n}" for n in range(80, 100))
    assert "the last lines of rank 1 (worker 0) on localhost:\n  | line 80\n" in str(outcome.failure)
    assert str(outcome.failure).endswith("\n  | line 99")


def test_the_first_to_raise_is_blamed_though_it_ends_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life_module, "SETTLE_S", 30.0)
    code = """
import os, sys, time
raised, pid = os.environ["FOLDER"] + "/raised", os.environ["FOLDER"] + "/pid"
def wait(condition):
    while not condition(): time.sleep(0.005)
def gone():
    try: os.kill(int(open(pid).read()), 0)
    except ProcessLookupError: return True
if os.environ["RANK"] == "0":
    with open(pid + ".new", "w") as file: file.write(str(os.getpid()))
    os.rename(pid + ".new", pid)
    wait(lambda: os.path.exists(raised))
    raise SystemExit("pulled along")
wait(lambda: os.path.exists(pid))
try:
    raise ValueError("the cause")
except ValueError:
    import traceback; traceback.print_exc(); sys.stderr.flush()
    open(raised, "w").close()
wait(gone)
sys.exit(9)
"""
    monkeypatch.setenv("FOLDER", str(tmp_path))
    outcome = play(tmp_path, python(code))
    assert outcome.exit_code == 9
    assert "rank 1 on localhost ended with exit code 9" in str(outcome.failure)
    assert "ValueError: the cause" in str(outcome.failure)


def test_the_whole_tree_of_a_rank_is_asked_to_end_when_another_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
import os, signal, sys, time
os.chdir(os.environ["FOLDER"])
def end(*_): open(f"asked.{name}", "w").close(); os._exit(0)
signal.signal(signal.SIGTERM, end)
if os.environ["RANK"] == "0":
    name = "rank" if os.fork() else "child" if os.fork() else "grandchild"
    open(f"ready.{name}", "w").close()
    while True: signal.pause()
while not all(os.path.exists(f"ready.{name}") for name in ("rank", "child", "grandchild")): time.sleep(0.005)
os.kill(os.getpid(), signal.SIGSEGV)
"""
    monkeypatch.setenv("FOLDER", str(tmp_path))
    outcome = play(tmp_path, python(code))
    assert outcome.exit_code == 139
    assert {file.suffix for file in tmp_path.glob("asked.*")} == {".rank", ".child", ".grandchild"}


ANNOUNCE = "print('OTHER=x'); print('SERVER=tcp://127.0.0.1:5555'); "


def test_a_service_announces_itself_and_may_finish_writing(tmp_path: Path) -> None:
    done = tmp_path / "done"
    code = f"""
import os, time
while not os.path.exists({str(done)!r}): time.sleep(0.005)
print("written")
"""
    server = Service("server", python(ANNOUNCE + code), announces="SERVER")
    rank = ["sh", "-c", f"echo $SERVER $OTHER; [ $RANK = 1 ] || touch {done}"]
    assert play(tmp_path, rank, services=[server]) == Outcome(0)
    assert written(tmp_path, "rank.1") == "tcp://127.0.0.1:5555\n"
    assert written(tmp_path, "server") == "OTHER=x\nSERVER=tcp://127.0.0.1:5555\nwritten\n"


def test_a_service_that_does_not_end_is_stopped_without_blame(tmp_path: Path) -> None:
    server = Service("server", python(ANNOUNCE + "import time; time.sleep(60)"), announces="SERVER")
    assert play(tmp_path, ["true"], services=[server], timeouts=Timeouts(grace_s=1.0, finish_s=0.1)) == Outcome(0)


def test_a_service_may_end_before_the_ranks(tmp_path: Path) -> None:
    server = Service("server", python(ANNOUNCE), announces="SERVER")
    assert play(tmp_path, ["sleep", "0.3"], services=[server]) == Outcome(0)


@pytest.mark.parametrize(
    ("code", "exit_code", "message"),
    [
        (
            "import time; print('hello'); time.sleep(60)",
            1,
            "server on localhost did not print SERVER=… within 4 s",
        ),
        ("raise SystemExit('port in use')", 1, "server on localhost ended with exit code 1"),
        ("print('hello')", 1, "server on localhost ended before it announced itself\nits whole output is in "),
        (ANNOUNCE + "import os; os._exit(5)", 5, "server on localhost ended with exit code 5"),
    ],
)
def test_a_service_that_fails_ends_the_run(tmp_path: Path, code: str, exit_code: int, message: str) -> None:
    server = Service("server", python(code), announces="SERVER")
    outcome = play(tmp_path, ["sleep", "60"], services=[server], timeouts=Timeouts(grace_s=1.0, start_s=4.0))
    assert outcome.exit_code == exit_code
    assert str(outcome.failure).startswith(message)
    if "hello" in code:
        assert str(outcome.failure).endswith("\nthe last lines of server on localhost:\n  | hello")


def test_the_error_of_a_script_is_what_one_sees_last(tmp_path: Path) -> None:
    """Its neighbours' tracebacks and its own end of a long one are not."""
    code = """
import os, sys, time
def deep(n):
    if n: deep(n - 1) if n % 2 else deep(n - 1)
    else: raise ValueError("wrong\\nand more")
if os.environ["RANK"] == "1":
    deep(12)
time.sleep(0.3)
raise RuntimeError("connection closed by peer")
"""
    outcome = play(tmp_path, python(code))
    assert outcome.failure is not None
    *_, before, last = str(outcome.failure).splitlines()
    assert (before, last) == ("  | ValueError: wrong", "  | and more")
    assert outcome.failure.last_lines[0] == "Traceback (most recent call last):"
    assert "the last lines of rank 1 (worker 0) on localhost:\n  | Traceback" in str(outcome.failure)
    assert outcome.failure.sentence == "rank 1 ended with exit code 1 (ValueError: wrong)"


def test_a_flood_of_any_bytes_is_kept_whole(tmp_path: Path) -> None:
    size_bytes = 3_000_000
    code = f"import random, sys; sys.stdout.buffer.write(random.Random(int(sys.argv[1])).randbytes({size_bytes}))"
    assert play(tmp_path, ["sh", "-c", 'exec "$0" -c "$1" $RANK', sys.executable, code]) == Outcome(0)
    for rank in range(2):
        content = (tmp_path / "logs" / "localhost" / f"rank.{rank}" / "stdout").read_bytes()
        assert content == random.Random(rank).randbytes(size_bytes)


def test_a_machine_that_cannot_be_reached(tmp_path: Path) -> None:
    outcome = play(tmp_path, ["true"], hosts="elsewhere.example:1")
    assert outcome.exit_code == 1
    assert "elsewhere.example is not this machine, the only one that can be used" in str(outcome.failure)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo Permission denied >&2; exit 255", "ended although nobody asked it to\nits last lines:\n  | Permission"),
        ("echo Welcome", "ended although nobody asked it to, but sent something else than an answer: Welcome"),
        ("echo Welcome; exec sleep 60", "did not answer within 1 s, but sent something else than an answer: Welcome"),
        ("exec yes Welcome", "sent something else than an answer: Welcome"),
        ("exec cat /dev/zero", "sent something else than an answer: "),
        ("exec sleep 60", "did not answer within 1 s"),
    ],
)
def test_an_agent_that_does_not_come_up(tmp_path: Path, script: str, message: str) -> None:
    outcome = play(
        tmp_path, ["true"], agent_command=lambda host: ["sh", "-c", script], timeouts=Timeouts(grace_s=1.0, start_s=1.0)
    )
    assert outcome.exit_code == 1
    assert str(outcome.failure).startswith(f"the agent on localhost {message}")


def test_what_a_login_prints_before_the_agent_answers(tmp_path: Path) -> None:
    agent = shlex.join(local_agent_command(Host("localhost")))
    script = f"""echo Welcome; echo '{{"is": "a greeting"}}'; echo 1; printf 'no end of line'; exec {agent}"""
    assert play(tmp_path, ["true"], agent_command=lambda host: ["sh", "-c", script]) == Outcome(0)


def test_a_rank_gets_its_machines_environment_and_over_it_what_travels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"THERE": "1", "BOTH": "1", "OMP_NUM_THREADS": "7"}.items():
        monkeypatch.setenv(name, value)
    command = ["sh", "-c", "echo $THERE $BOTH $OMP_NUM_THREADS $PYTHONUNBUFFERED; command -v python3"]
    laid = plan(parse_hosts("localhost:1"), Workers(command), env={"BOTH": "2"}, cwd="/")
    assert run(laid, tmp_path, echo=quiet) == Outcome(0)
    # `python` is the one that runs the launcher.
    assert written(tmp_path, "rank.0") == f"1 2 7 1\n{Path(sys.executable).parent}/python3\n"


def test_python_is_that_of_the_agent(tmp_path: Path) -> None:
    command = [PYTHON, "-c", "import sys; print(sys.executable)"]
    assert play(tmp_path, command, hosts="localhost:1") == Outcome(0)
    assert written(tmp_path, "rank.0") == f"{sys.executable}\n"


RETURNS = Returns("FOLDER", ("empty", "large", "last", "ready"))
RETURNING = """
import os, pathlib
folder = pathlib.Path(os.environ["FOLDER"])
(folder / "empty").touch()
(folder / ".lock").touch()
(folder / "not owed").touch()
(folder / "large").write_bytes(bytes(range(256)) * 20_000)
print(folder)
"""


def test_what_a_process_returns_is_in_the_run_folder(tmp_path: Path) -> None:
    service = Service("server", python(ANNOUNCE + RETURNING), announces="SERVER", returns=RETURNS)
    assert play(tmp_path, ["true"], services=[service]) == Outcome(0)
    assert (tmp_path / "empty").read_bytes() == b""
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "large", "logs"}
    assert (tmp_path / "large").read_bytes() == bytes(range(256)) * 20_000
    folder = Path(written(tmp_path, "server").splitlines()[-1])
    assert folder.name.startswith("launcher-")
    assert not folder.exists()


def test_a_folder_that_services_share_is_returned_when_the_last_of_them_has_ended(tmp_path: Path) -> None:
    last = """
import os, time
while not os.path.exists(os.environ["FOLDER"] + "/ready"): time.sleep(0.005)
print("OTHER=x", flush=True)
while os.path.exists(os.environ["FOLDER"] + "/ready"): time.sleep(0.005)
open(os.environ["FOLDER"] + "/last", "w").write("words")
"""
    first = """
import os
open(os.environ["FOLDER"] + "/ready", "w")
print("SERVER=" + os.environ["FOLDER"], flush=True)
"""
    services = [
        Service("first", python(first), announces="SERVER", returns=RETURNS, group="both"),
        Service("last", python(last), announces="OTHER", returns=RETURNS, group="both"),
    ]
    story = 'import os; os.remove(os.environ["SERVER"] + "/ready")'
    assert play(tmp_path, python(story), services=services, hosts="localhost:1") == Outcome(0)
    assert (tmp_path / "last").read_text() == "words"


def test_what_cannot_be_kept_here_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder has the name of one of the files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    run_folder = tmp_path / "run"
    (run_folder / "large" / "in the way").mkdir(parents=True)
    told: list[str] = []
    service = Service("server", python(ANNOUNCE + RETURNING), announces="SERVER", returns=RETURNS)
    outcome = play(run_folder, ["true"], services=[service], tell=told.append)
    assert outcome.exit_code == 1
    assert str(outcome.failure) == f"{run_folder} lacks what could not be kept: large"
    [there] = (tmp_path / "tmp").glob("launcher-*-server")
    assert (there / "large").read_bytes() == bytes(range(256)) * 20_000
    assert told == [
        f"the returned file large cannot be kept in {run_folder}: Is a directory",
        f"what could not be kept is still in {there.name}, among localhost's temporary files",
    ]
    assert (run_folder / "empty").exists()


def test_a_file_is_returned_by_a_process_that_is_asked_to_end(tmp_path: Path) -> None:
    code = """
import os, signal, sys
def end(*_):
    open(os.environ["FOLDER"] + "/last", "w").write("words"); os._exit(0)
signal.signal(signal.SIGTERM, end)
print("SERVER=x", flush=True)
signal.pause()
"""
    service = Service("server", python(code), announces="SERVER", returns=RETURNS)
    assert play(tmp_path, ["false"], services=[service]).exit_code == 1
    assert (tmp_path / "last").read_text() == "words"


@pytest.mark.parametrize("name", ["../x", "/x", "", ".", "..", ".hidden", "a/b/c", "a/..", "a/.hidden", "a/"])
def test_no_returned_file_leads_out_of_the_run_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="a process returned a file of the name"):
        Logs(tmp_path, quiet).keep_file(name, b"x", last=True)
    assert list(tmp_path.rglob("*")) == []


def test_an_agent_that_hears_nothing_ends_its_tree(tmp_path: Path) -> None:
    greeting = {"do": "hello", "grace_s": 1.0, "silence_s": 0.5}
    link = AgentLink(Host("localhost"), local_agent_command(Host("localhost")), greeting)
    link.open(time.monotonic())
    said: list[dict[str, object]] = []

    def hear(kind: str) -> dict[str, object]:
        deadline = time.monotonic() + 20
        while not (found := [message for message in said if message["is"] == kind]):
            assert time.monotonic() < deadline
            wait_ready([link.channel.read_fd], [], 1.0)
            said.extend(link.channel.receive())
        return found[0]

    start = {"do": "start", "name": "rank.0", "argv": ["sleep", "60"], "cwd": "/", "env": {}, "defaults": {}}
    start |= {"milestones": False, "files": []}
    link.channel.send({**start, "returns": None, "folder": "", "secret": None})
    pid = hear("started")["pid"]
    assert hear("stopping")["why"] == "nothing was heard of the launcher for 0.5 s"
    assert link.close(20) == 0
    assert not Path(f"/proc/{pid}").exists()


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(NotADirectoryError):
        play(tmp_path, ["true"])


def test_signal_handlers_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    play(tmp_path, ["true"], hosts="localhost:1")
    assert signal.getsignal(signal.SIGINT) is before


def test_only_the_main_thread_can_run(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="main thread"):
        pool.submit(play, tmp_path, ["true"]).result()
