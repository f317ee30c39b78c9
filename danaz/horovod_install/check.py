"""Check whether the installed Horovod works.

The ranks that try it are processes of their own, because importing a broken build can crash the process.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.target import installed_horovod, installed_torch
from launcher.rendezvous import Rendezvous
from launcher.start import module_command

VECTOR = (1.0, 2.0, 3.0, 4.0)  # f32[4]; rank r contributes (r + 1) times this

_INSTALL = "Run: danaz horovod install"


@dataclass(frozen=True)
class CheckedHorovod:
    """What a check has found out about a Horovod that works."""

    version: str  # "0.28.1+torch2.14.1.cu130.r1f0c22ab"
    torch: str  # the version it was built for, which is the installed one
    ranks: int
    gloo: bool
    mpi: bool
    nccl: int  # NCCL's version code, 23007 for 2.30.7; 0 without NCCL
    sums: dict[str, list[float]]  # kind of device -> VECTOR summed over the ranks


def check_horovod(ranks: int = 2, timeout_s: float = 120) -> CheckedHorovod:
    """Let `ranks` ranks on this machine all-reduce a vector, and return what they found.

    Raises HorovodError if Horovod is missing, was built for another torch, fails, or computes a wrong sum.
    """
    version = fitting_version()
    answers = _run_ranks(ranks, timeout_s)
    expected = [value * ranks * (ranks + 1) / 2 for value in VECTOR]
    for rank, answer in enumerate(answers):
        if answer["size"] != ranks or any(total != expected for total in answer["sums"].values()):
            raise HorovodError(
                f"Rank {rank} of {ranks} got {answer}; expected was a sum of {expected}. {_INSTALL} --force"
            )
    return CheckedHorovod(
        version, installed_torch(), ranks, *(answers[0][fact] for fact in ("gloo", "mpi", "nccl", "sums"))
    )


def fitting_version() -> str:
    """Return the version of the installed Horovod. Raises HorovodError if it is missing or built for another torch."""
    horovod = installed_horovod()
    if horovod is None:
        raise HorovodError(f"Horovod is not installed in {sys.prefix}. {_INSTALL}")
    torch = installed_torch()
    if horovod.built_for is None:
        raise HorovodError(f"Horovod {horovod.version} was built without PyTorch. {_INSTALL}")
    if horovod.built_for != torch:
        raise HorovodError(
            f"Horovod was built for torch {horovod.built_for}, but torch {torch} is installed. {_INSTALL}"
        )
    return horovod.version


def _run_ranks(ranks: int, timeout_s: float) -> list[dict[str, Any]]:
    """Start the ranks on loopback, and return what each printed. All of them have ended when this returns."""
    command = module_command("danaz.horovod_install.rank")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    deadline = time.monotonic() + timeout_s
    processes: list[subprocess.Popen[str]] = []
    with closing(Rendezvous()) as rendezvous:
        try:
            for rank in range(ranks):
                env = os.environ | rank_environment(rank, ranks, rendezvous.port)
                processes.append(subprocess.Popen(command, env=env, **pipes))
            return [_answer(rank, process, deadline - time.monotonic()) for rank, process in enumerate(processes)]
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def _answer(rank: int, process: subprocess.Popen[str], timeout_s: float) -> dict[str, Any]:
    try:
        out, err = process.communicate(timeout=max(timeout_s, 0))
    except subprocess.TimeoutExpired as error:
        raise HorovodError(f"Rank {rank} did not finish its all-reduce in time. {_INSTALL} --force") from error
    if process.returncode != 0:
        last = "\n".join(f"  {line}" for line in err.strip().splitlines()[-8:])
        raise HorovodError(f"Rank {rank} ended with exit code {process.returncode}:\n{last}\n{_INSTALL} --force")
    answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    return answer


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return the environment of one rank in a Horovod world on one machine, over loopback."""
    number = {
        "RANK": rank,
        "SIZE": ranks,
        "LOCAL_RANK": rank,
        "LOCAL_SIZE": ranks,
        "CROSS_RANK": 0,
        "CROSS_SIZE": 1,
        "GLOO_RENDEZVOUS_PORT": port,
        "GLOO_TIMEOUT_SECONDS": 90,  # ranks wait for each other while a busy machine still imports torch
    }
    text = {
        "HOSTNAME": "localhost",
        "CONTROLLER": "gloo",
        "CPU_OPERATIONS": "gloo",
        "GLOO_IFACE": "lo",
        "GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
    }
    horovod = {f"HOROVOD_{name}": str(value) for name, value in (number | text).items()}
    return horovod | {"OMP_NUM_THREADS": "1"}
