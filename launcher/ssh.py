"""Other machines, by the user's own OpenSSH: his ~/.ssh/config, agent, jump hosts and known_hosts hold.

    ssh -o … [-p port] [-i identity] -- [user@]host 'cd / && exec python -m launcher.agent'

That is all the command line says; what to run, with which environment, reaches the agent through its stdin.
"""

from __future__ import annotations

import getpass
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.hosts import Host
from launcher.machine import is_this_machine
from launcher.transport import AgentLink, local_agent_command

__all__ = ["Ssh", "cure"]

OPTIONS = {
    "BatchMode": "yes",  # nobody is there to type a password or to judge a host key
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",  # with the count below: 90 s of a dead network, as the agent has it at its end
    "ServerAliveCountMax": "6",
    "ClearAllForwardings": "yes",  # ports that the user's config forwards are taken by his other sessions
    "RequestTTY": "no",
    "RemoteCommand": "none",
}


@dataclass(frozen=True)
class Ssh:
    """How agents are started on other machines. This machine needs no ssh, unless `always`."""

    port: int | None = None  # of hosts that name none themselves
    identity: Path | None = None
    python: str = sys.executable  # there
    always: bool = False

    def __call__(self, host: Host) -> Sequence[str]:
        if self.reaches_directly(host):
            return local_agent_command(host)
        port = host.ssh_port or self.port
        return [
            "ssh",
            *(word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")),
            *(["-p", str(port)] if port else []),
            *(["-i", str(self.identity)] if self.identity else []),
            "--",
            f"{host.user}@{host.name}" if host.user else host.name,
            # From /, which holds no Python: `-m` imports from the working directory before all others.
            f"cd / && exec {shlex.quote(self.python)} -m launcher.agent",
        ]

    def reaches_directly(self, host: Host) -> bool:
        """Whether the host is this machine, and its processes are to be ours."""
        ours = host.user in (None, getpass.getuser()) and host.ssh_port is None
        return ours and is_this_machine(host.name) and not self.always


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
    r"timed out|No route to host|Network is unreachable": "is it up, and does a firewall let ssh through?",
    r"No module named '?launcher|ModuleNotFoundError": "danaz is not installed in {python} there; install the same "
    "version, or name the right Python with --remote-python",
    r"(?i)no such file|not found|cannot execute|permission denied": "there is no {python} there; name the right Python "
    "with --remote-python",
    r"(?i)bad configuration option|terminating, \d+ bad|unknown option": "your ssh cannot read its configuration; try: "
    "ssh {host} true",
}


def cure(link: AgentLink) -> str | None:
    """What to do about an agent on another machine that did not come up; None if what was said is not known."""
    *_, target, there = link.command
    if link.command[0] != "ssh" or not link.closed:
        return None
    words = link.read_last_words()
    advice = (advice for pattern, advice in CURES.items() if re.search(pattern, words))
    found = next(advice, None)
    return None if found is None else found.format(host=target, python=shlex.split(there)[4])
