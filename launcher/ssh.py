"""Other machines, by the user's own OpenSSH: his ~/.ssh/config, agent, jump hosts and known_hosts hold.

    ssh -o … [-p port] [-i identity] -- [user@]host 'cd / && exec python -m launcher.agent'

That is all the command line says; what to run, with which environment, reaches the agent through its stdin.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from launcher.connections import SharedConnections
from launcher.hosts import Host
from launcher.machine import is_this_machine
from launcher.transport import AgentLink, local_agent_command

__all__ = ["Ssh", "by_itself", "cure", "forget_connection", "passing_obstacle", "shared_connection"]

# All of ssh_config(5) that concerns stdin, stdout, a terminal, forking or what else a connection would carry: what the
# user's configuration says of it is meant for sessions that he types into.
OPTIONS = {
    "BatchMode": "yes",  # nobody is there to type a password or to judge a host key
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",  # with the count below: 90 s of a dead network, as the agent has it at its end
    "ServerAliveCountMax": "6",
    "LogLevel": "INFO",  # what it complains of is read: not less, and no debugging
    "VisualHostKey": "no",
    # stdin and stdout are the agent's, and no terminal's
    "RequestTTY": "no",
    "EscapeChar": "none",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",  # it would write to our stdout
    # The connection is none that the user shares with his other sessions, and carries nothing else.
    "ControlMaster": "no",
    "ControlPath": "none",
    "ControlPersist": "no",
    "ClearAllForwardings": "yes",  # ports that the user's config forwards are taken by his other sessions
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "Tunnel": "no",
    # It asks nothing, and changes no file or agent.
    "AddKeysToAgent": "no",
    "UpdateHostKeys": "no",
}
# With one connection a machine, the first agent's ssh makes it, and leaves it to a process in the background that the
# others find by its socket. Where sshd takes no further session (MaxSessions), ssh makes a connection of its own.
SHARING_OPTIONS = {"ControlMaster": "auto", "ControlPersist": "15"}  # seconds after its last session
NEWER_OPTIONS = {"StdinNull": "no", "ForkAfterAuthentication": "no", "SessionType": "default"}
NEWER_SINCE = (8, 7)  # OpenSSH before knows them neither here nor in the user's configuration


@dataclass(frozen=True)
class Ssh:
    """How agents are started on other machines. This machine needs no ssh, unless `always`."""

    port: int | None = None  # of hosts that name none themselves
    identity: Path | None = None
    python: str = sys.executable  # there
    always: bool = False
    connections: SharedConnections | None = field(default=None, compare=False)  # None: a connection for each agent

    def __call__(self, host: Host) -> Sequence[str]:
        if self.reaches_directly(host):
            return local_agent_command(host)
        port = host.ssh_port or self.port
        target = [
            *(["-p", str(port)] if port else []),
            *(["-i", str(self.identity)] if self.identity else []),
            "--",
            f"{host.user}@{host.name}" if host.user else host.name,
        ]
        options = _options()
        if self.connections is not None:
            options = {**options, **SHARING_OPTIONS, "ControlPath": self.connections.socket_of(target)}
        return [
            "ssh",
            *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
            *target,
            # From /, which holds no Python: `-m` imports from the working directory before all others.
            f"cd / && exec {shlex.quote(self.python)} -m launcher.agent",
        ]

    def reaches_directly(self, host: Host) -> bool:
        """Whether the host is this machine, and its processes are to be ours."""
        ours = host.user in (None, _own_user()) and host.ssh_port is None
        return ours and not self.always and is_this_machine(host.name)


def shared_connection(command: Sequence[str]) -> str | None:
    """The socket of the connection that an agent shares with the others on its machine; None if it shares none."""
    if command[0] != "ssh" or "ControlMaster=auto" not in command:
        return None
    return next(word.removeprefix("ControlPath=") for word in command if word.startswith("ControlPath="))


def forget_connection(command: Sequence[str]) -> None:
    """Have the next agent there make a new connection: this one led to no answer. Agents that use it keep it."""
    socket = shared_connection(command)
    if socket is not None:
        Path(socket).unlink(missing_ok=True)


def by_itself(command: Sequence[str]) -> list[str]:
    """The same command with a connection of its own, for a user who tries it by hand."""
    alone = {"ControlMaster=auto": "ControlMaster=no", f"ControlPath={shared_connection(command)}": "ControlPath=none"}
    return [alone.get(word, word) for word in command]


def _own_user() -> str | None:
    """As ssh has it: by user id, whatever USER and LOGNAME say. None for one without an entry in the list of users."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return None


