"""Reaches a machine by a command whose stdin and stdout are those of an agent on that machine.

In this module the agent is a process on this machine; in `ssh` it is one on another. The launcher starts whatever
command an `AgentCommand` returns, and sends everything that the agent needs to know through its stdin.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from pathlib import Path

from launcher.channel import READ_BYTES, Channel, Message, wait_ready
from launcher.hosts import Host
from launcher.machine import is_this_machine
from launcher.processes import descendants, send_signal
from launcher.start import module_command

__all__ = ["AgentCommand", "AgentLink", "TransportError", "local_agent_command"]

AgentCommand = Callable[[Host], Sequence[str]]
LAST_WORDS_S = 2.0  # at most, between the end of an agent's stdout and the end of its stderr
PACKAGE_PARENT = Path(__file__).resolve().parent.parent


class TransportError(Exception):
    """A machine that cannot be reached; the message names it and says what to do."""


def local_agent_command(host: Host) -> Sequence[str]:
    """Return the command that starts the agent on this machine. Raises TransportError for any other machine."""
    if not is_this_machine(host.name):
        raise TransportError(f"{host.name} is not this machine, the only one that can be used; write localhost:SLOTS")
    return module_command("launcher.agent")


class AgentLink:
    """One agent as the launcher sees it. `open` starts it, and may be called again if it ended without an answer."""

    popen: subprocess.Popen[bytes]
    channel: Channel
    stderr_fd: int

    def __init__(self, host: Host, command: Sequence[str], greeting: Message) -> None:
        """`greeting` is the first order that it gets."""
        self.host, self.command, self.greeting = host, command, greeting
        self.hello: Message | None = None  # its first answer: what it is and what it sees
        self.lost: str | None = None  # why we lost it, although nobody asked it to end
        self.attempts = 0
        self.first_attempt_s = self.next_attempt_s = 0.0
        self.last_words: deque[str] = deque(maxlen=20)  # from its stderr, where ssh complains too
        self.stderr_closed = False

    def open(self, now_s: float) -> None:
        """Start the agent. Raises TransportError."""
        self.first_attempt_s = now_s if self.attempts == 0 else self.first_attempt_s
        self.attempts, self.next_attempt_s = self.attempts + 1, inf
        self.last_words.clear()
        try:
            # It gets its own session, so that Ctrl-C at the terminal reaches only the launcher, which ends the run.
            self.popen = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=PACKAGE_PARENT,
                start_new_session=True,
            )
        except OSError as error:
            self.stderr_closed = True
            raise TransportError(f"cannot be started: {error}") from error
        stdin, stdout, stderr = self.popen.stdin, self.popen.stdout, self.popen.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        self.channel = Channel(stdout.fileno(), stdin.fileno(), awaits={"is": "hello"})
        self.stderr_fd = stderr.fileno()
        self.stderr_closed = False
        self.channel.send(self.greeting)

    @property
    def said_hello(self) -> bool:
        return self.hello is not None

    @property
    def is_open(self) -> bool:
        """Whether it can still send us something."""
        return hasattr(self, "channel") and not self.channel.closed

    @property
    def closed(self) -> bool:
        """Whether the agent was started and is gone, and with it every process that it started."""
        return self.attempts > 0 and not self.is_open

    @property
    def noise(self) -> str:
        """The last line that came before its first answer, or instead of it."""
        return self.channel.noise if hasattr(self, "channel") else ""

    def read_stderr(self) -> None:
        """Remember what the agent (or ssh) complains about. Call this when there is something to read."""
        data = os.read(self.stderr_fd, READ_BYTES)
        self.stderr_closed = not data
        self.last_words.extend(data.decode(errors="backslashreplace").splitlines())

    def read_last_words(self) -> str:
        """Return everything that it, or ssh, wrote to stderr. Call this once it has ended."""
        deadline = time.monotonic() + LAST_WORDS_S
        while not self.stderr_closed and wait_ready([self.stderr_fd], [], deadline - time.monotonic())[0]:
            self.read_stderr()
        return "\n".join(self.last_words)

    def close(self, timeout_s: float) -> int:
        """Close the pipes, which ends an agent that still runs, and wait for it. Return its exit status."""
        if not hasattr(self, "popen"):
            return 0
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # An agent that hangs ends none of its processes. Kill those below it on this machine first, because we
            # could not find them after its death.
            send_signal(descendants(self.popen.pid), signal.SIGKILL)
            self.popen.kill()
            return self.popen.wait()
