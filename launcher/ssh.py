"""Reaches other machines by the user's own OpenSSH, with the user's ~/.ssh/config, agent, jump hosts and known_hosts.

    ssh -o … [-p port] [-i identity] -- [user@]host 'cd / && exec python -m launcher.agent'

The command line holds nothing else. The agent reads from stdin what to run, and with which environment.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

from launcher.connections import SharedConnections
from launcher.hosts import Host
from launcher.machine import is_this_machine
from launcher.transport import AgentLink, local_agent_command

__all__ = ["Ssh", "by_itself", "cure", "forget_connection", "passing_obstacle", "shared_connection"]

# These override all options of ssh_config(5) that concern stdin, stdout, a terminal, forking or other traffic on the
# connection. What the user's configuration says about them is meant for interactive sessions.
OPTIONS = {
    "BatchMode": "yes",  # nobody can type a password or accept a host key
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",  # with the count below: a dead network is noticed after 90 s, as in the agent
    "ServerAliveCountMax": "6",
    "LogLevel": "INFO",  # we read its error messages, so no quieter level, and no debug output
    "VisualHostKey": "no",
    # stdin and stdout belong to the agent, not to a terminal
    "RequestTTY": "no",
    "EscapeChar": "none",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",  # it would write to our stdout
    # The connection is not shared with the user's other sessions, and carries nothing else.
    "ControlMaster": "no",
    "ControlPath": "none",
    "ControlPersist": "no",
    "ClearAllForwardings": "yes",  # the user's other sessions already hold the forwarded ports
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "Tunnel": "no",
    # ssh asks no questions, and changes neither files nor the ssh agent.
    "AddKeysToAgent": "no",
    "UpdateHostKeys": "no",
}
# If agents on one machine share a connection, the ssh of the first agent makes it and hands it to a background process;
# the others find that by its socket. Where sshd accepts no further session (MaxSessions), ssh makes another connection.
SHARING_OPTIONS = {"ControlMaster": "auto", "ControlPersist": "15"}  # seconds after the last session
NEWER_OPTIONS = {"StdinNull": "no", "ForkAfterAuthentication": "no", "SessionType": "default"}
FORGET_S = 2.0  # for the process that holds a shared connection to stop sharing it
NEWER_SINCE = (8, 7)  # older versions of OpenSSH do not know these options


@dataclass(frozen=True)
class Ssh:
    """Starts agents on other machines. On this machine it needs no ssh, unless `always` is set."""

    port: int | None = None  # for hosts that name no port themselves
    identity: Path | None = None
    python: str = sys.executable  # path of Python on the other machine
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
            # `-m` imports from the working directory first; / holds no Python files.
            f"cd / && exec {shlex.quote(self.python)} -m launcher.agent",
        ]

    def reaches_directly(self, host: Host) -> bool:
        """Return whether the host is this machine, so that its processes can be children of this one."""
        ours = host.user in (None, _own_user()) and host.ssh_port is None
        return ours and not self.always and is_this_machine(host.name)


def shared_connection(command: Sequence[str]) -> str | None:
    """Return the socket of the connection that an agent shares with others on its machine; None if it shares none."""
    if command[0] != "ssh" or "ControlMaster=auto" not in command:
        return None
    return next(word.removeprefix("ControlPath=") for word in command if word.startswith("ControlPath="))


def forget_connection(command: Sequence[str]) -> None:
    """Make the next agent on that machine open a new connection, because no answer came over this one.

    Agents that already use it keep it, and it ends with the last of them.
    """
    socket = shared_connection(command)
    if socket is None:
        return
    # The process that holds the connection must remove the socket itself. Otherwise it would do so when it ends, and
    # remove that of the next connection, which has the same name.
    stop = ["ssh", "-F", "none", "-o", f"ControlPath={socket}", "-O", "stop", "--", "shared"]
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(stop, stdin=subprocess.DEVNULL, capture_output=True, timeout=FORGET_S, check=False)
    Path(socket).unlink(missing_ok=True)


def by_itself(command: Sequence[str]) -> list[str]:
    """Return the same command without a shared connection, for a user who tries it by hand."""
    alone = {"ControlMaster=auto": "ControlMaster=no", f"ControlPath={shared_connection(command)}": "ControlPath=none"}
    return [alone.get(word, word) for word in command]


def _own_user() -> str | None:
    """Return this user's name, by user id as ssh does, not by USER or LOGNAME. None if the id has no entry."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return None


def _options() -> Mapping[str, str]:
    return {**OPTIONS, **NEWER_OPTIONS} if _version() >= NEWER_SINCE else OPTIONS


@cache
def _version() -> tuple[int, int]:
    """Return the version of OpenSSH on this machine; (0, 0) if there is none."""
    try:
        told = subprocess.run(["ssh", "-V"], stdin=subprocess.DEVNULL, capture_output=True, check=False).stderr
    except OSError:
        return 0, 0
    match = re.search(rb"OpenSSH_(\d+)\.(\d+)", told)
    return (int(match[1]), int(match[2])) if match else (0, 0)


# Message of OpenSSH, the login shell or Python -> what to do. The first match counts.
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
    r"No module named '?launcher|ModuleNotFoundError": "this program is not installed in {python} there; install the "
    "same version, or name the right Python with --remote-python",
    r"(?i)no such file|not found|cannot execute|permission denied": "there is no {python} there; name the right Python "
    "with --remote-python",
    r"(?i)bad configuration option|terminating, \d+ bad|unknown option": "your ssh cannot read its configuration; try: "
    "ssh {host} true",
}


# What OpenSSH says when it cannot connect. FINAL: another attempt will not help. AWAY: the machine cannot be reached
# now. CROWDED: its sshd has too many connections in their handshake.
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
    """Return why an agent did not come up, if another attempt is worthwhile at this time; otherwise None."""
    words = link.read_last_words()
    tried_s = now_s - link.first_attempt_s
    if link.command[0] != "ssh" or FINAL.search(words):
        return None
    if AWAY.search(words):
        return "away" if link.attempts < AWAY_ATTEMPTS and tried_s < AWAY_S else None
    return "crowded" if CROWDED.search(words) and tried_s < CROWDED_S else None


def cure(link: AgentLink) -> str | None:
    """Return what to do about an agent on another machine that did not come up; None for an unknown error message."""
    *_, target, there = link.command
    if link.command[0] != "ssh" or not link.closed:
        return None
    words = link.read_last_words()
    advice = (advice for pattern, advice in CURES.items() if re.search(pattern, words))
    found = next(advice, None)
    return None if found is None else found.format(host=target, python=shlex.split(there)[4])
