"""Invitations: who can read them, what they hold, and what the error says when one cannot be used."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from danaz.cli.main import app
from danaz.launch.invitation import (
    Invitation,
    InvitationError,
    Task,
    find_server,
    plan_to_join,
    read_invitation,
    write_invitations,
)
from danaz.protocol.keys import make_keys
from launcher.logs import quiet
from launcher.run import Outcome, run

ROOT = Path(__file__).parents[2]

_, (KEYS, OTHER_KEYS) = make_keys(2)
TASK = Task(["python", "train.py"], {"DANAZ_SETTINGS": "{}", "TOKEN": "a secret"})


def written(run: Path, *invitations: Invitation) -> list[Path]:
    write_invitations(run, invitations)
    return sorted((run / "invitations").iterdir())


def test_what_was_written_is_read_by_its_owner_alone(tmp_path: Path) -> None:
    invitation = Invitation(2, TASK, KEYS)
    [path] = written(tmp_path, invitation)
    assert (path.name, path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (
        "worker-2.json",
        0o600,
        0o700,
    )
    assert read_invitation(path) == invitation
    assert "secret" not in repr(invitation)


def test_those_of_an_earlier_launch_go_away(tmp_path: Path) -> None:
    """No server knows their keys any more."""
    written(tmp_path, Invitation(2, TASK, KEYS), Invitation(3, TASK, OTHER_KEYS))
    assert [path.name for path in written(tmp_path, Invitation(3, TASK, KEYS))] == ["worker-3.json"]
    write_invitations(tmp_path, [])
    assert list(tmp_path.rglob("*.json")) == []


def test_a_joiner_is_the_worker_of_its_invitation(tmp_path: Path) -> None:
    laid = plan_to_join(Invitation(5, TASK, KEYS), "tcp://10.0.0.1:5555", 2, "/here")
    assert [rank.env["DANAZ_WORKER"] for rank in laid.ranks] == ["5", "5"]
    assert [unit.label for unit in laid.units] == ["worker 5 on localhost"]
    assert (laid.env["DANAZ_SERVER"], laid.env["TOKEN"], laid.cwd) == ("tcp://10.0.0.1:5555", "a secret", "/here")
    first, second = (rank.secret for rank in laid.ranks)
    assert first is not None
    assert json.loads(first)["public"] == KEYS.public
    assert second is None
    assert plan_to_join(Invitation(5, TASK), "tcp://[::1]:1", None, "/").ranks[0].secret is None


REPORT = """
import json, os
from danaz.protocol.keys import SECRET_FD
from danaz.run.milestones import MISSING, VARIABLE
found = {name: value for name, value in os.environ.items() if name.startswith("DANAZ_")}
found["key"] = open(int(os.environ[SECRET_FD])).read()
open("found", "w").write(json.dumps(found))
open(os.environ[VARIABLE], "a").write("\\n".join(MISSING) + "\\n")
"""


def test_every_variable_of_danaz_that_a_rank_finds(tmp_path: Path) -> None:
    task = Task([sys.executable, "-c", REPORT], {"DANAZ_SETTINGS": "{}", "PYTHONPATH": str(ROOT)})
    laid = plan_to_join(Invitation(5, task, KEYS), "tcp://10.0.0.1:5555", 1, str(tmp_path))
    assert run(laid, tmp_path / "run", echo=quiet) == Outcome(0)
    found = json.loads((tmp_path / "found").read_text())
    assert json.loads(found.pop("key"))["public"] == KEYS.public
    for name in ("DANAZ_INCARNATION", "DANAZ_MILESTONES", "DANAZ_SECRET_FD"):
        assert found.pop(name)
    assert found == {
        "DANAZ_GUEST": "1",
        "DANAZ_LOCAL_DEVICE": "0",
        "DANAZ_LOCAL_RANK": "0",
        "DANAZ_LOCAL_SIZE": "1",
        "DANAZ_SERVER": "tcp://10.0.0.1:5555",
        "DANAZ_SETTINGS": "{}",
        "DANAZ_WORKER": "5",
    }


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("not JSON", 0o600, "is not an invitation of this version of danaz"),
        ("[]", 0o600, "is not an invitation of this version of danaz"),
        ('{"format": "danaz invitation 0"}', 0o600, "is not an invitation of this version of danaz"),
        ('{"format": "danaz invitation 1"}', 0o644, "can be read by others, and holds a key; run: chmod 600"),
        ('{"format": "danaz invitation 1"}', 0o600, "is damaged"),
        ('{"format": "danaz invitation 1", "keys": {"public": "x"}}', 0o600, "is damaged"),
    ],
)
def test_what_cannot_be_used(tmp_path: Path, content: str, mode: int, message: str) -> None:
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(InvitationError, match=message):
        read_invitation(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvitationError, match="cannot be read: No such file"):
        read_invitation(tmp_path / "none")


@pytest.mark.parametrize("server", ["", "here", "here:", ":5555", "here:port", "here:0", "here:65536"])
def test_where_the_server_is_must_be_said(server: str) -> None:
    with pytest.raises(InvitationError, match="expected HOST:PORT"):
        find_server(server)


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_server_is_found_by_any_name(family: socket.AddressFamily, address: str) -> None:
    with socket.socket(family) as server:
        server.bind((address, 0))
        port = server.getsockname()[1]
        with pytest.raises(InvitationError, match=r"no server can be reached there \(.*refused"):
            find_server(f"{address}:{port}")
        server.listen()
        if family == socket.AF_INET:
            assert find_server(f"localhost:{port}") == find_server(f"127.0.0.1:{port}") == f"tcp://127.0.0.1:{port}"
        else:
            assert find_server(f"[::1]:{port}") == f"tcp://[::1]:{port}"


@pytest.mark.parametrize("arguments", [["--join", "here:1"], ["--key", "file"]])
def test_both_options_are_needed(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["work", *arguments])
    assert result.exit_code == 2
    assert "--join HOST:PORT and --key FILE belong together" in result.output
