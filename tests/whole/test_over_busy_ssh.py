"""Machines to which it is hard to connect, because of their sshd or of the user's ssh_config."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from namespaces import Namespaces
from plays import LAUNCHER
from sshds import PORT, another_sshd, ssh_config
from waiting import ended

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(240)]


# Each would break a channel, or make it mean something else.
HOSTILE = """
Host *
    PermitLocalCommand yes
    LocalCommand echo printed by a LocalCommand
    RequestTTY force
    RemoteCommand echo not what was asked for
    StdinNull yes
    ForkAfterAuthentication yes
    SessionType none
    EscapeChar ~
    ControlMaster auto
    ControlPath {folder}/%C
    ControlPersist 600
    LocalForward 127.0.0.1:39999 127.0.0.1:22
    RemoteForward 127.0.0.1:39998 127.0.0.1:22
    ExitOnForwardFailure yes
    Tunnel point-to-point
    ForwardAgent yes
    ForwardX11 yes
    VisualHostKey yes
    LogLevel DEBUG1
    UpdateHostKeys ask
    AddKeysToAgent ask
    Compression yes
"""
NOISE = "echo Welcome; printf 'and no end of line'; echo complaint >&2\n"


def aliases(network: Namespaces, number: int) -> tuple[list[str], str]:
    """Name machine a, at PORT, in several ways."""
    names = [f"alias{each}" for each in range(number)]
    return names, f"Host alias*\n HostName {network['a'].address}\n Port {PORT}\n HostKeyAlias a\n"


def launch(network: Namespaces, folder: Path, hosts: list[str], *command: str) -> str:
    """Run a plan with a rank on each of the hosts; return the output."""
    arguments = [str(folder / "run"), ",".join(f"{host}:1" for host in hosts), "90", *command]
    return ended(network.popen([sys.executable, "-c", LAUNCHER, *arguments], env={**os.environ, "SENT": ""}), 120.0)


def test_an_sshd_that_takes_few_connections_at_once(network: Namespaces, tmp_path: Path) -> None:
    names, config = aliases(network, 16)
    with another_sshd(network, tmp_path, "MaxStartups 2:100:3"), ssh_config(network, config):
        said = launch(network, tmp_path, names, "sh", "-c", "echo $LAUNCHER_WORKER")
    assert said == '[0, "None"]\n'
    workers = {int(path.read_text()) for path in tmp_path.glob("run/logs/alias*/rank.*/stdout")}
    assert workers == set(range(len(names)))
    assert "MaxStartups" in (tmp_path / "sshd.log").read_text(), "it dropped some"


def test_a_jump_host_that_takes_few_connections_at_once(network: Namespaces, tmp_path: Path) -> None:
    names, config = aliases(network, 12)
    b = network["b"]
    jump = f"Host jump\n HostName {network['a'].address}\n Port {PORT}\n HostKeyAlias a\n"
    inner = f"Host alias*\n HostName {b.address}\n HostKeyAlias b\n ProxyJump jump\n"
    with another_sshd(network, tmp_path, "MaxStartups 2:100:3"), ssh_config(network, jump + inner):
        said = launch(network, tmp_path, names, "true")
    assert said == '[0, "None"]\n', config
    assert "MaxStartups" in (tmp_path / "sshd.log").read_text(), "it dropped some"


def test_an_sshd_that_takes_nobody_is_named_in_the_end(network: Namespaces, tmp_path: Path) -> None:
    """It accepts the connection and closes it. The launcher tries again, and then says why it failed."""
    a = network["a"]
    code = (
        "import socket, sys\n"
        "server = socket.create_server((sys.argv[1], int(sys.argv[2])))\n"
        "print(flush=True)\n"
        "while True: server.accept()[0].close()\n"
    )
    closing = network.popen([sys.executable, "-c", code, a.address, str(PORT)], on="a")
    names, config = aliases(network, 1)
    try:
        assert closing.stdout is not None
        closing.stdout.readline()
        with ssh_config(network, config):
            said = launch(network, tmp_path, names, "true")
    finally:
        closing.kill()
        closing.communicate()
    assert "the agent on alias0 ended although nobody asked it to: sshd there, or that of a jump host, drops" in said


def test_a_hostile_configuration_of_the_users(network: Namespaces, tmp_path: Path) -> None:
    folder = tmp_path / "control"
    folder.mkdir()
    with ssh_config(network, HOSTILE.format(folder=folder)):
        said = launch(network, tmp_path, ["a", "b"], "sh", "-c", "echo $SSH_AUTH_SOCK$DISPLAY")
    assert said == '[0, "None"]\n'
    assert {path.read_text() for path in tmp_path.glob("run/logs/*/rank.*/stdout")} == {"\n"}
    assert list(folder.iterdir()) == [], "the user's shared connections are left alone"


def test_a_login_that_prints_something(network: Namespaces, tmp_path: Path) -> None:
    noise = tmp_path / "bashrc"
    noise.write_text(NOISE)
    names, config = aliases(network, 1)
    with another_sshd(network, tmp_path, f"SetEnv BASH_ENV={noise}"), ssh_config(network, config):
        said = launch(network, tmp_path, names, "true")
        assert said == '[0, "None"]\n'
        doctor = network.danaz("doctor", "--hosts", names[0], "--chdir", str(tmp_path))
        assert "All hosts can take part." in ended(doctor)