def _options() -> Mapping[str, str]:
    return {**OPTIONS, **NEWER_OPTIONS} if _version() >= NEWER_SINCE else OPTIONS


@cache
def _version() -> tuple[int, int]:
    """Of the OpenSSH here; 0.0 if there is none."""
    try:
        told = subprocess.run(["ssh", "-V"], stdin=subprocess.DEVNULL, capture_output=True, check=False).stderr
    except OSError:
        return 0, 0
    match = re.search(rb"OpenSSH_(\d+)\.(\d+)", told)
    return (int(match[1]), int(match[2])) if match else (0, 0)


# What OpenSSH, the login shell and Python say -> what to do. The first that matches holds.
CURES = {
    r"Could not resolve hostname": "check its spelling; a short name needs /etc/hosts, or Host and HostName in "
    "~/.ssh/config",
    r"REMOTE HOST IDENTIFICATION HAS CHANGED": "its host key is not the one in your known_hosts; ask its administrator "
    "whether it is a new installation, then run: ssh-keygen -R {host}",
    r"Host key verification failed": "its host key is not known here; run `ssh {host} true` once by hand and compare "
    "the fingerprint",
    r"Permission denied \(|Too many authentication failures|Load key|no such identity": "it takes none of your keys; "
    "run: ssh-copy-id {host}, or name a key with --ssh-identity, or a user with user@{host}",
    r"Connection refused": "nothing listens at its ssh port; start sshd there, or name the port with ssh_port= in the "
    "hostfile or --ssh-port",
    r"[ks][a-z]*_exchange_identification|Connection (closed|reset) by": "sshd there, or that of a jump host, drops "
    "connections: it has too many at its handshake (MaxStartups in its sshd_config), or shuts this machine out",
    r"No user exists for uid": "your user id has no entry in the list of users here, which ssh needs; ask your "
    "administrator for one",
    r"timed out|No route to host|Network is unreachable": "is it up, and does a firewall let ssh through?",
    r"No module named '?launcher|ModuleNotFoundError": "danaz is not installed in {python} there; install the same "
    "version, or name the right Python with --remote-python",
    r"(?i)no such file|not found|cannot execute|permission denied": "there is no {python} there; name the right Python "
    "with --remote-python",
    r"(?i)bad configuration option|terminating, \d+ bad|unknown option": "your ssh cannot read its configuration; try: "
    "ssh {host} true",
}


# What OpenSSH says of a connection that was not made: it will not be, too many are being made, or the way is not there.
FINAL = re.compile(
    r"Host key verification failed|IDENTIFICATION HAS CHANGED|Permission denied|Too many authentication failures"
)
AWAY = re.compile(
    r"open failed: connect failed|Connection refused|No route to host|Network is unreachable|: Connection timed out|"
    r"Temporary failure in name resolution"
)
CROWDED = re.compile(
    r"[ks][a-z]*_exchange_identification|Connection (?:closed|reset) by|during banner exchange|Exceeded MaxStartups|"
    r"Not allowed at this time"
)
CROWDED_S, AWAY_S, AWAY_ATTEMPTS = 40.0, 20.0, 3


def passing_obstacle(link: AgentLink, now_s: float) -> Literal["crowded", "away"] | None:
    """What kept an agent from coming up, if it is worth another attempt by now; else None."""
    words = link.read_last_words()
    tried_s = now_s - link.first_attempt_s
    if link.command[0] != "ssh" or FINAL.search(words):
        return None
    if AWAY.search(words):
        return "away" if link.attempts < AWAY_ATTEMPTS and tried_s < AWAY_S else None
    return "crowded" if CROWDED.search(words) and tried_s < CROWDED_S else None


def cure(link: AgentLink) -> str | None:
    """What to do about an agent on another machine that did not come up; None if what was said is not known."""
    *_, target, there = link.command
    if link.command[0] != "ssh" or not link.closed:
        return None
    words = link.read_last_words()
    advice = (advice for pattern, advice in CURES.items() if re.search(pattern, words))
    found = next(advice, None)
    return None if found is None else found.format(host=target, python=shlex.split(there)[4])
