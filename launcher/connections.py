"""One ssh connection to each machine, which all agents on it share while this process lives.

A separate process of OpenSSH holds a shared connection, and other ssh processes find it by a socket. The sockets are in
a private folder. A keeper watches this process through a pipe: when this process ends in any way, even by SIGKILL, the
keeper closes the connections and deletes the folder. If it misses a connection, that ends 15 seconds after its last
session.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["SharedConnections"]

# The path of a socket may have 107 characters, and ssh adds 17 to it while it makes the socket. The path may hold only
# these characters, because ssh would expand a % and split words.
USABLE = re.compile(r"/[A-Za-z0-9/._-]{0,55}")
KEEPER = """
cat > /dev/null
for socket in "$1"/*; do
    if [ -S "$socket" ]; then ssh -F none -o "ControlPath=$socket" -O exit -- shared; fi
done
rm -rf -- "$1"
"""


class SharedConnections:
    """Names the socket of the connection to each machine. It makes the folder and starts its keeper on first use."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._numbers: dict[tuple[str, ...], int] = {}  # target -> its number
        self._keeper: subprocess.Popen[bytes] | None = None

    def socket_of(self, target: Sequence[str]) -> str:
        """Return the path of the socket for `target`: the words for ssh that name machine, user, port and key.

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
                start_new_session=True,  # Ctrl-C must end the launcher only; the keeper waits for its end
            )
        return str(self.folder / str(self._numbers.setdefault(tuple(target), len(self._numbers))))


def _make_folder() -> Path:
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="launcher-ssh-", dir=parent if USABLE.fullmatch(parent) else "/tmp"))
