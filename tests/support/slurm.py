"""Slurm on the machines of `namespaces`: one controller, and a slurmd on each machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from namespaces import DEADLINE_S, LAUNCHING, Namespaces

TOOLS = ("slurmctld", "slurmd", "munged", "salloc", "sinfo")
PATH = f"{os.environ['PATH']}:/usr/sbin"

CONFIG = """
ClusterName=danaz
SlurmctldHost={hostname}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldPort=6817
SlurmdPort=6818
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""
NODE = "NodeName={name} NodeAddr={address} NodeHostname={hostname} CPUs=4 State=UNKNOWN\n"


def missing() -> str | None:
    """Return why there can be no Slurm here; None if there can."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=PATH) is None]
    return f"{', '.join(absent)} missing; apt-get install slurmctld slurmd slurm-client munge" if absent else None


@contextlib.contextmanager
def slurm(network: Namespaces, folder: Path) -> Iterator[dict[str, str]]:
    """Start Slurm; give the environment in which its commands find the cluster on the launching machine."""
    _write_config(network, folder)
    env = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    daemons = [_start(network, folder, LAUNCHING, env, "munged", *_munged(folder))]
    try:
        _wait((folder / "munge.socket").exists, folder)
        daemons.append(_start(network, folder, LAUNCHING, env, "slurmctld", "-D", "-c"))
        for name, node in network.nodes.items():
            if name != LAUNCHING:
                command = f"hostname {node.hostname} && exec slurmd -D -N {name}"
                daemons.append(_start(network, folder, name, env, "unshare", "--uts", "sh", "-c", command))
        _wait(lambda: _idle(network, env) == len(network.nodes) - 1, folder)
        yield {**os.environ, **env}
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(DEADLINE_S)


def _write_config(network: Namespaces, folder: Path) -> None:
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    launching = network[LAUNCHING]
    config = CONFIG.format(hostname=launching.hostname, address=launching.address, folder=folder)
    nodes = [node for node in network.nodes.values() if node is not launching]
    lines = [NODE.format(name=node.name, address=node.address, hostname=node.hostname) for node in nodes]
    (folder / "slurm.conf").write_text(config + "".join(lines))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # v2 needs systemd, for limits that we do not set


def _munged(folder: Path) -> list[str]:
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    return ["--foreground", "--force", *(f"--{option}={folder / name}" for option, name in files.items())]


def _start(network: Namespaces, folder: Path, on: str, env: dict[str, str], *command: str) -> subprocess.Popen[str]:
    with (folder / f"{on}-{command[0]}.log").open("w") as log:
        return network.popen(command, on=on, env=env, stdout=log)


def _idle(network: Namespaces, env: dict[str, str]) -> int:
    output, _ = network.popen(["sinfo", "--noheader", "--Node", "--format=%T"], env=env).communicate()
    return output.split().count("idle")


def _wait(condition: object, folder: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():  # type: ignore[operator]
        logs = "\n".join(path.read_text() for path in folder.glob("*.log"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.05)
