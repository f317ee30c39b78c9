"""How the launcher reaches a machine: a command whose stdin and stdout are those of an agent there.

Here it is a process of this machine, in `ssh` one of another: whatever an `AgentCommand` returns is started, and
everything the agent needs to know is sent through its stdin.
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
LAST_WORDS_S = 2.0  # between the end of an agent's stdout and that of its stderr
PACKAGE_PARENT = Path(__file__).resolve().parent.parent


class TransportError(Exception):
    """A machine that cannot be reached; the message names it and says what to do."""


def local_agent_command(host: Host) -> Sequence[str]:
    """Start the agent on this machine. Raises TransportError for any other."""
    if not is_this_machine(host.name):
        raise TransportError(f"{host.name} is not this machine, the only one that can be used; write localhost:SLOTS")
    return module_command("launcher.agent")


class AgentLink:
    """One agent, seen from the launcher. `open` starts it, and may be called again when it ended without an answer."""

    popen: subprocess.Popen[bytes]
    channel: Channel
    stderr_fd: int

    def __init__(self, host: Host, command: Sequence[str], greeting: Message) -> None:
        """`greeting` is the first order to it."""
        self.host, self.command, self.greeting = host, command, greeting
        self.hello: Message | None = None  # its first answer: what it is and what it sees
        self.lost: str | None = None  # why it can no longer be spoken to, though nobody asked it to end
        self.attempts = 0
        self.first_attempt_s = self.next_attempt_s = 0.0
        self.last_words: deque[str] = deque(maxlen=20)  # of its stderr, where ssh complains too
        self.stderr_closed = False

    def open(self, now_s: float) -> None:
        """Start the agent. Raises TransportError."""
        self.first_attempt_s = now_s if self.attempts == 0 else self.first_attempt_s
        self.attempts, self.next_attempt_s = self.attempts + 1, inf
        self.last_words.clear()
        try:
            # Its own session: Ctrl-C at the terminal is for the launcher alone, which then ends the run in order.
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
        """Whether it can be listened to."""
        return hasattr(self, "channel") and not self.channel.closed

    @property
    def closed(self) -> bool:
        """The agent is gone, and with it every process it started."""
        return self.attempts > 0 and not self.is_open

    @property
    def noise(self) -> str:
        """What came in the place of its first answer, or before it: the last line."""
        return self.channel.noise if hasattr(self, "channel") else ""

    def read_stderr(self) -> None:
        """Remember what the agent (or ssh) complains about; to be called when there is something to read."""
        data = os.read(self.stderr_fd, READ_BYTES)
        self.stderr_closed = not data
        self.last_words.extend(data.decode(errors="backslashreplace").splitlines())

    def read_last_words(self) -> str:
        """All that it, or ssh, complained of, once it has ended."""
        deadline = time.monotonic() + LAST_WORDS_S
        while not self.stderr_closed and wait_ready([self.stderr_fd], [], deadline - time.monotonic())[0]:
            self.read_stderr()
        return "\n".join(self.last_words)

    def close(self, timeout_s: float) -> int:
        """Close the pipes, which ends an agent that is still there, and wait for it. Returns its exit status."""
        if not hasattr(self, "popen"):
            return 0
        for pipe in (self.popen.stdin, self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            # One that hangs ends nobody: what is below it on this machine goes first, for later it could not be found.
            send_signal(descendants(self.popen.pid), signal.SIGKILL)
            self.popen.kill()
            return self.popen.wait()
