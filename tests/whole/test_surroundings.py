"""The environment, the account or the locale is missing, empty or odd: danaz does without it, or says what is wrong."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from danaz.horovod_install.cache import cache_folder
from danaz.horovod_install.errors import HorovodError
from danaz.launch.reach import Reach, ReachError
from danaz.protocol.keys import take_worker_keys
from danaz.run.settings import RankInfo, Settings, from_environment
from launcher.agent import hello
from launcher.hosts import Host, HostsError
from launcher.machine import source_address
from launcher.slurm import expand_nodes, hosts_of_allocation, is_in_allocation
from launcher.ssh import Ssh

ROOT = Path(__file__).parents[2]
DANAZ = Path(sys.executable).with_name("danaz")
JOB = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-2]"}


def danaz(*words: str, folder: Path = ROOT, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run the command with nothing but this environment."""
    ended = subprocess.run([DANAZ, *words], cwd=folder, env=env or {}, capture_output=True, check=False)
    return ended.returncode, (ended.stdout + ended.stderr).decode()


@pytest.mark.parametrize(
    ("env", "slots"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "2(x2)"}, [2, 2]),
        ({"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}, [2, 2]),
        ({"SLURM_NTASKS_PER_NODE": "3"}, [3, 3]),
        ({"SLURM_NTASKS": "", "SLURM_TASKS_PER_NODE": ""}, [None, None]),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n1"}, [4]),
        ({}, [None, None]),
    ],
)
def test_what_a_slurm_job_says_of_its_tasks(env: dict[str, str], slots: list[int | None]) -> None:
    assert [host.slots for host in hosts_of_allocation({**JOB, **env})] == slots


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"SLURM_JOB_ID": "7"}, "SLURM_JOB_ID=7 says that this is a job of Slurm's, but SLURM_JOB_NODELIST"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": ""}, "is not set; name them by --hosts, or say --launcher local"),
        ({**JOB, "SLURM_NTASKS": "4"}, "SLURM_NTASKS=4 is set, but not SLURM_TASKS_PER_NODE"),
        ({**JOB, "SLURM_NTASKS": "x", "SLURM_TASKS_PER_NODE": "x"}, "tasks per node are 'x'; expected such as 4(x2),3"),
        ({**JOB, "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "4"}, "names 2 machines, SLURM_TASKS_PER_NODE 1"),
        ({**JOB, "SLURM_JOB_NODELIST": "../n1"}, "'../n1' is not a list of Slurm's nodes"),
        ({**JOB, "SLURM_JOB_NODELIST": "-n"}, "'-n' is not a list of Slurm's nodes"),
        ({**JOB, "SLURM_JOB_NODELIST": "n[0-99999]m[0-99999]"}, "names more than 65536 machines"),
        ({**JOB, "SLURM_JOB_NODELIST": "n" + "[1]" * 5000}, "a name holds too many brackets"),
    ],
)
def test_a_slurm_job_that_cannot_be_read(env: dict[str, str], message: str) -> None:
    with pytest.raises(HostsError) as error:
        hosts_of_allocation(env)
    assert message in str(error.value)


def test_no_slurm_job() -> None:
    assert not is_in_allocation({})
    assert not is_in_allocation({"SLURM_JOB_ID": ""})
    assert len(expand_nodes("n[0-9999]")) == 10_000


def test_an_account_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """USER and LOGNAME do not count, because ssh ignores them too."""
    monkeypatch.setenv("LOGNAME", "somebody")
    me = pwd.getpwuid(os.getuid()).pw_name
    assert Ssh().reaches_directly(Host("localhost", user=me))
    assert not Ssh().reaches_directly(Host("localhost", user="somebody"))

    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert Ssh().reaches_directly(Host("localhost"))
    assert not Ssh().reaches_directly(Host("localhost", user=me))
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(HorovodError, match="there is no home directory for the cache of wheels; set XDG_CACHE_HOME"):
        cache_folder()


@pytest.mark.parametrize("connection", ["", " ", "1.2.3.4", "UNKNOWN 65535 UNKNOWN 65535", "a b c d e f"])
def test_an_odd_connection(monkeypatch: pytest.MonkeyPatch, connection: str) -> None:
    monkeypatch.setenv("SSH_CONNECTION", connection)
    assert hello()["is"] == "hello"


