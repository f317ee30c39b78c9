"""Built wheels, kept for the next set-up.

A wheel's own name is its key: it holds Horovod's version, torch's, the recipe's hash, the Python and the platform.
Beside it stands its SHA-256: a wheel that is torn, altered or put there by something else is not taken.
"""

import hashlib
import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO

from danaz.horovod_install.errors import HorovodError
from danaz.horovod_install.recipe import Target, full_version


def cache_folder() -> Path:
    """`${XDG_CACHE_HOME:-~/.cache}/danaz`. Raises HorovodError."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"], "danaz")
    try:
        return Path.home() / ".cache" / "danaz"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        raise HorovodError("you have no home directory; name a folder for built wheels by XDG_CACHE_HOME") from None


def find_wheel(target: Target, wheels: Path) -> Path | None:
    """The wheel built for exactly this target, or None: also if it is not as it was stored."""
    wheel = wheels / f"horovod-{full_version(target)}-{target.python_tag}-{target.python_tag}-{target.platform}.whl"
    try:
        return wheel if _sha256(wheel) == _hash_file(wheel).read_text().strip() else None
    except (OSError, UnicodeDecodeError):
        return None


def _hash_file(wheel: Path) -> Path:
    return wheel.with_name(f"{wheel.name}.sha256")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def store_wheel(wheel: Path, wheels: Path) -> Path:
    """Copy a built wheel into the cache, atomically: a reader, or a run cut short, never meets half a wheel.

    Its hash comes last, so that no hash stands beside a wheel of another build for longer than a moment, in which
    nobody takes that wheel.
    """
    wheels.mkdir(parents=True, exist_ok=True)
    stored = wheels / wheel.name
    with wheel.open("rb") as source:
        _store(source, stored)
    _store(io.BytesIO(f"{_sha256(wheel)}\n".encode()), _hash_file(stored))
    return stored


def _store(source: BinaryIO, path: Path) -> None:
    descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as sink:
            shutil.copyfileobj(source, sink)
        Path(partial).chmod(0o644)  # mkstemp's 0600 would lock out a cache that users share
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
