"""The agent, `python -m launcher.agent`: one process on each machine of a run, which starts and ends the others there.

The launcher sends it orders as JSON lines on stdin, so that no secret appears on a command line. It answers on stdout:

    {"do": "hello", "grace_s": 5, "silence_s": 90}         {"is": "hello", "pid", "cores", "gpus", …}
    {"do": "world", "world": 0, "address": "127.0.0.1"}    {"is": "world", "world", "rendezvous_port", "master_port"}
    {"do": "start", "name", "argv", "env", "cwd", …}       {"is": "started", "name", "pid"}
    {"do": "ping"}                                         {"is": "output", "name", "stream", "text"}
    {"do": "signal", "name", "signal": 15}                 {"is": "file", "path", "data", "last"}
                                                           {"is": "exit", "name", "status", "error", "reached", …}
    {"do": "forget", "folder", "kept": true}               {"is": "returned", "folder"}
    {"do": "stop", "grace_s": 5, "keep_files": false}      {"is": "stopping", "why"}

A process that `returns` files leaves them in a folder on this machine; several processes may share that folder. The
agent sends the files when all these processes have ended well, and at a stop. It deletes the folder when the launcher
says that it kept the files. With `keep_files`, or when the agent ends without an order, the files stay for a process
that will continue from them.

A process with `milestones` finds the name of a file in LAUNCHER_MILESTONES, and adds a line to it for each milestone
that it reaches. The exit report lists them. The last milestone is "leave", and the exit report says how many seconds
passed between it and the end of the process. A process with a `secret` reads it from the file descriptor that
LAUNCHER_SECRET_FD names. `prefix` in the order replaces LAUNCHER_ in these names.

A process gets the agent's own environment (on another machine, that of a login there). The variables in its order
override it.

The agent ends its whole process tree (SIGTERM, a grace period, SIGKILL) in four cases: it is told to stop; it gets a
signal; its stdin closes, because the launcher or the ssh connection died; or nothing, not even a ping, arrived for
`silence_s`, because the network is gone. No process escapes from the tree: each one has its own session, the agent
becomes the parent of a double-forked grandchild, and if the agent itself is killed, its parent, the guardian, ends what
is left. If the guardian is killed, the kernel signals the agent. Stdout closes only when all processes have ended.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from secrets import token_hex

from launcher.channel import ORDER_BYTES, READ_BYTES, Channel, Message, bytes_to_text, wait_ready
from launcher.checks import MOST_WORDS, NAME
from launcher.machine import source_address, this_machine
from launcher.plan import PYTHON
from launcher.processes import adopt_orphans, count_memory_kills, descendants, die_with_parent, reap, send_signal
from launcher.rendezvous import Rendezvous
from launcher.reports import FILE_PIECE_BYTES, LEAVING, MOST_REACHED
from launcher.signals import ENDING_SIGNALS, NotedSignals, noted_signals
from launcher.start import module_command

GRACE_S = 5.0  # between SIGTERM and SIGKILL, unless the launcher says otherwise
KILL_S = 10.0  # SIGKILL works at once, except on a process that hangs in the kernel (a dead NFS mount, a GPU driver)
MILESTONES_BYTES = 4096  # how much of a file of milestones is read
MAX_PENDING_BYTES = 1 << 22  # output the launcher has not taken yet; beyond this, we let the ranks' own pipes fill up


class Child:
    """A process that we started, and the pipes that carry its output."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], folder: Path | None, milestones: int | None) -> None:
        assert popen.stdout is not None
        assert popen.stderr is not None
        self.name, self.popen = name, popen
        self.folder = folder  # the files it leaves there go to the launcher
        self.milestones = milestones  # descriptor of the file in which it notes them
        self.memory_kills = count_memory_kills()  # on this machine, before this process started
        self.pipes = {popen.stdout.fileno(): "stdout", popen.stderr.fileno(): "stderr"}
        for fd in self.pipes:
            os.set_blocking(fd, False)

    def close(self, status: int) -> None:
        self.popen.returncode = status  # we wait for all children at once, so Popen must not wait itself
        for pipe in (self.popen.stdout, self.popen.stderr):
            if pipe is not None:
                pipe.close()
        if self.milestones is not None:
            os.close(self.milestones)

    def last_report(self, status: int) -> Message:
        """Return the report of how it ended."""
        exit = exit_report(self.name, status, None) | {"out_of_memory": count_memory_kills() > self.memory_kills}
        if self.milestones is not None:
            lines = os.pread(self.milestones, MILESTONES_BYTES, 0).decode(errors="replace").splitlines()
            exit["reached"] = [line for line in lines if NAME.fullmatch(line)][:MOST_REACHED]
            if LEAVING in exit["reached"]:
                exit["leaving_s"] = max(0.0, time.time() - os.fstat(self.milestones).st_mtime)
        return exit


