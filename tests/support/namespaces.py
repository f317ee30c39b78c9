"""Machines for tests. They are network namespaces of this machine.

Each has its own address, network interface, host name, /etc/hosts, sshd and host keys. Their addresses exist only
inside the namespaces.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
SSHD = "/usr/sbin/sshd"
NETWORK, NETWORK_6 = "10.77.0", "fd77:"
LAUNCHING = "launching"
DEADLINE_S = 20.0
_numbers = itertools.count()  # numbers the networks that this process makes

# ip netns exec shows /etc/netns/<namespace>/x as /etc/x, so that no file of this machine is changed.
NETNS_FOLDER = Path("/etc/netns")
PRIVILEGE_SEPARATION = Path("/run/sshd")

SSHD_CONFIG = """
ListenAddress {address}
ListenAddress [{address_6}]
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
"""

SSH_CONFIG = """
Host *
    IdentityFile {identity}
    IdentitiesOnly yes
    UserKnownHostsFile {known_hosts}
    GlobalKnownHostsFile /dev/null
"""


def missing() -> str | None:
    """Return why there can be no namespaces here; None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in (SSHD, "ssh", "ip", "unshare") if shutil.which(tool) is None]
    return f"{', '.join(absent)} missing; apt-get install openssh-server iproute2" if absent else None


@dataclass
class Node:
    """A machine that can be reached by ssh."""

    name: str
    number: int
    nic: str
    hostname: str
    namespace: str
    folder: Path  # the machine's files: host keys, sshd's configuration
    sshd: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def address_6(self) -> str:
        return f"{NETWORK_6}:{self.number}"


@dataclass
class Namespaces:
    """The machines, including the launching one."""

    folder: Path
    nodes: dict[str, Node] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def popen(self, command: Sequence[str], *, on: str = LAUNCHING, **options: object) -> subprocess.Popen[str]:
        """Start a process on a machine, by default on the launching one."""
        arguments = ["ip", "netns", "exec", self.nodes[on].namespace, *command]
        pipes: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        return subprocess.Popen(arguments, **{**pipes, **options})  # type: ignore[call-overload,no-any-return]

    def danaz(self, *arguments: str, **options: object) -> subprocess.Popen[str]:
        """Start the `danaz` command on the launching machine."""
        return self.popen([sys.executable, "-m", "danaz", *arguments], **options)

    def processes(self, name: str) -> dict[int, str]:
        """Return pid -> command line of all that runs on a machine, except its sshd and login sessions."""
        listed = subprocess.run(["ip", "netns", "pids", self.nodes[name].namespace], stdout=subprocess.PIPE, check=True)
        found = {}
        for pid in listed.stdout.split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                line = Path("/proc", pid.decode(), "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if line and not line.startswith(("sshd:", SSHD)):
                    found[int(pid)] = line.strip()
        return found

    def is_idle(self) -> bool:
        """Return whether nothing runs on any machine except the launching one."""
        return not any(self.processes(name) for name in self.nodes if name != LAUNCHING)

    def known_hosts(self) -> Path:
        return self.nodes[LAUNCHING].folder / "known_hosts"

    def ssh_config(self) -> Path:
        return NETNS_FOLDER / self.nodes[LAUNCHING].namespace / "ssh" / "ssh_config"

    def link(self, name: str, state: str) -> None:
        """Cut (`down`) or mend (`up`) the cable of a machine."""
        _ip("-n", self.nodes[LAUNCHING].namespace, "link", "set", f"to-{name}", state)

    def learn_host_keys(self) -> None:
        """Make the launching machine know every node's host keys, by its name and its IPv6 address."""
        keys = [(node.name, node.folder / "host_key.pub") for node in self.nodes.values() if node.sshd]
        names = {node.name: f"{node.name},{node.address_6}" for node in self.nodes.values()}
        lines = [f"{names[name]} {' '.join(path.read_text().split()[:2])}\n" for name, path in keys]
        self.known_hosts().write_text("".join(lines))


@contextlib.contextmanager
def namespaces(folder: Path, names: Sequence[str]) -> Iterator[Namespaces]:
    """Make the launching machine, and one machine for each name. At the end of the block, kill all that runs there."""
    made = Namespaces(folder)
    prefix = f"danaz{os.getpid()}.{next(_numbers)}"
    keep_separation = PRIVILEGE_SEPARATION.exists()
    PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
    try:
        _make_launching_machine(made, prefix)
        for number, name in enumerate(names, start=2):
            _make_node(made, prefix, name, number)
        _write_hosts(made)
        for name in names:
            _start_sshd(made, made[name])
        made.learn_host_keys()
        yield made
    finally:
        for node in made.nodes.values():
            _remove(node)
        with contextlib.suppress(OSError):  # other programs' namespaces may be there, with daemons that need it
            NETNS_FOLDER.rmdir()
            if not keep_separation:
                PRIVILEGE_SEPARATION.rmdir()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, stdout=subprocess.PIPE)


