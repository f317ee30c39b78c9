"""Runs inside a real Slurm allocation with a controller and two nodes, and the names and numbers that Slurm writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces import Namespaces
from slurm import missing, slurm
from waiting import until

from launcher.hosts import Host, HostsError
from launcher.slurm import Srun, expand_nodes, expand_tasks, hosts_of_allocation
from launcher.transport import local_agent_command

DEADLINE_S = 30.0
TRAINING_S = 200.0


@pytest.fixture(scope="module")
def environment(network: Namespaces, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands find the cluster of machines a and b."""
    reason = missing()
    if reason is not None and os.environ.get("CI") == "true":
        pytest.fail(f"continuous integration must test Slurm, but {reason}")
    if reason is not None:
        pytest.skip(reason)
    with slurm(network, tmp_path_factory.mktemp("slurm")) as env:
        yield {**env, "OMP_NUM_THREADS": "1", "SECRET": "of the launching machine"}


@pytest.fixture
def salloc(network: Namespaces, environment: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    def start(*arguments: str) -> subprocess.Popen[str]:
        job = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2"]
        return network.popen([*job, sys.executable, "-m", "danaz", *arguments], env=environment)

    return start


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_dana_trains_on_the_nodes_of_the_job(
    salloc: Callable[..., subprocess.Popen[str]], network: Namespaces, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = salloc("launch", "configs/digits.yaml", "--set", "epochs=3", "--out", str(folder))
    output, _ = job.communicate(timeout=TRAINING_S)
    assert job.returncode == 0, output
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["workers"], summary["ranks_per_worker"]) == (2, 2)
    assert summary["test_error_percent"] < 10
    assert {path.parent.name for path in folder.glob("logs/*/rank.*")} == {"a", "b"}


def sleeping(network: Namespaces) -> list[int]:
    return [pid for name in ("a", "b") for pid, line in network.processes(name).items() if line == "sleep 1002"]


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(240)
def test_a_killed_srun_ends_the_run_on_all_nodes(
    salloc: Callable[..., subprocess.Popen[str]], network: Namespaces, tmp_path: Path
) -> None:
    script = "env > $DANAZ_WORKER.env; exec sleep 1002"
    where = ["--chdir", str(tmp_path), "--out", str(tmp_path / "run")]
    job = salloc("launch", "-a", "ssgd", *where, "--", "sh", "-c", script)
    until(lambda: len(sleeping(network)) == 4, "four ranks")
    assert "SECRET" not in (tmp_path / "0.env").read_text() + (tmp_path / "1.env").read_text()
    sruns = [pid for pid, line in network.processes("launching").items() if line.startswith("srun ") and "=b " in line]
    for pid in sruns:  # srun forks a child that looks after it
        os.kill(pid, signal.SIGKILL)
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 1
    assert "the agent on b ended although nobody asked it to" in output
    until(lambda: not sleeping(network), "nothing is left")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[01-03,7]", ["n01", "n02", "n03", "n7"]),
        ("a,n[9-11],b-[1]x", ["a", "n9", "n10", "n11", "b-1x"]),
        ("r[1-2]c[08-09]", ["r1c08", "r1c09", "r2c08", "r2c09"]),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


@pytest.mark.parametrize("text", ["", "n[1", "n[1-]", "n[x]", "n[3-1]", "n[1,1]", "n[]", "n[0-999999999]", "a,a"])
def test_what_is_no_list_of_nodes(text: str) -> None:
    with pytest.raises(HostsError, match="is not a list of Slurm's nodes"):
        expand_nodes(text)


def test_numbers_of_tasks() -> None:
    assert expand_tasks("4(x2),3") == [4, 4, 3]
    for wrong in ("", "0", "x2", "2(x0)", "2,", "2(2)"):
        with pytest.raises(HostsError, match=r"expected such as 4\(x2\),3"):
            expand_tasks(wrong)


def test_the_hosts_of_a_job() -> None:
    env = {"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "4(x2),3"}
    assert [host.slots for host in hosts_of_allocation(env)] == [None] * 3, "nobody asked for tasks"
    assert [host.slots for host in hosts_of_allocation({**env, "SLURM_NTASKS": "11"})] == [4, 4, 3]
    with pytest.raises(HostsError, match="names 3 machines, SLURM_TASKS_PER_NODE 1"):
        hosts_of_allocation({**env, "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"})
    with pytest.raises(HostsError, match="needs an allocation"):
        hosts_of_allocation({})


def test_what_srun_is_told() -> None:
    words = list(Srun("/there/python")(Host("n1")))
    assert words[0] == "srun"
    assert words[-4:] == ["--nodelist=n1", "/there/python", "-m", "launcher.agent"]
    assert Srun()(Host("localhost")) == local_agent_command(Host("localhost"))
