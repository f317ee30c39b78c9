"""One ssh connection to each machine, which all agents there share for as long as this process lives.

OpenSSH keeps a shared connection in a process of its own, which others find by a socket. The sockets lie in a private
folder; a keeper watches this process through a pipe, and closes the connections and removes the folder as soon as it
ends in whatever way, SIGKILL included. One that the keeper misses ends 15 seconds after its last session.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["SharedConnections"]

# The path of a socket has at most 107 characters, and ssh adds 17 while it makes one. Elsewhere than here, ssh would
# expand a % and split words.
USABLE = re.compile(r"/[A-Za-z0-9/._-]{0,55}")
KEEPER = """
cat > /dev/null
for socket in "$1"/*; do
    if [ -S "$socket" ]; then ssh -F none -o "ControlPath=$socket" -O exit -- shared; fi
done
rm -rf -- "$1"
"""


class SharedConnections:
    """Gives the socket of the connection to each machine. The folder and its keeper are made when first needed."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._numbers: dict[tuple[str, ...], int] = {}  # of targets
        self._keeper: subprocess.Popen[bytes] | None = None

    def socket_of(self, target: Sequence[str]) -> str:
        """The path for the machine, user, port and key that the words `target` of ssh's command line name.

        Raises OSError when no folder can be made.
        """
        if self.folder is None:
            self.folder = _make_folder()
            self._keeper = subprocess.Popen(
                ["sh", "-c", KEEPER, "keeper", str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the launcher, whose end the keeper awaits
            )
        return str(self.folder / str(self._numbers.setdefault(tuple(target), len(self._numbers))))


def _make_folder() -> Path:
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="danaz-ssh-", dir=parent if USABLE.fullmatch(parent) else "/tmp"))