@pytest.mark.parametrize("name", ["a" * 64, "a..b", "no.such.host.invalid", "fe80::1%nowhere"])
def test_there_is_no_way_to_what_is_no_name(name: str) -> None:
    assert source_address(name) is None


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"DANAZ_WORKER": "one"}, "DANAZ_WORKER is 'one', expected a number: `danaz launch` sets it"),
        ({"DANAZ_INCARNATION": "-1"}, "DANAZ_INCARNATION is '-1', expected a number"),
        ({"DANAZ_SETTINGS": "{"}, "DANAZ_SETTINGS is '{', expected JSON"),
        ({"DANAZ_SETTINGS": "[1]"}, r"DANAZ_SETTINGS is '\[1\]', expected JSON"),
        ({"DANAZ_SETTINGS": '{"server_shards": 2}', "DANAZ_SERVER": "tcp://a:1"}, "DANAZ_SERVER_1 is not set"),
        ({"DANAZ_SECRET_FD": "x"}, "DANAZ_SECRET_FD is 'x', where no keys can be read"),
        ({"DANAZ_SECRET_FD": "987654"}, "DANAZ_SECRET_FD is '987654', where no keys can be read"),
    ],
)
def test_variables_of_the_launcher_that_it_did_not_set(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_environment(dict(env))


def test_empty_variables_are_none() -> None:
    names = ("DANAZ_SETTINGS", "DANAZ_WORKER", "DANAZ_INCARNATION", "DANAZ_SERVER", "DANAZ_RUN")
    assert from_environment(dict.fromkeys(names, "")) == (Settings(), RankInfo())
    assert take_worker_keys({}) is None


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    with pytest.raises(ReachError, match=r"No usable temporary directory found in .*; name a folder that you may"):
        Reach().survey([Host("localhost")], Host("localhost"))


def test_a_working_directory_that_was_deleted(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"rmdir {gone}; exec {DANAZ} launch --dry-run -- true"
    ended = subprocess.run(["sh", "-c", script], cwd=gone, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        1,
        "danaz: the working directory no longer exists; change into another one\n",
    )


ENVIRONMENTS = {
    "empty": {},
    "ascii": {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "odd": {"TERM": "no such terminal", "COLUMNS": "wide", "LINES": "", "LANG": "xx_XX.nothing", "PATH": ""},
}


@pytest.mark.timeout(300)  # on a busy machine, torch takes long to import
def test_the_doctor_in_an_odd_environment() -> None:
    """All doctors are asked at once, because each imports torch."""
    chdir = ("--chdir", "/no/folder")
    with ThreadPoolExecutor() as threads:
        asked = {
            (name, more): threads.submit(danaz, "doctor", "--hosts", "localhost", *more, env=env)
            for name, env in ENVIRONMENTS.items()
            for more in ((), chdir)
            if (name, more) != ("empty", chdir)
        }
    for (name, more), answer in asked.items():
        code, said = answer.result()
        assert (code, "Traceback" in said) == (1 if more else 0, False), f"{name}: {said}"
        if more:
            assert "localhost: cannot start: [Errno 2] No such file or directory: '/no/folder'" in said, name


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="hiding /etc/passwd needs root")
def test_training_without_an_account_or_an_environment(tmp_path: Path) -> None:
    run = f"{DANAZ} launch configs/quadratic.yaml --set epochs=1 --hosts localhost:1 --out {tmp_path / 'run'}"
    script = f"mount --bind /dev/null /etc/passwd && exec env -i OMP_NUM_THREADS=1 {run}"
    ended = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_config_in_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text("# η\n" + (ROOT / "configs/quadratic.yaml").read_text(), encoding="utf-8")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, said = danaz("launch", "digits.yaml", "--dry-run", folder=tmp_path, env=env)
    assert code == 0, said


HOMES = [("~/x", "~/x"), ("sub", str(ROOT / "sub")), ("/there", "/there"), (None, str(ROOT))]


@pytest.mark.parametrize(("given", "meant"), HOMES)
def test_a_working_directory_of_the_ranks(monkeypatch: pytest.MonkeyPatch, given: str | None, meant: str) -> None:
    from danaz.launch.options import LaunchOptions

    monkeypatch.chdir(ROOT)
    assert LaunchOptions(chdir=given).working_directory == meant


@pytest.mark.slow
def test_the_home_directory_of_each_machine(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    words = ["launch", "-a", "ssgd", "--chdir", "~/x", "--out", str(tmp_path / "run"), "--", "sh", "-c", "pwd"]
    code, said = danaz(*words, env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]})
    assert f"{tmp_path}/x\n" in said, (code, said)