def _make_launching_machine(made: Namespaces, prefix: str) -> None:
    node = _add_namespace(made, Node(LAUNCHING, 1, "br0", os.uname().nodename, f"{prefix}l", made.folder / LAUNCHING))
    _ip("-n", node.namespace, "link", "add", node.nic, "type", "bridge")
    _bring_up(node)
    _make_key(made.folder / "id")
    made.ssh_config().parent.mkdir()
    made.ssh_config().write_text(SSH_CONFIG.format(identity=made.folder / "id", known_hosts=made.known_hosts()))


def _make_node(made: Namespaces, prefix: str, name: str, number: int) -> None:
    namespace = f"{prefix}n{number}"
    nic = f"eth{number}"  # each machine has another interface name
    node = _add_namespace(made, Node(name, number, nic, f"node-{name}", namespace, made.folder / name))
    bridge = made[LAUNCHING].namespace
    _ip("-n", bridge, "link", "add", f"to-{name}", "type", "veth", "peer", "name", nic, "netns", namespace)
    _ip("-n", bridge, "link", "set", f"to-{name}", "master", "br0", "up")
    _bring_up(node)


def _add_namespace(made: Namespaces, node: Node) -> Node:
    made.nodes[node.name] = node
    node.folder.mkdir(parents=True)
    (NETNS_FOLDER / node.namespace).mkdir(parents=True)
    _ip("netns", "add", node.namespace)
    _ip("-n", node.namespace, "link", "set", "lo", "up")
    return node


def _bring_up(node: Node) -> None:
    _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", node.nic)
    # Without duplicate address detection, the address can be used at once.
    _ip("-n", node.namespace, "address", "add", f"{node.address_6}/64", "dev", node.nic, "nodad")
    _ip("-n", node.namespace, "link", "set", node.nic, "up")


def _write_hosts(made: Namespaces) -> None:
    """Write every machine's name, and the machine's own host name as Debian writes it, which is a trap for gloo."""
    everybody = "".join(f"{node.address} {node.name}\n" for node in made.nodes.values())
    for node in made.nodes.values():
        own = f"127.0.0.1 localhost\n127.0.1.1 {node.hostname}\n"
        (NETNS_FOLDER / node.namespace / "hosts").write_text(own + everybody)


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _start_sshd(made: Namespaces, node: Node) -> None:
    _make_key(node.folder / "host_key")
    shutil.copy(made.folder / "id.pub", node.folder / "authorized_keys")
    config = node.folder / "sshd_config"
    config.write_text(SSHD_CONFIG.format(address=node.address, address_6=node.address_6, folder=node.folder))
    start = f"hostname {node.hostname} && exec {SSHD} -D -e -f {config}"
    command = ["ip", "netns", "exec", node.namespace, "unshare", "--uts", "sh", "-c", start]
    # Only danaz may bring anything of this environment to a login there.
    log = (node.folder / "sshd.log").open("wb")
    node.sshd = subprocess.Popen(command, env={"PATH": os.environ["PATH"]}, stdout=log, stderr=log)
    log.close()
    deadline = time.monotonic() + DEADLINE_S
    while b"Server listening" not in (node.folder / "sshd.log").read_bytes():
        assert node.sshd.poll() is None, (node.folder / "sshd.log").read_text()
        assert time.monotonic() < deadline, f"sshd on {node.name} does not listen"
        time.sleep(0.01)


def _remove(node: Node) -> None:
    """Kill all that still runs there, because the test started it, and remove the machine."""
    listed = subprocess.run(["ip", "netns", "pids", node.namespace], stdout=subprocess.PIPE, check=False)
    for pid in listed.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    if node.sshd is not None:
        node.sshd.wait()
    subprocess.run(["ip", "netns", "delete", node.namespace], check=False)
    shutil.rmtree(NETNS_FOLDER / node.namespace, ignore_errors=True)