class Agent:
    """A loop that waits for orders, the children's output and signals.

    It blocks nowhere else, so it always notices when it has to end.
    """

    def __init__(self, channel: Channel, signals: NotedSignals, folder: Path) -> None:
        """`folder` belongs to this agent while it runs; it need not exist yet."""
        self.channel, self.signals, self.folder = channel, signals, folder
        self.grace_s = GRACE_S
        self.children: dict[int, Child] = {}  # pid -> child, until it has exited
        self.stop_reason: str | None = None
        self.kill_at_s = math.inf
        self.rendezvous: list[Rendezvous] = []
        self.reserved_ports: list[socket.socket] = []
        self.returning: deque[Iterator[Message]] = deque()  # files and exit reports of ended processes
        self.kept: set[Path] = set()  # folders of processes that may be started again
        self.owed: dict[Path, list[str]] = {}  # folder -> patterns of the files to return from it
        self.unanswered: dict[str, Path] = {}  # sent folders, until the launcher says if it kept them
        self.returns_all = False
        self.silence_s = math.inf
        self.heard_s = time.monotonic()

    def run(self) -> None:
        while self.stop_reason is None or not self._tree_has_ended() or self._still_returns():
            self._wait()
            self._kill_if_due()
        self._say_last_words()

    def _wait(self) -> None:
        timeout_s = 0.0 if self._return_files() else self._timeout_s()
        overfull = self.channel.pending_bytes > MAX_PENDING_BYTES
        outputs = {} if overfull else {fd: child for child in self.children.values() for fd in child.pipes}
        orders = [] if self.channel.closed else [self.channel.read_fd]
        answers = [self.channel.write_fd] if self.channel.pending_bytes else []
        readable, writable = wait_ready([*orders, self.signals.wakeup_fd, *outputs], answers, timeout_s)
        if writable:
            self.channel.flush()
        if self.signals.wakeup_fd in readable:
            self.signals.rest()
        for fd in readable & outputs.keys():
            self._forward(outputs[fd], fd)
        self._report_exits()
        if self.channel.read_fd in readable:
            self.heard_s = time.monotonic()
            for order in self.channel.receive():
                self._obey(order)
        if self.channel.closed or self.channel.broken:
            self._stop("the launcher is gone", self.grace_s)
        if time.monotonic() >= self.heard_s + self.silence_s:
            self._stop(f"nothing was heard of the launcher for {self.silence_s:g} s", self.grace_s)
        for signum in self.signals.take():
            if signum != signal.SIGCHLD:
                self._stop(f"it got {signum.name}", self.grace_s)

    def _timeout_s(self) -> float:
        now = time.monotonic()
        if self.stop_reason is None:
            return max(0.0, self.heard_s + self.silence_s - now)
        return self.kill_at_s - now if now < self.kill_at_s else max(1.0, self.kill_at_s + KILL_S - now)

    # Orders

    def _obey(self, order: Message) -> None:
        match order["do"]:
            case "hello":
                self.grace_s = order["grace_s"]
                self.silence_s = order["silence_s"] or math.inf
                self.channel.send(hello())
            case "ping":
                pass  # it carries no content; it only shows that the launcher is alive
            case "world":
                self._open_world(order["world"], order["address"])
            case "start":
                self._start(order)
            case "signal":
                named = {pid for pid, child in self.children.items() if child.name == order["name"]}
                send_signal(named, signal.Signals(order["signal"]))
            case "forget":
                folder = self.unanswered.pop(order["folder"], None)
                if folder is not None and order["kept"]:
                    shutil.rmtree(folder, ignore_errors=True)
            case "stop":
                if not order["keep_files"]:
                    self._return_kept()
                self._stop("told to", order["grace_s"])
            case unknown:
                raise ValueError(f"the launcher sent an order that this agent does not know: {unknown!r}")

    def _open_world(self, world: int, address: str) -> None:
        rendezvous = Rendezvous(address)
        master = reserve_port()
        self.rendezvous.append(rendezvous)
        self.reserved_ports.append(master)
        ports = {"rendezvous_port": rendezvous.port, "master_port": master.getsockname()[1]}
        self.channel.send({"is": "world", "world": world, **ports})

    def _start(self, order: Message) -> None:
        if self.stop_reason is not None:
            return
        name = order["name"]
        secret = keep_in_memory(order["secret"])
        try:
            folder = own_folder(order["folder"]) if order["returns"] else None
            if folder is not None:
                self.owed.setdefault(folder, []).extend(order["files"])
            notes = self._new_file(name) if order["milestones"] else None
            popen = subprocess.Popen(
                command(order["argv"]),
                env=environment(order, folder, secret, notes),
                pass_fds=secret,
                cwd=os.path.expanduser(order["cwd"]),  # ~ is the home directory on this machine
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                # The kernel takes the thread that starts a process for its parent. Only this thread starts processes,
                # and it lives as long as the agent. The rendezvous threads do no harm: die_with_parent is a bare
                # system call, which waits for no lock that they could hold.
                preexec_fn=lambda: die_with_parent(signal.SIGKILL),
            )
        except (OSError, ValueError) as error:
            # the exit codes of a shell: 127 for "not found", 126 for "found, but cannot be run"
            status = 127 if isinstance(error, FileNotFoundError) else 126
            self.channel.send(exit_report(name, status, f"cannot start: {error}"[:MOST_WORDS]))
            return
        finally:
            for fd in secret:
                os.close(fd)
        self.children[popen.pid] = Child(name, popen, folder, None if notes is None else os.open(notes, os.O_RDONLY))
        self.channel.send({"is": "started", "name": name, "pid": popen.pid})

    def _new_file(self, name: str) -> Path:
        """Make an empty file for the milestones of a process. Raises OSError."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        path = self.folder / name
        path.write_bytes(b"")
        return path

    # Reports

    def _forward(self, child: Child, fd: int) -> None:
        """Pass on what a child wrote. One call empties its pipe, which holds no more than READ_BYTES."""
        try:
            data = os.read(fd, READ_BYTES)
        except BlockingIOError:
            return
        if data:
            output = {"name": child.name, "stream": child.pipes[fd], "text": bytes_to_text(data)}
            self.channel.send({"is": "output", **output})
        else:
            del child.pipes[fd]

    def _report_exits(self) -> None:
        ended = [(self.children[pid], status) for pid, status in reap() if pid in self.children]
        if not ended:
            return
        # First report everything that was written before these exits, by other processes too: the launcher has to find
        # out which process was in trouble first.
        for child in self.children.values():
            for fd in list(child.pipes):
                self._forward(child, fd)
        for child, status in ended:
            del self.children[child.popen.pid]
            exit = child.last_report(status)
            child.close(status)
            folder = child.folder
            if folder is not None and not self.returns_all and (status != 0 or folder in self.kept):
                self.kept.add(folder)
            elif folder is not None and not self._is_in_use(folder):
                self.kept.discard(folder)
                self.returning.append(files_and_exit(folder, self.owed[folder], exit))
                continue
            self.channel.send(exit)

    def _is_in_use(self, folder: Path) -> bool:
        return any(child.folder == folder for child in self.children.values())

    def _return_kept(self) -> None:
        """Queue the files that were kept for a restart: no process will be started again."""
        self.returns_all = True
        ready = [folder for folder in self.kept if not self._is_in_use(folder)]
        self.returning.extend(files_of(folder, self.owed[folder]) for folder in ready)
        self.kept.difference_update(ready)

    def _return_files(self) -> bool:
        """Send files until the launcher takes no more; a model may be large.

        Return whether there was something to send and the launcher can take more.
        """
        had_some = bool(self.returning) and self._can_return()
        while self.returning and self._can_return() and self.channel.pending_bytes <= MAX_PENDING_BYTES:
            message = next(self.returning[0], None)
            if message is None:
                self.returning.popleft()
                continue
            if message["is"] == "returned":
                self.unanswered[message["folder"]] = Path(tempfile.gettempdir(), message["folder"])
            self.channel.send(message)
        return had_some and self.channel.pending_bytes <= MAX_PENDING_BYTES

    def _still_returns(self) -> bool:
        return bool(self.returning or self.unanswered) and self._can_return()

    def _can_return(self) -> bool:
        return not self.channel.broken and not self.channel.closed

    # The end

    def _stop(self, reason: str, grace_s: float) -> None:
        """Begin to end the process tree. A second call can only shorten the grace period."""
        if self.stop_reason is None:
            self.stop_reason = reason
            if not self.returns_all:  # even if their processes now end well
                self.kept.update(child.folder for child in self.children.values() if child.folder is not None)
            self.channel.send({"is": "stopping", "why": reason})
            send_signal(descendants(), signal.SIGTERM)
        self.kill_at_s = min(self.kill_at_s, time.monotonic() + grace_s)

    def _kill_if_due(self) -> None:
        """Kill what is left of the process tree after the grace period."""
        if time.monotonic() >= self.kill_at_s:
            send_signal(descendants(), signal.SIGKILL)

    def _tree_has_ended(self) -> bool:
        """Return whether no process is left, or we have waited long enough after SIGKILL.

        We become the parent of every orphan, so SIGCHLD tells us when to look again.
        """
        return not descendants() or time.monotonic() > self.kill_at_s + KILL_S

    def _say_last_words(self) -> None:
        deadline = time.monotonic() + KILL_S
        while self.channel.pending_bytes and not self.channel.broken and time.monotonic() < deadline:
            wait_ready([], [self.channel.write_fd], deadline - time.monotonic())
            self.channel.flush()


def hello() -> Message:
    """Return what the launcher should know about this machine and about its connection to it."""
    machine = dataclasses.asdict(this_machine())
    # sshd sets it to "client port server port"
    client, _, server, _ = (os.environ.get("SSH_CONNECTION", "").split() + [""] * 4)[:4]
    launcher_address = client or os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    address = server or source_address(launcher_address)
    return {"is": "hello", "pid": os.getpid(), **machine, "launcher_address": launcher_address, "address": address}


def exit_report(name: str, status: int, error: str | None) -> Message:
    """Return the exit report of a process that noted no milestones."""
    end: Message = {"status": status, "error": error, "reached": [], "leaving_s": 0.0, "out_of_memory": False}
    return {"is": "exit", "name": name, **end}


def keep_in_memory(secret: str | None) -> tuple[int, ...]:
    """Put `secret` into a nameless file in memory. Return its descriptor, or nothing if there is no secret."""
    if secret is None:
        return ()
    fd = os.memfd_create("secret")
    os.write(fd, secret.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return (fd,)


def command(argv: Sequence[str]) -> list[str]:
    """Return the command line that starts a process of the plan on this machine."""
    if argv[0] != PYTHON:
        return list(argv)
    return module_command(*argv[2:]) if argv[1] == "-m" else [sys.executable, *argv[1:]]


def environment(order: Message, folder: Path | None, secret: tuple[int, ...], notes: Path | None) -> dict[str, str]:
    """Return the environment of a process: this machine's own, overridden by the order's.

    In it, `python` is the Python that runs this agent.
    """
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    returns = {} if folder is None else {order["returns"]: str(folder)}
    secrets = {f"{order['prefix']}SECRET_FD": str(secret[0])} if secret else {}
    milestones = {} if notes is None else {f"{order['prefix']}MILESTONES": str(notes)}
    return {**order["defaults"], **os.environ, "PATH": path, **order["env"], **returns, **secrets, **milestones}


def own_folder(name: str) -> Path:
    """Return the folder of this name among the temporary files. Make it if it does not exist.

    Raises OSError, also if it belongs to another user.
    """
    path = Path(tempfile.gettempdir(), name)
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{path} is there already, and somebody else's")
    return path


def files_and_exit(folder: Path, owed: Sequence[str], exit: Message) -> Iterator[Message]:
    yield from files_of(folder, owed)
    yield exit


def files_of(folder: Path, owed: Sequence[str]) -> Iterator[Message]:
    """Yield the owed files in a folder and its subfolders, piece by piece, and then a message that these are all.

    Links are skipped, because they may point out of this folder.
    """
    folders = [folder, *(path for path in folder.glob("[!.]*") if path.is_dir() and not path.is_symlink())]
    found = (path for each in folders for path in each.glob("[!.]*"))
    for path in sorted(path for path in found if path.is_file() and not path.is_symlink()):
        if not any(re.fullmatch(pattern, str(path.relative_to(folder)), re.ASCII) for pattern in owed):
            continue
        with path.open("rb") as file:
            data = file.read(FILE_PIECE_BYTES)
            while True:
                following = file.read(FILE_PIECE_BYTES)
                yield {
                    "is": "file",
                    "path": str(path.relative_to(folder)),
                    "data": base64.b64encode(data).decode(),
                    "last": not following,
                }
                if not following:
                    break
                data = following
    yield {"is": "returned", "folder": folder.name}


def reserve_port() -> socket.socket:
    """Reserve a free port: the kernel gives it to nobody who asks for a free port while this socket is open.

    A process that sets SO_REUSEADDR, as torch's TCPStore does, can still listen on it, because we do not listen.
    """
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))
    return reserved


def guard(agent: int, folder: Path) -> int:
    """Wait for the agent to end. If it was killed, we inherit its orphans and end them before we end ourselves.

    Then delete the agent's folder. Return the agent's exit code, or 128 + signal.
    """
    for signum in ENDING_SIGNALS:
        signal.signal(signum, lambda got, _frame: send_signal([agent], signal.Signals(got)))
    _, status = os.waitpid(agent, 0)
    try:
        while True:
            send_signal(descendants(), signal.SIGKILL)
            os.waitpid(-1, 0)  # we inherit what was forked meanwhile, so look again after each death
    except ChildProcessError:
        pass  # nobody is left
    shutil.rmtree(folder, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def main() -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # some parents leave it ignored, which would hide how children end
    adopt_orphans()
    guardian = os.getpid()
    folder = Path(tempfile.gettempdir(), f"launcher-agent-{token_hex(8)}")
    agent = os.fork()
    if agent != 0:
        return guard(agent, folder)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != guardian:
        return 1  # the guardian died before we asked to be told of its death
    adopt_orphans()
    os.write(1, b"\n")  # a login script may have printed text without an end of line
    channel = Channel(read_fd=0, write_fd=os.dup(1), longest_bytes=ORDER_BYTES)
    os.dup2(2, 1)  # nothing else may write between our messages
    with noted_signals(signal.SIGCHLD, *ENDING_SIGNALS) as signals:
        Agent(channel, signals, folder).run()
    shutil.rmtree(folder, ignore_errors=True)  # in case the guardian was killed
    return 0


if __name__ == "__main__":
    sys.exit(main())
