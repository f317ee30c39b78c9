"""Invitations for workers that join later. Each holds what the worker must know, in a file only its owner can read.

`danaz launch --invite K` writes K of them into RUN/invitations/; `danaz work --join HOST:PORT --key FILE` takes one.
Each is good for one worker at a time. It holds that worker's number and, unless the run is insecure, its key.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from danaz.launch.reach import PREFIX
from danaz.protocol.keys import WorkerKeys, to_json
from danaz.run.milestones import MISSING
from launcher.hosts import parse_hosts
from launcher.machine import in_url, local_machines
from launcher.plan import Plan, Workers, plan

FORMAT = "danaz invitation 1"
FOLDER = "invitations"
CONNECT_S = 10.0


class InvitationError(ValueError):
    """An invitation cannot be used; the message says why."""


@dataclass(frozen=True)
class Task:
    """The command and the environment of every rank of a run."""

    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # may hold secrets


@dataclass(frozen=True)
class Invitation:
    """One more worker of a run."""

    worker: int
    task: Task
    keys: WorkerKeys | None = None  # None: the server believes everyone

    @property
    def file_name(self) -> str:
        return f"worker-{self.worker}.json"


def write_invitations(run: Path, invitations: Sequence[Invitation]) -> None:
    """Write them into RUN/invitations/, each with mode 0600. Delete earlier ones, whose keys no server knows."""
    folder = run / FOLDER
    for path in folder.glob("worker-*.json"):
        path.unlink()
    if not invitations:
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    for invitation in invitations:
        values = asdict(invitation)
        values["errand"] = values.pop("task")  # the name that this format has always had for it
        content = json.dumps({"format": FORMAT, **values}, indent=2)
        fd = os.open(folder / invitation.file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(content + "\n")


def read_invitation(path: Path) -> Invitation:
    """Read an invitation. Raises InvitationError if others can read the file, or if it holds no invitation."""
    try:
        mode = path.stat().st_mode
        values: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise InvitationError(f"--key {path} cannot be read: {error.strerror}") from None
    except ValueError:
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InvitationError(
            f"--key {path} is not an invitation of this version of danaz; `danaz launch --invite K` writes them into "
            f"RUN/{FOLDER}/"
        )
    if mode & 0o077:
        raise InvitationError(f"--key {path} can be read by others, and holds a key; run: chmod 600 {path}")
    try:
        keys = None if values["keys"] is None else WorkerKeys(**values["keys"])
        task = Task([*values["errand"]["command"]], {**values["errand"]["env"]})
        return Invitation(int(values["worker"]), task, keys)
    except (KeyError, TypeError, ValueError) as error:
        raise InvitationError(f"--key {path} is damaged ({error!r}); copy it again") from None


def find_server(server: str) -> str:
    """Return the address, tcp://ADDRESS:PORT, of the server at HOST:PORT. Raises InvitationError if none answers."""
    host, colon, port = server.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise InvitationError(f"--join {server!r}: expected HOST:PORT, as `DANAZ_SERVER=tcp://HOST:PORT` shows it")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S) as link:
            address: str = link.getpeername()[0]
    except OSError as error:
        raise InvitationError(
            f"--join {server}: no server can be reached there ({error}); is the run going on, and does a firewall let "
            "TCP through?"
        ) from None
    return f"tcp://{in_url(address)}:{port}"


def plan_to_join(invitation: Invitation, server: str, slots: int | None, cwd: str) -> Plan:
    """Plan the ranks of one more worker on this machine. ``server`` is tcp://ADDRESS:PORT."""
    [here] = parse_hosts("localhost")
    here = replace(here, slots=slots)
    secrets = [] if invitation.keys is None else [to_json(invitation.keys)]
    worker = Workers(invitation.task.command, first=invitation.worker, secrets=secrets, milestones=MISSING)
    env = {**invitation.task.env, "DANAZ_SERVER": server, "DANAZ_GUEST": "1"}
    return plan([here], worker, env=env, cwd=cwd, machines=local_machines([here]), prefix=PREFIX)
