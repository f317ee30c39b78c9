"""Write files that appear under their name only when they are complete.

Whatever happens, a path holds either what it held before or the whole new file: after an error, after a kill, and after
a crash of the machine, because both the file and its name are synced to the disk. Only a kill leaves a part behind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex


@contextmanager
def replacing(path: Path, *, part: Path | None = None, mode: int | None = None) -> Iterator[Path]:
    """Yield a path to write to. When the block ends, the file that it wrote there replaces the file at ``path``.

    If the block raises, what it wrote is deleted. The folder must exist. Several processes may replace one path at the
    same time; the last one wins.

    Args:
        path: the file to replace. It need not exist.
        part: where the block writes, in the same folder; what lies there is overwritten, and only one process may use
            it at a time. By default it is a hidden file with a name that nobody else uses. Give one if you later look
            for what a kill has left.
        mode: the permissions of the new file, whatever the umask is. By default they are those of any new file: 0666
            less the umask.

    Raises:
        OSError: the file cannot be written. The error names ``path`` where it would have named no file, or the part.
    """
    if part is None:
        part = path.with_name(f".{path.name}.{token_hex(4)}.part")
    try:
        part.unlink(missing_ok=True)
        new = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666 if mode is None else mode)
        mode = stat.S_IMODE(os.fstat(new).st_mode) if mode is None else mode
        os.close(new)
        yield part
        part.chmod(mode)  # the block may have put another file there, as safetensors does
        _sync(part)
        part.replace(path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)  # on a full disk it would be in the way of smaller files
        if isinstance(error, OSError) and error.errno and error.filename in (None, part, str(part)):
            error.filename = str(path)
            del error.filename2
        raise


def write_atomically(path: Path, content: bytes, mode: int | None = None) -> None:
    """Replace the file at ``path`` by one that holds exactly ``content``. Raises OSError, which names ``path``.

    ``mode`` is as in ``replacing``.
    """
    with replacing(path, mode=mode) as part:
        part.write_bytes(content)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
