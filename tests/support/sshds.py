"""A second sshd on a machine of `namespaces`, and additions to the launching machine's ssh_config."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from namespaces import SSHD, Namespaces
from waiting import until

PORT = 2200


@contextlib.contextmanager
def another_sshd(network: Namespaces, folder: Path, *settings: str) -> Iterator[None]:
    """Run a second sshd on machine a, at PORT."""
    a = network["a"]
    config = folder / "sshd_config"
    before = (a.folder / "sshd_config").read_text()
    config.write_text("\n".join([f"Port {PORT}", *settings, before]))
    log = folder / "sshd.log"
    with log.open("wb") as file:
        start = f"hostname {a.hostname} && exec {SSHD} -D -e -f {config}"
        command = ["ip", "netns", "exec", a.namespace, "unshare", "--uts", "sh", "-c", start]
        sshd = subprocess.Popen(command, env={"PATH": os.environ["PATH"]}, stdout=file, stderr=file)
    try:
        until(lambda: sshd.poll() is not None or b"Server listening" in log.read_bytes(), "sshd listens")
        assert sshd.poll() is None, log.read_text()
        yield
    finally:
        sshd.send_signal(signal.SIGTERM)
        sshd.wait()


@contextlib.contextmanager
def ssh_config(network: Namespaces, text: str) -> Iterator[None]:
    """Put this text above the usual content of the launching machine's /etc/ssh/ssh_config."""
    config = network.ssh_config()
    before = config.read_text()
    config.write_text(text + before)
    try:
        yield
    finally:
        config.write_text(before)
